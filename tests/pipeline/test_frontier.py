"""`cptquant frontier` end to end on a toy: points are what `quantize` gives, and a second call spends nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporters.gguf_toys import save_toy
from safetensors.torch import load

from cptquant.core.budget import Budget
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.frontier import Frontier
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.stages.calibration import find_measured
from cptquant.stages.frontier import FrontierRequest, frontier_model

QUICK = (
    "--calibration-sequences", 8, "--eval-sequences", 8, "--sequence-length", 32, "--own-text", 0,
    "--quantizer", "gptq",
)  # fmt: skip
QUICKLY = {"formats": ("int2-g16", "int3-g16", "int4-g16", "int8-g16"), "calibration_sequences": 8, "eval_sequences": 8,
           "sequence_length": 32, "quantizer": "rtn"}  # fmt: skip
FLAGS = ("--formats", "int2-g16,int3-g16,int4-g16,int8-g16", *QUICK)


def refused(outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


def test_one_measurement_gives_every_plan(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--budgets", "3.2bpw@sites,4bpw@sites,6bpw@sites,8bpw@sites", "--measure", 3, *FLAGS)
    outcome = cptquant("frontier", folder, "--output", run, *flags)
    assert outcome.code == 0, outcome.err
    frontier, layout = Frontier.load(run / "frontier.json"), ModelLayout.load(run / "layout.json")
    assert [point.budget for point in frontier.points] == ["3.2bpw@sites", "4bpw@sites", "6bpw@sites", "8bpw@sites"]
    assert [point.measured is not None for point in frontier.points] == [True, False, True, True]
    assert [point.inside is not None for point in frontier.points] == [True, False, True, True]
    for point in frontier.points:
        plan = Plan.load(run / point.plan_file)
        assert plan.site_bytes <= Budget.parse(point.budget).limit_bytes(layout)
        assert (point.size_bytes, point.damage) == (plan.size_bytes, plan.predicted_damage)
        assert point.predicted is not None and point.predicted.low < point.predicted.value < point.predicted.high
        # the hull bounds every plan from below
        before = max((v for v in frontier.vertices if v.site_bytes <= plan.site_bytes), key=lambda v: v.site_bytes)
        assert point.damage >= before.damage - before.gain_per_byte * (plan.site_bytes - before.site_bytes) - 1e-12
    for text in ("3.2bpw@sites", "8bpw@sites"):
        assert text in outcome.out
    assert f"{frontier.covered} of 3 measured points lie in the 90 % band" in outcome.out
    page = (run / "frontier.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")

    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    stamps |= {path: path.stat().st_mtime_ns for path in (run / "frontier").glob("*.json")}
    assert cptquant("frontier", folder, "--output", run, *flags).code == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "a finished stage ran again"


def test_points_are_what_quantize_gives(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """The run folder of `quantize` lends its table; the measured loss is the one that its own report has."""
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--output", run, "--budget", "5bpw@sites", "--baselines", "random",
                       "--no-predict", *FLAGS)  # fmt: skip
    assert outcome.code == 0, outcome.err
    table = (run / "sensitivity.json").stat().st_ino, (run / "sensitivity-tdmpq.json").stat().st_mtime_ns
    outcome = cptquant("frontier", run, "--budgets", "5bpw@sites,7bpw@sites", "--measure", 1, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (run / "sensitivity-tdmpq.json").stat().st_mtime_ns == table[1]
    measured = [point["measured"] for point in found["points"]]
    assert [loss is None for loss in measured] == [True, False]
    outcome = cptquant("frontier", run, "--budgets", "5bpw@sites,7bpw@sites", "--measure", 2)
    assert outcome.code == 0, outcome.err
    point = Frontier.load(run / "frontier.json").points[0]
    own = EvaluationReport.load(run / "evaluation.json").find("kl_nats_per_token", "quantized")
    assert point.measured is not None and own is not None
    assert (point.measured.value, point.measured.stderr, point.measured.n) == (own.value, own.stderr, own.n)
    assert Plan.load(run / "plan.json").formats == Plan.load(run / point.plan_file).formats
    diff = json.loads(cptquant("diff", run, run / "frontier/plan-7bpw@sites.json", "--json").out)
    assert (diff["before"]["measured"], diff["before"]["measured_n"]) == (own.value, own.n)
    assert diff["ratio"]["value"] < 1 and diff["after"]["predicted"]["value"] < diff["before"]["predicted"]["value"]
    explained = json.loads(cptquant("explain", run, "--json").out)
    assert explained["predicted"] == diff["before"]["predicted"]
    baseline = cptquant("diff", run, run / "plan-random.json")
    said = f"The plan of {run}/plan-random.json was made without a table; it is judged by the one at hand, tdmpq."
    assert said in baseline.out, baseline.err
    assert cptquant("report", run).code == 0
    assert "Predicted damage against size" in (run / "report.html").read_text()


def test_a_killed_frontier_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"formats": ("int2-g16", "int4-g16", "int8-g16"), "calibration_sequences": 8, "eval_sequences": 8,
               "sequence_length": 32, "quantizer": "rtn"}  # fmt: skip
    request = FrontierRequest(points=3, measure=3, scope="sites")
    whole = frontier_model(str(folder), tmp_path / "whole", request, **choices)

    class Killed(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "evaluate" and done:
            raise Killed

    with pytest.raises(Killed):
        frontier_model(str(folder), tmp_path / "killed", request, stop, **choices)
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert len(pieces) == 9 and not (tmp_path / "killed/frontier.json").exists()
    again = frontier_model(str(folder), tmp_path / "killed", request, **choices)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in pieces.items())
    assert again.points == whole.points and again.vertices == whole.vertices
    damages = [point.damage for point in whole.points]
    assert len(damages) == 3 and damages == sorted(damages, reverse=True)


BUDGETS = ("3.2bpw@sites", "4bpw@sites", "4.0001bpw@sites", "6bpw@sites", "16bpw@sites")


def trace(work: Path) -> tuple[Frontier, list[str]]:
    """Trace and measure `BUDGETS` in work/run, plain rounding; what was said comes along."""
    said: list[str] = []
    request = FrontierRequest(budgets=BUDGETS, measure=5)
    found = frontier_model(str(work / "model"), work / "run", request, lambda stage, *_: said.append(stage), **QUICKLY)
    return found, said


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("traced")
    save_toy("opt", work / "model", hidden_size=64, ffn_dim=64, word_embed_proj_dim=64)
    trace(work)
    return work


def test_a_plan_counts_once_and_no_damage_is_not_checked(traced: Path) -> None:
    run = traced / "run"
    frontier = Frontier.load(run / "frontier.json")
    _, four, same, _, whole = frontier.points
    assert (four.plan_digest, four.measured) == (same.plan_digest, same.measured)
    assert frontier.calibration is not None and frontier.calibration.points == 3
    assert four.check is not None and four.check == same.check, "a plan was checked with its own measurement"
    assert whole.damage == 0 and whole.measured is not None
    assert whole.check is None and whole.inside is None and frontier.checked == 4
    assert frontier.inputs["target"] == "transformers"
    # the losses are those of rounding: a plan that another quantizer carries out was not measured
    plan = Plan.load(run / four.plan_file)
    assert find_measured(run, frontier.measure, plan, "rtn") == four.measured
    assert find_measured(run, frontier.measure, plan, "gptq") is None
    assert find_measured(run, frontier.measure, plan.model_copy(update={"target": "torch"}), "rtn") is None


def test_damaged_files_of_a_frontier_are_made_again(traced: Path) -> None:
    before = Frontier.load(traced / "run/frontier.json")
    names = ("frontier/evaluation-4bpw@sites.json", "frontier/plan-6bpw@sites.json", "frontier.json",
             "frontier/manifest-4bpw@sites.json")  # fmt: skip
    paths = [traced / "run" / name for name in names]
    for path in paths:
        path.write_text(path.read_text()[:-40])
    pieces = {path: path.stat().st_mtime_ns for path in (traced / "run").rglob("block-*.safetensors")}
    outer = {path: load(path.read_bytes()) for path in (traced / "run").rglob("outer.safetensors")}
    assert pieces and outer
    after, said = trace(traced)
    assert (after.points, after.vertices, after.calibration) == (before.points, before.vertices, before.calibration)
    for path in paths:
        assert any(f"made anew: {path} is not valid JSON" in sentence for sentence in said), (path, said)
    assert Plan.load(paths[1]).predicted_damage == before.points[3].damage
    assert EvaluationReport.load(paths[0]).find(before.measure, "4bpw@sites") is not None
    assert Frontier.load(paths[2]) == after
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in pieces.items()), "a finished stage ran again"
    for path, tensors in outer.items():
        again = load(path.read_bytes())
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()) and len(again) == len(tensors)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--budgets", "4bpw", "--points", 3), ("--budgets and --points 3 were both given",)),
        (("--points", 1), ("--points 1 is too few for a frontier; give 2 or more",)),
        (("--points", 4, "--measure", 5), ("--measure 5 must be 0 to 4, the number of points",)),
        (("--budgets", "4bpw,3bpw@sites"), ("--budgets mixes '4bpw'", "'3bpw@sites'", "a frontier has one scale")),
        (("--budgets", "4bpw,lots"), ("--budgets 'lots' is not readable",)),
        (("--budgets", ","), ("--budgets ',' names no budget; give e.g. 3bpw,4bpw, or leave it out",)),
        (
            ("--budgets", "4bpw@sites", "--scope", "file"),
            ("--scope file contradicts --budgets 4bpw@sites, which counts the sites; leave --scope out",),
        ),
        (
            ("--budgets", "4bpw", "--scope", "sites"),
            ("--scope sites contradicts --budgets 4bpw, which counts the whole file; leave --scope out",),
        ),
        (("--budgets", "1bpw@sites"), ("--budgets 1bpw@sites allows", "too few; reachable")),
        (("--scope", "galaxy"), ("--scope 'galaxy' is unknown; choose one of: file, sites",)),
        (("--quantizer", "awq"), ("--quantizer 'awq' is unknown",)),
    ],
)
def test_choices_are_checked_before_anything_is_measured(
    cptquant: Callable, folder: Path, tmp_path: Path, flags: tuple, fragments: tuple
) -> None:
    refused(cptquant("frontier", folder, "--output", tmp_path / "run", *QUICK, *flags), *fragments)
    assert not (tmp_path / "run/sensitivity.json").exists()


def test_folders_are_checked(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    refused(cptquant("frontier", folder), "no output folder was given; add --output")
    assert cptquant("inspect", folder, "--output", tmp_path / "run").code == 0
    refused(cptquant("frontier", tmp_path / "run", "--output", tmp_path / "x"), "is a run folder and gets the frontier")
    refused(
        cptquant("frontier", "embedded:opt-mini", "--output", tmp_path / "run"), "holds a run of", "not of 'embedded"
    )
