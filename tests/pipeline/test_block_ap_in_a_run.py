"""The default quantizer of small language models in a run: what is read, kept, compared, forecast and told."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from laws.planted_ptq import planted_table
from pipeline.test_own_text_in_a_run import enlarge_weights
from safetensors.torch import load_file

from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import PtqForecast
from cptquant.core.manifest import CheckpointRecord, Manifest
from cptquant.core.settings import RunSettings
from cptquant.laws.ptq import fit_observations
from cptquant.reports.forecast_tables import beside_measured
from cptquant.stages import predict, variants
from cptquant.stages.quantize import block_label

FLAGS = ("--budget", "3bpw@sites", "--calibration-sequences", 8, "--eval-sequences", 8, "--sequence-length", 32)


@pytest.fixture(autouse=True)
def _law(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A law that knows the method, whatever the package's own does."""
    law = tmp_path_factory.mktemp("law") / "law.json"
    fit_observations(planted_table(noise=0.1), form="full", source="planted.csv").save(law)
    monkeypatch.setattr(predict, "SHIPPED_LAW", law)
    monkeypatch.setattr("cptquant.laws.ptq.SHIPPED_LAW", law)


@pytest.mark.parametrize("limit", (1e-9, 1e9))
def test_the_default(limit: float, cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(variants, "HOPELESS", limit)
    enlarge_weights(folder)
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--output", run, *FLAGS)
    assert outcome.code == 0, outcome.err
    manifest, uniform = Manifest.load(run / "manifest.json"), Manifest.load(run / "manifest-uniform.json")
    assert manifest.quantizer == "block-ap + own text" and "squared error of the block's output" in str(manifest)
    assert "and 256 windows of 32 tokens the model wrote itself" in manifest.settings["calibration"]
    assert uniform.quantizer == ("gptq" if limit < 1 else "block-ap + own text")
    assert ("the model wrote itself" in uniform.settings["calibration"]) == (limit > 1)
    evaluation, forecast = EvaluationReport.load(run / "evaluation.json"), PtqForecast.load(run / "forecast.json")
    assert evaluation.unlearned == (("uniform",) if limit < 1 else ())
    assert {row.method for row in forecast.rows} == {"block-ap + own text"}
    assert {row.plan for row in forecast.rows} == {"quantized", "uniform"}
    compared = {row[0] for row in beside_measured(forecast, evaluation)}
    assert ("uniform" in compared) == (limit > 1)
    page = (run / "report.html").read_text()
    assert "<h4>Relative output error" not in page  # of no block is it known any more
    assert "BLOCK-AP + OWN TEXT" in page and "block 1, after GPTQ: " in page and "block 1, trained: " in page
    assert RunSettings.load(run / "settings.json").own_text_default["block-ap"].sequences == 256
    trained, start = (
        EvaluationReport.load(path / "evaluation.json").find("kl_nats_per_token", "quantized")
        for path in (run, quantized_with_gptq(cptquant, folder, tmp_path / "gptq"))
    )
    assert trained is not None and start is not None and trained.value < start.value


def quantized_with_gptq(cptquant: Callable, folder: Path, run: Path) -> Path:
    flags = ("--quantizer", "gptq", "--own-text", 0, "--baselines", "uniform")
    assert cptquant("quantize", folder, "--output", run, *FLAGS, *flags).code == 0
    return run


def test_a_killed_run_trains_the_rest_with_the_same_bits(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    enlarge_weights(folder)
    flags = (*FLAGS, "--own-text", 6, "--no-predict", "--baselines", "random")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cptquant("quantize", folder, "--output", whole, *flags).code == 0
    shutil.copytree(whole, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "checkpoint")
    found = Manifest.load(whole / "manifest.json")
    trained = cut / "work" / CheckpointRecord.load(whole / "checkpoint.json").inputs["pieces"]
    kept = {path.name: path.stat().st_mtime_ns for path in trained.glob(f"{block_label(0)}*")}
    for label in (block_label(1), block_label(None)):
        for path in trained.glob(f"{label}*"):
            path.unlink()
    outcome = cptquant("quantize", folder, "--output", cut, *flags)
    assert outcome.code == 0, outcome.err
    assert kept and {path.name: path.stat().st_mtime_ns for path in trained.glob(f"{block_label(0)}*")} == kept
    assert Manifest.load(cut / "manifest.json").sites == found.sites
    one, other = (load_file(run / "checkpoint/model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_begun_with_gptq_goes_on_with_it(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = (*FLAGS, "--own-text", 0, "--baselines", "uniform")
    assert cptquant("quantize", folder, "--output", run, *flags, "--quantizer", "gptq").code == 0
    checkpoint = (run / "checkpoint/model.safetensors").read_bytes()
    outcome = cptquant("quantize", folder, "--output", run, *flags)
    assert outcome.code == 0 and "this run was begun with --quantizer gptq and goes on with it" in outcome.err
    assert (run / "checkpoint/model.safetensors").read_bytes() == checkpoint
    outcome = cptquant("quantize", folder, "--output", run, *flags, "--quantizer", "block-ap")
    assert outcome.code == 0 and "goes on with it" not in outcome.err
    assert Manifest.load(run / "manifest.json").quantizer == "block-ap"
    assert not (run / "forecast.json").exists()  # the law knows it with own text
