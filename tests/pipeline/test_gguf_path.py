"""`quantize --target gguf` end to end on a small model."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from cptquant.core.engine_export import ExportRecord
from cptquant.core.plan import Plan
from cptquant.engines import llamacpp_python

QUICK = ("--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--baselines", "uniform")


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
    outcome = cptquant(*common, "--memory", "1GB", "--context", 65)
    assert outcome.code == 2 and "--context 65 is outside the model's range of 1 to 64 tokens" in outcome.err
    outcome = cptquant(*common, "--memory", "1GB", "--budget", "4bpw")
    assert outcome.code == 2 and "--budget and --memory were both given" in outcome.err


def test_targets_are_listed(cptquant: Callable) -> None:
    outcome = cptquant("targets", "--json")
    rows = {row["target"]: row for row in json.loads(outcome.out)}
    assert outcome.code == 0 and {"transformers", "transformers-fused", "gguf"} <= set(rows)
    assert rows["gguf"]["formats"]["Q4_K"] == 4.5
    assert "gguf: GGUF, read by llama.cpp" in cptquant("targets").out
