"""`quantize --target gguf` end to end on a small model."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from cptquant import read_layout
from cptquant.core.engine_export import ExportRecord
from cptquant.core.engine_memory import predict_memory
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.engines import llamacpp_python

QUICK = (
    "--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--baselines", "uniform",
    "--own-text", 0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(llamacpp_python.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(llamacpp_python, "find_spec", lambda name: None)


def test_the_whole_chain_writes_a_file_and_its_check(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--target", "gguf", "--budget", "6bpw", "--output", run, *QUICK)
    assert outcome.code == 0, outcome.err
    plan = Plan.load(run / "plan.json")
    tensors = gguf.GGUFReader(run / "checkpoint" / "model.gguf").tensors
    written = json.loads((run / "checkpoint.json").read_text())["tensor_bytes"]
    assert sum(int(tensor.n_bytes) for tensor in tensors) == written
    assert plan.size_bytes <= plan.limit_bytes and plan.target == "gguf"
    assert any("_K was asked for, Q" in note for note in plan.notes), plan.notes  # rows of 64: no K type
    report = ExportRecord.load(run / "export/gguf/export.json")
    assert report.comparisons == () and report.engine.startswith(
        "not run: llama-cpp-python is not installed; pip install"
    )
    assert {site.largest_error for site in report.round_trip} == {0.0}
    page = (run / "report.html").read_text()
    assert "The engine check was not run: llama-cpp-python is not installed; pip install" in page
    shown = cptquant("export", run)
    assert shown.code == 0 and "engine     not run: llama-cpp-python is not installed" in shown.out
    illegal = cptquant("export", run, "--target", "vllm")
    assert illegal.code == 2 and "was made for --target gguf and is illegal under --target vllm:\n  " in illegal.err
    assert illegal.err.count("nearest legal format: ") > 1 and "--target vllm, or edit plan.json" in illegal.err
    assert not (run / "export/vllm").exists()
    again = cptquant("quantize", folder, "--target", "gguf", "--budget", "6bpw", "--output", run, *QUICK)
    assert again.code == 0, again.err


def test_a_model_that_the_engine_cannot_run_is_refused_at_once(cptquant: Callable, tmp_path: Path) -> None:
    outcome = cptquant(
        "quantize", "embedded:bert-mini", "--target", "gguf", "--budget", "6bpw", "--output", tmp_path / "run"
    )
    assert outcome.code == 2
    assert "llama.cpp runs bert for embeddings (a bare BertModel), this model is for sequence_class" in outcome.err
    assert not (tmp_path / "run" / "sensitivity.json").exists()


def test_an_engine_that_was_named_and_is_not_there_is_refused_before_anything_is_measured(
    cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(llamacpp_python.PYTHON_VARIABLE, "/nonexistent/python")
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--target", "gguf", "--budget", "6bpw", "--output", run, *QUICK)
    assert outcome.code == 2
    assert "CPTQUANT_LLAMACPP_PYTHON=/nonexistent/python is no program that runs; name a Python" in outcome.err
    assert not (run / "sensitivity.json").exists()


def test_memory_is_a_budget(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    common = ("quantize", folder, "--target", "gguf", "--output", tmp_path / "run")
    outcome = cptquant(*common, "--memory", "1MB", "--context", 32)
    assert outcome.code == 2 and "--memory 1MB leaves nothing for the weights" in outcome.err
    assert "raise --memory or lower --context" in outcome.err
    outcome = cptquant(*common, "--memory", "1GB", "--context", 65)
    assert outcome.code == 2 and "--context 65 is outside the model's range of 2 to 64 tokens" in outcome.err
    outcome = cptquant(*common, "--memory", "garbage")
    assert outcome.code == 2 and "--memory 'garbage' is not readable; write it as 2GB, 512MB or 1.5GiB" in outcome.err
    outcome = cptquant(*common, "--memory", "1GB", "--budget", "4bpw")
    assert outcome.code == 2 and "--budget and --memory were both given" in outcome.err
    outcome = cptquant(*common[:2], *common[4:], "--memory", "1GB")
    assert outcome.code == 2 and "--memory 1GB needs a target whose engine's memory is known: gguf, onnx" in outcome.err
    assert not list((tmp_path / "run").glob("sensitivity*")), "compute was spent before the limit was refused"


def test_a_memory_limit_that_binds(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """Memory for about 5 bits a weight: no width everywhere fits but the narrowest, and the plan mixes them."""
    layout = read_layout(str(folder))
    uniform = {
        bits: predict_memory(layout, "gguf", _everywhere(layout, name), 48).predicted_bytes
        for bits, name in ((4, "Q4_0"), (8, "Q8_0"))
    }
    limit = uniform[4] + (uniform[8] - uniform[4]) // 4
    run = tmp_path / "run"
    common = ("quantize", folder, "--target", "gguf", "--context", 48, "--output", run)
    outcome = cptquant(*common, "--memory", f"{limit}B", *QUICK)
    assert outcome.code == 0, outcome.err
    plan, record = Plan.load(run / "plan.json"), ExportRecord.load(run / "export/gguf/export.json")
    used = predict_memory(layout, "gguf", plan.quant_formats, 48).predicted_bytes
    assert uniform[4] < used <= limit < uniform[8]
    assert len({name for name in plan.formats.values()}) > 1
    assert plan.budget.startswith(f"{limit}B (less 24,576 bytes of keys and values at 48 tokens, ")
    assert record.memory is not None and record.memory.limit_bytes == limit and record.memory.context == 48
    smallest = predict_memory(layout, "gguf", _everywhere(layout, "Q4_0"), 48).predicted_bytes - 60_000
    refused = cptquant(*common[:-1], tmp_path / "small", "--memory", f"{smallest}B", "--formats", "Q4_0,Q8_0", *QUICK)
    assert refused.code == 2
    assert f"--memory {smallest}B (less" in refused.err and "too few; reachable for the whole file" in refused.err
    assert "raise --memory, or offer narrower --formats" in refused.err
    assert not (tmp_path / "small" / "sensitivity.json").exists()


def test_flags_that_are_refused_are_not_kept(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cptquant("inspect", folder, "--output", run).code == 0
    allocate = ("allocate", run, "--target", "gguf", "--allocator", "uniform")
    assert cptquant(*allocate, "--budget", "9bpw").code == 0
    before = (run / "settings.json").read_bytes()
    for flags, message in (
        (("--memory", "1GB", "--context", 99), "--context 99 is outside the model's range of 2 to 64 tokens"),
        (("--memory", "lots"), "--memory 'lots' is not readable"),
        (("--budget", "lots"), "--budget 'lots' is not readable"),
        (("--budget", "9bpw", "--memory", "1GB"), "--budget and --memory were both given"),
    ):
        outcome = cptquant(*allocate, *flags)
        assert outcome.code == 2 and message in outcome.err
        assert (run / "settings.json").read_bytes() == before
    limit = predict_memory(read_layout(str(folder)), "gguf", {}, 64).predicted_bytes - 50_000
    assert cptquant(*allocate, "--memory", f"{limit}B").code == 0  # takes the place of --budget
    assert Plan.load(run / "plan.json").budget.startswith(f"{limit}B (less")
    assert cptquant(*allocate, "--budget", "9bpw").code == 0
    assert Plan.load(run / "plan.json").budget == "9bpw"


def _everywhere(layout: ModelLayout, name: str) -> dict[str, QuantFormat]:
    return {site.name: QuantFormat.parse(name) for site in layout.sites}


def test_a_peak_above_the_limit_is_said(
    cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    done = cptquant("quantize", folder, "--target", "gguf", "--budget", "6bpw", "--output", run, *QUICK)
    assert done.code == 0 and "warning:" not in done.err
    path = run / "export/gguf/export.json"
    record = ExportRecord.load(path)
    assert record.memory is not None
    for peak, warned in ((90_000_000, False), (90_000_123, True)):
        memory = record.memory.model_copy(update={"measured_bytes": peak, "limit_bytes": 90_000_000})
        record.model_copy(update={"memory": memory}).save(path)
        outcome = cptquant("export", run)
        assert outcome.code == 0, outcome.err
        assert ("is 123 above --memory (90,000,000); lower --memory by as much and quantize" in outcome.err) is warned


def test_targets_are_listed(cptquant: Callable) -> None:
    outcome = cptquant("targets", "--json")
    rows = {row["target"]: row for row in json.loads(outcome.out)}
    assert outcome.code == 0 and {"transformers", "transformers-fused", "gguf"} <= set(rows)
    assert rows["gguf"]["formats"]["Q4_K"] == 4.5
    assert "gguf: GGUF, read by llama.cpp" in cptquant("targets").out
