"""The guard against llama.cpp's presets: which one is compared, when it is not, and what is then written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cptquant import read_layout
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.manifest import CheckpointRecord, Manifest
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.sensitivity import Damage, SensitivityTable
from cptquant.core.targets import find_target
from cptquant.core.targets.gguf_presets import PRESETS, preset_formats
from cptquant.engines import llamacpp_python
from cptquant.stages.presets import find_preset

GGUF = find_target("gguf")
QUICK = ("--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--own-text", 0)


@pytest.fixture(autouse=True)
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(llamacpp_python.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(llamacpp_python, "find_spec", lambda name: None)


def plan_with(layout, size_bytes: int, scope: str = "file", fmt: str = "Q4_0") -> Plan:
    return Plan(
        target="gguf", allocator="knapsack", budget="x", budget_scope=scope, limit_bytes=size_bytes,
        formats={site.name: fmt for site in layout.sites}, size_bytes=size_bytes, site_bytes=size_bytes,
        bits_per_weight=0.0, bits_per_weight_sites=0.0, status=SolverStatus.OPTIMAL,
    )  # fmt: skip


def damages(layout, values: dict[str, float]) -> SensitivityTable:
    rows = {site.name: {name: Damage(value=value) for name, value in values.items()} for site in layout.sites}
    return SensitivityTable(method="tdmpq", unit="kl_nats_per_token", damages=rows)


@pytest.mark.parametrize("scope", ["file", "sites"])
def test_the_largest_preset_that_takes_no_more_bytes(folder: Path, scope: str) -> None:
    layout = read_layout(str(folder))
    count = GGUF.plan_bytes if scope == "file" else GGUF.block_site_bytes
    sizes = {preset: count(layout, preset_formats(layout, preset)) for preset in PRESETS}
    for preset, size_bytes in sizes.items():
        found = find_preset(layout, plan_with(layout, size_bytes, scope), None)
        assert found.preset is not None and sizes[found.preset] == size_bytes and found.plan is not None
        below = find_preset(layout, plan_with(layout, size_bytes - 1, scope), None)
        smaller = [other for other in sizes.values() if other < size_bytes]
        assert (below.preset is None) is (not smaller)
        if below.preset is not None and below.plan is not None:
            assert sizes[below.preset] == max(smaller)
            held = below.plan.formats[layout.shared_head[0]]
            assert (held == layout.keep_format.name) is (scope == "sites")
        elif not smaller:
            assert below.reason == "no preset of llama.cpp takes as few bytes"
        assert preset in PRESETS


def test_a_preset_that_is_predicted_to_be_clearly_worse_is_not_quantized(folder: Path) -> None:
    layout = read_layout(str(folder))
    plan = plan_with(layout, GGUF.plan_bytes(layout, preset_formats(layout, "Q4_K_M")), fmt="Q8_0")
    ordinary = {"Q4_0": 2.0, "Q5_0": 1.0, "Q5_1": 0.9, "Q8_0": 0.6}
    found = find_preset(layout, plan, damages(layout, ordinary))
    assert found.preset == "Q4_K_M" and found.plan is not None and found.plan.allocator == "llama.cpp's Q4_K_M"
    clear = find_preset(layout, plan, damages(layout, {**ordinary, "Q8_0": 0.1}))
    assert clear.preset == "Q4_K_M" and clear.plan is None
    assert clear.reason.startswith("llama.cpp's Q4_K_M was not quantized: its predicted damage is ")
    assert clear.reason.endswith(" times the plan's")
    scores = damages(layout, {**ordinary, "Q8_0": 0.1}).model_copy(update={"unit": "relative"})
    assert find_preset(layout, plan, scores).plan is not None, "scores of blocks say nothing of how many times worse"
    without = find_preset(layout, plan, damages(layout, {"Q8_0": 0.1}))
    assert without.plan is not None, "a table that does not know the preset's types says nothing against it"


def test_the_preset_is_written_where_it_is_better(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """A table made up to give the bits to the wrong sites; the presets' types are better, and are what is written."""
    run = tmp_path / "run"
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:  # larger weights in the blocks, so that their bits matter on this untrained model
        if name.endswith("weight") and ".layers." in name and tensors[name].dim() == 2:
            tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert cptquant("inspect", folder, "--output", run).code == 0
    common = ("--target", "gguf", "--calibration-sequences", 4, "--sequence-length", 32)
    assert cptquant("measure", run, *common, "--formats", "Q4_0,Q8_0").code == 0
    path = run / "sensitivity.json"
    table = json.loads(path.read_text())
    for site, row in table["damages"].items():
        for name, damage in row.items():
            wanted = "float16" if "embed" in site or "lm_head" in site else "Q4_0"
            damage["value"] = 0.0 if name == wanted else 1.0
    path.write_text(json.dumps(table))
    assert cptquant("allocate", run, "--budget", "14bpw", "--formats", "Q4_0,Q8_0").code == 0
    flags = ("--eval-sequences", 8, "--baselines", "preset", "--own-text", 0)
    outcome = cptquant("quantize", run, *flags)
    assert outcome.code == 0, outcome.err
    evaluation, written = EvaluationReport.load(run / "evaluation.json"), Plan.load(run / "plan-preset.json")
    assert evaluation.written == "preset", evaluation.guard
    assert f"{written.allocator} is better, so {written.allocator} was written" in evaluation.guard
    assert evaluation.guard.endswith("not compared with uniform bits: --baselines leaves out uniform")
    assert CheckpointRecord.load(run / "checkpoint.json").tensor_bytes == written.size_bytes
    assert written.size_bytes <= Plan.load(run / "plan.json").size_bytes
    settings = Manifest.load(run / "manifest.json").settings
    assert (settings["written"], settings["guard"]) == ("preset", evaluation.guard)
    page = (run / "report.html").read_text()
    assert "What was written: types of llama.cpp" in page and "Quantized (types of llama.cpp" in page
    assert "was written" in outcome.out.replace("\n", " ")
    assert cptquant("export", run).code == 0
    plan = Plan.load(run / "plan.json")
    larger = {"formats": {site: "Q8_0" for site in plan.formats}}  # more bytes than the plan
    written.model_copy(update=larger).save(run / "plan-preset.json")
    again = cptquant("quantize", run, *flags)
    assert again.code == 0 and "made anew: plan-preset.json does not hold the preset's types" in again.err
    assert Plan.load(run / "plan-preset.json").formats == written.formats
    assert EvaluationReport.load(run / "evaluation.json").written == "preset"


def test_the_preset_stands_beside_the_plan(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--target", "gguf", "--budget", "8bpw", "--output", run, *QUICK)
    outcome = cptquant("quantize", folder, *flags)
    assert outcome.code == 0, outcome.err
    guard = EvaluationReport.load(run / "evaluation.json").guard
    assert "at no more bytes" in guard and "llama.cpp's Q" in guard
    if (run / "plan-preset.json").exists():
        assert (run / "manifest-preset.json").exists() and "Types of llama.cpp" in (run / "report.html").read_text()
    else:
        assert "was not quantized: its predicted damage" in guard


def test_other_targets_have_no_presets(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    outcome = cptquant("quantize", folder, "--budget", "9bpw", "--output", tmp_path / "run", "--baselines", "preset")
    assert outcome.code == 2
    assert "--baselines preset compares with llama.cpp's types, and --target transformers is another" in outcome.err
    assert not (tmp_path / "run").exists()
