"""`cptquant frontier` end to end on a toy: points are what `quantize` gives, and a second call spends nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cptquant.core.budget import Budget
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.frontier import Frontier
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.stages.frontier import FrontierRequest, frontier_model

QUICK = ("--calibration-sequences", 8, "--eval-sequences", 8, "--sequence-length", 32)
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


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--budgets", "4bpw", "--points", 3), ("--budgets and --points 3 were both given",)),
        (("--points", 1), ("--points 1 is too few for a frontier; give 2 or more",)),
        (("--points", 4, "--measure", 5), ("--measure 5 must be 0 to 4, the number of points",)),
        (("--budgets", "4bpw,3bpw@sites"), ("--budgets mixes '4bpw'", "'3bpw@sites'", "a frontier has one scale")),
        (("--budgets", "4bpw,lots"), ("--budgets 'lots' is not readable",)),
        (("--budgets", "1bpw@sites"), ("--budget 1bpw@sites allows", "too few; reachable")),
        (("--scope", "galaxy"), ("--scope 'galaxy' is unknown; choose one of: file, sites",)),
        (("--quantizer", "awq"), ("--quantizer 'awq' is unknown",)),
    ],
)
def test_choices_are_checked_before_anything_is_measured(
    cptquant: Callable, folder: Path, tmp_path: Path, flags: tuple, fragments: tuple
) -> None:
    refused(cptquant("frontier", folder, "--output", tmp_path / "run", *flags, *QUICK), *fragments)
    assert not (tmp_path / "run/sensitivity.json").exists()


def test_folders_are_checked(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    refused(cptquant("frontier", folder), "no output folder was given; add --output")
    assert cptquant("inspect", folder, "--output", tmp_path / "run").code == 0
    refused(cptquant("frontier", tmp_path / "run", "--output", tmp_path / "x"), "is a run folder and gets the frontier")
    refused(
        cptquant("frontier", "embedded:opt-mini", "--output", tmp_path / "run"), "holds a run of", "not of 'embedded"
    )
