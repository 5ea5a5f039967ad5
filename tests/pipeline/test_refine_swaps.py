"""`--refine-swaps` end to end: the plan keeps its bytes, the search is kept, and the guard has the last word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cptquant.core.evaluation import EvaluationReport
from cptquant.core.plan import Plan
from cptquant.core.refinement import Refinement

QUICK = (
    "--calibration-sequences", 16, "--eval-sequences", 4, "--sequence-length", 32, "--baselines", "uniform",
    "--own-text", 0,
)  # fmt: skip
SWAPS = ("--refine-swaps", 2)
FORMATS = ("--formats", "int2-g32,int3-g32,int4-g32,int8-g32")


@pytest.fixture
def loud(folder: Path) -> Path:
    """Larger weights, so that bits matter on this untrained model."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("weight") and ".layers." in name and tensors[name].dim() == 2:
            tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_whole_chain(cptquant: Callable, loud: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--budget", "3.2bpw@sites", "--output", run, *FORMATS, *QUICK)
    outcome = cptquant("quantize", loud, *flags, *SWAPS)
    assert outcome.code == 0, outcome.err
    plan, before = Plan.load(run / "plan.json"), Plan.load(run / "plan-unrefined.json")
    found, evaluation = Refinement.load(run / "refinement.json"), EvaluationReport.load(run / "evaluation.json")
    assert plan.site_bytes <= plan.limit_bytes == before.limit_bytes and plan.allocator == "knapsack"
    assert plan.formats == found.formats and plan.notes[0] == found.sentence
    assert 1 <= len(found.rounds) <= 2 and found.rounds[0].steps and found.rounds[0].passes
    walked = dict(before.formats)
    for step in found.rounds:
        assert all(walked[name] == fmt for name, fmt in step.before.items())
        assert step.taken is (step.difference + 2 * step.stderr < 0)
        if step.taken:
            walked.update(step.after)
    assert walked == plan.formats
    if plan.formats != before.formats:
        assert "the plan before swaps under the same limit" in evaluation.guard
        assert evaluation.find("kl_nats_per_token", "unrefined") is not None
        assert "Plan before swaps" in (run / "report.html").read_text()
    stamps = {path.name: path.stat().st_mtime_ns for path in run.glob("*.json")}
    assert cptquant("quantize", loud, *flags, *SWAPS).code == 0
    same = {name for name in stamps if (run / name).stat().st_mtime_ns == stamps[name]}
    assert {"plan.json", "plan-unrefined.json", "refinement.json", "evaluation.json"} <= same
    assert cptquant("what-if", run, "--more", "2kB").code == 0 and cptquant("explain", run).code == 0
    outcome = cptquant("quantize", loud, *flags, "--refine-swaps", 0)
    assert outcome.code == 0, outcome.err
    assert Plan.load(run / "plan.json").formats == before.formats
    assert not (run / "refinement.json").exists() and not (run / "plan-unrefined.json").exists()


def test_damaged_and_edited_files(cptquant: Callable, loud: Path, tmp_path: Path) -> None:
    """What nobody edits is made again by the same command; an edited plan is not replaced by one over its limit."""
    run = tmp_path / "run"
    flags = ("quantize", loud, "--budget", "3.2bpw@sites", "--output", run, *FORMATS, *QUICK, *SWAPS, "--no-predict")
    assert cptquant(*flags).code == 0
    plan, before = Plan.load(run / "plan.json"), Plan.load(run / "plan-unrefined.json")
    assert plan.formats != before.formats
    names = ("layout", "sensitivity-tdmpq", "refinement", "plan-unrefined", "plan-uniform", "manifest-unrefined",
             "manifest", "evaluation")  # fmt: skip
    for name in names:
        path = run / f"{name}.json"
        kept = _without_provenance(path)
        path.write_text(path.read_text()[:-99])
        outcome = cptquant(*flags)
        assert outcome.code == 0 and f"made anew: {path} is not valid JSON" in outcome.err, outcome.err
        assert _without_provenance(path) == kept, name

    path = run / "refinement.json"
    altered = json.loads(path.read_text())
    altered["formats"] = {site: "int8-g32" if ".layers." in site else fmt for site, fmt in altered["formats"].items()}
    path.write_text(json.dumps(altered))
    outcome = cptquant(*flags)
    assert outcome.code == 0 and "refinement.json holds another plan than its rounds lead to" in outcome.err
    assert Plan.load(run / "plan.json") == plan

    uniform = Plan.load(run / "plan-uniform.json")
    large = {site: "int8-g32" if ".layers." in site else fmt for site, fmt in plan.formats.items()}
    uniform.model_copy(update={"formats": large, "site_bytes": 2 * plan.site_bytes}).save(run / "plan-uniform.json")
    outcome = cptquant(*flags)
    assert outcome.code == 0 and "made anew: plan-uniform.json is too large" in outcome.err
    assert Plan.load(run / "plan-uniform.json").formats == uniform.formats

    smallest = {site: "int2-g32" if ".layers." in site else fmt for site, fmt in plan.formats.items()}
    assert smallest == uniform.formats
    sizes = {"size_bytes": uniform.size_bytes, "limit_bytes": uniform.site_bytes}
    edited = plan.model_copy(update={"formats": smallest, **sizes})
    edited.save(run / "plan.json")
    outcome = cptquant("quantize", run)
    said = f"plan.json says site_bytes = {plan.site_bytes}, its formats take {uniform.site_bytes}"
    assert outcome.code == 2 and said in outcome.err
    edited.model_copy(update={"site_bytes": uniform.site_bytes}).save(run / "plan.json")
    outcome = cptquant("quantize", run)
    assert outcome.code == 0, outcome.err
    evaluation = EvaluationReport.load(run / "evaluation.json")
    assert evaluation.written == "quantized" and "before swaps" not in evaluation.guard


def test_evaluating_a_variant_that_is_gone(cptquant: Callable, loud: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--budget", "3.2bpw@sites", "--output", run, *FORMATS, *QUICK, *SWAPS, "--no-predict")
    assert cptquant("quantize", loud, *flags).code == 0
    evaluation = EvaluationReport.load(run / "evaluation.json")
    evaluation.model_copy(update={"written": "unrefined"}).save(run / "evaluation.json")  # as a close guard chooses
    assert cptquant("evaluate", run, "--eval-sequences", 6).code == 0
    assert cptquant("allocate", run, "--budget", "3.2bpw@sites", "--refine-swaps", 0).code == 0
    outcome = cptquant("evaluate", run)
    assert outcome.code == 2
    assert "checkpoint holds the weights of plan-unrefined.json, with which plan.json or --baselines no" in outcome.err
    assert f"choose and write anew with: cptquant quantize {run}" in outcome.err
    assert cptquant("quantize", run).code == 0 and cptquant("evaluate", run).code == 0


def _without_provenance(path: Path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "provenance"}


def test_a_dry_run_counts_the_search(cptquant: Callable, folder: Path) -> None:
    flags = ("quantize", folder, "--budget", "4bpw@sites", "--dry-run", "--json")
    plain, more = (json.loads(cptquant(*flags, *extra).out)["stage_seconds"] for extra in ((), SWAPS))
    assert "swaps" not in plain and more["swaps"] > 0
    assert more["quantize"] > plain["quantize"] / 2  # timings of the machine differ between the two calls


def test_allocate_refines_too(cptquant: Callable, loud: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cptquant("inspect", loud, "--output", run).code == 0
    assert cptquant("measure", run, *FORMATS, *QUICK[:2], *QUICK[4:6]).code == 0
    outcome = cptquant("allocate", run, "--budget", "3.2bpw@sites", "--refine-swaps", 1)
    assert outcome.code == 0, outcome.err
    refinement = Refinement.load(run / "refinement.json")
    assert Plan.load(run / "plan.json").notes[0] == refinement.sentence
    assert len(refinement.rounds) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--allocator", "uniform"), "--refine-swaps orders formats by a sensitivity table, and --allocator uniform"),
        (("--calibration-sequences", 12), "--refine-swaps needs 16 calibration sequences or more, half of them to"),
        (("--refine-swaps", -1), "Invalid value for '--refine-swaps'"),
        (("--refine-swaps", 10**400), "Invalid value for '--refine-swaps'"),
    ],
)
def test_refusals(cptquant: Callable, folder: Path, tmp_path: Path, flags: tuple, message: str) -> None:
    common = ("--budget", "4bpw@sites", "--output", tmp_path / "run", "--sensitivity", "cmpq", *QUICK, *SWAPS)
    outcome = cptquant("quantize", folder, *common, *flags)
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run/plan.json").exists()


def test_a_memory_limit_is_refused_before_anything_is_measured(
    cptquant: Callable, folder: Path, tmp_path: Path
) -> None:
    outcome = cptquant(
        "quantize", folder, "--memory", "1GB", "--target", "onnx", "--output", tmp_path / "run", *QUICK, *SWAPS
    )
    assert outcome.code == 2
    assert "--refine-swaps keeps the bytes of the weights, not the engine's memory" in outcome.err
    assert not (tmp_path / "run").exists()
