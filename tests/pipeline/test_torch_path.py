"""`quantize --target torch` with groups of mixed width and with corrections, end to end on a small model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cptquant import load_segmented
from cptquant.core.engine_export import ExportRecord
from cptquant.core.plan import Plan
from cptquant.exporters.segments import read_segments
from cptquant.models.load import load_model
from cptquant.models.segmented import CorrectedLinear, SegmentedLinear
from cptquant.models.stream import write_weight_

QUICK = (
    "--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--baselines", "",
    "--sensitivity", "tdmpq", "--no-predict", "--own-text", 0,
)  # fmt: skip


def test_the_whole_chain_writes_a_folder_that_computes_what_the_pieces_do(
    cptquant: Callable, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    formats = ("--formats", "slim2-g32,slim3-g32,int8-g32", "--budget", "3.6bpw@sites")
    outcome = cptquant("quantize", folder, "--target", "torch", *formats, "--output", run, *QUICK)
    assert outcome.code == 0, outcome.err
    plan = Plan.load(run / "plan.json")
    assert plan.target == "torch" and "slim2-g32" in plan.formats.values() and plan.site_bytes <= plan.limit_bytes
    assert json.loads((run / "checkpoint.json").read_text())["tensor_bytes"] == plan.size_bytes
    report = ExportRecord.load(run / "export/torch/export.json")
    assert {site.largest_error for site in report.round_trip} == {0.0}
    assert [way.kl_nats is not None and way.kl_nats < 1e-6 for way in report.comparisons] == [True]
    _same_as_dequantized(run / "checkpoint", folder)

    shown = cptquant("explain", run)
    assert shown.code == 0 and "slim2-g32" in shown.out
    refused = cptquant("evaluate", run / "checkpoint", "--original", folder)
    assert refused.code == 2 and "was written for --target torch, which only cptquant.load_segmented" in refused.err
    refused = cptquant("generate", run, "--prompt", "The")
    assert refused.code == 2 and "was written for --target torch and holds no checkpoint of transfor" in refused.err
    for target in ("transformers", "gguf"):
        illegal = cptquant("export", run, "--target", target)
        assert illegal.code == 2 and f"and is illegal under --target {target}:\n  " in illegal.err
        assert "nearest legal format: " in illegal.err and ": slim2-g32 is illegal (slim2-g32 " in illegal.err


def test_groups_of_mixed_width_are_not_offered_unasked(cptquant: Callable) -> None:
    offered = {row["target"]: row["formats"] for row in json.loads(cptquant("targets", "--json").out)}["torch"]
    assert "int2-g64" in offered and not any(name.startswith("slim") for name in offered)


@pytest.mark.parametrize(
    ("formats", "mark", "budget"), [("int2-g32-c3,int3-g32-c5", "-c", "3.3"), ("int2-g32-r1,int3-g32-r2", "-r", "3.7")]
)
def test_corrections_are_learned_around_exported_and_recovered(
    formats: str, mark: str, budget: str, cptquant: Callable, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--formats", formats, "--budget", f"{budget}bpw@sites", "--quantizer", "kl-rounding")
    outcome = cptquant("quantize", folder, "--target", "torch", *flags, "--output", run, *QUICK)
    assert outcome.code == 0, outcome.err
    plan = Plan.load(run / "plan.json")
    corrected = {site for site, name in plan.formats.items() if mark in name}
    assert len(corrected) > 4 and plan.site_bytes <= plan.limit_bytes
    assert json.loads((run / "checkpoint.json").read_text())["tensor_bytes"] == plan.size_bytes
    manifest = json.loads((run / "manifest.json").read_text())
    assert "of the codes changed" in json.dumps(manifest) and "no site could be learned" not in json.dumps(manifest)
    assert {site.largest_error for site in ExportRecord.load(run / "export/torch/export.json").round_trip} == {0.0}
    _same_as_dequantized(run / "checkpoint", folder, CorrectedLinear)
    shown = cptquant("explain", run)
    assert shown.code == 0 and formats.partition(",")[0] in shown.out
    generated = cptquant("generate", run, "--engine", "torch", "--prompt", "The", "--tokens", 2)
    assert generated.code == 0, generated.err
    flags = ("--sequences", 8, "--own-text", 0, "--steps", 2, "--batch-sequences", 2)
    outcome = cptquant("recover", run, "--output", tmp_path / "recovered", *flags)
    assert outcome.code == 0, outcome.err
    assert Plan.load(tmp_path / "recovered/plan.json").formats == plan.formats
    _same_as_dequantized(tmp_path / "recovered/checkpoint", folder, CorrectedLinear)


def _same_as_dequantized(checkpoint: Path, original: Path, kind: type = SegmentedLinear) -> None:
    """The packed module against the original's class with every matrix replaced by what the files decode to."""
    packed, expected = load_segmented(checkpoint), load_model(original)
    assert any(isinstance(part, kind) for part in packed.modules())
    with torch.no_grad():
        for parameter in expected.module.parameters():  # what is kept is stored in 16 bits
            parameter.copy_(parameter.to(getattr(torch, expected.layout.storage_dtype)))
    for name, weight in read_segments(checkpoint, expected):
        write_weight_(expected.module.get_submodule(name), expected.layout.site_by_name[name], weight)
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, expected.module(ids).logits, rtol=1e-4, atol=1e-5)
