"""Own text in a run: written once, read by all that quantizes, said in records; baselines that are not learned."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from cptquant.core.evaluation import EvaluationReport
from cptquant.core.manifest import Manifest
from cptquant.core.settings import RunSettings
from cptquant.models.load import read_layout
from cptquant.quantizers import methods
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.stages import variants

QUICK = ("--calibration-sequences", 4, "--eval-sequences", 8, "--sequence-length", 32)
BUDGET = "3bpw@sites"


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.QUANTIZERS, "kl-rounding", replace(KlRounding(), steps=6))


def enlarge_weights(folder: Path) -> None:
    """So that bits matter on an untrained model."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("weight") and ".layers." in name and tensors[name].dim() == 2:
            tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_is_written_once_and_again_if_damaged(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--budget", BUDGET, "--output", run, *QUICK, "--own-text", 6)
    assert cptquant("quantize", folder, *flags).code == 0
    (text,) = (run / "work").glob("own-text-*.safetensors")
    written, stamp = load_file(text)["input_ids"].clone(), text.stat().st_mtime_ns
    manifest = Manifest.load(run / "manifest.json")
    assert manifest.quantizer == "gptq + own text"
    assert manifest.settings["calibration"].endswith(
        "4 windows of 32 tokens, and 6 windows of 32 tokens the model wrote itself"
    )
    assert not (run / "forecast.json").exists()
    checkpoint = (run / "checkpoint/model.safetensors").read_bytes()

    assert cptquant("quantize", folder, *flags).code == 0
    assert text.stat().st_mtime_ns == stamp
    text.write_bytes(text.read_bytes()[:-9])
    outcome = cptquant("quantize", folder, *flags)
    assert outcome.code == 0 and "was cut short or changed after it was written" in outcome.err
    assert torch.equal(load_file(text)["input_ids"], written)
    for hostile in ({"input_ids": written.bfloat16()}, {"input_ids": written[:2]}, {"other": written}):
        save_file(hostile, text)  # whole, and not what was written; no metadata
        outcome = cptquant("quantize", folder, *flags)
        assert outcome.code == 0 and "was cut short or changed after it was written" in outcome.err
        assert torch.equal(load_file(text)["input_ids"], written)
    assert (run / "checkpoint/model.safetensors").read_bytes() == checkpoint

    assert cptquant("quantize", folder, *flags[:-1], 0).code == 0
    assert Manifest.load(run / "manifest.json").quantizer == "gptq"
    assert (run / "forecast.json").exists()


def test_refusals(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    def refused(model: Path, *flags: object) -> str:
        outcome = cptquant(
            "quantize", model, "--budget", BUDGET, "--output", tmp_path / f"run-{model.name}", *QUICK, *flags
        )
        assert outcome.code == 2
        return " ".join(outcome.err.split())

    for count in (-1, 65_537):
        told = f"--own-text {count} is out of range; give the number of sequences, 0 (none) to 65536"
        assert told in refused(folder, "--own-text", count)
    told = refused(folder, "--own-text", 5, "--quantizer", "rtn")
    assert "--own-text 5: --quantizer rtn reads no text; leave the flag out" in told
    config = hf.BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    hf.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).write_bytes((folder / name).read_bytes())
    assert "is for masked_lm, and only causal language models write text" in refused(tmp_path / "bert", "--own-text", 5)


def test_defaults(folder: Path) -> None:
    layout = read_layout(folder)
    for quantizer, own, expected, name in (
        ("gptq", None, 0, "gptq"), ("gptq", 7, 7, "gptq + own text"), ("signround", None, 0, "signround"),
        ("kl-rounding", None, 768, "kl-rounding + own text"), ("kl-rounding", 0, 0, "kl-rounding"),
        ("rtn", 0, 0, "rtn"),
    ):  # fmt: skip
        settings = RunSettings(model="m", quantizer=quantizer, own_text=own)
        assert settings.own_text_for(layout) == expected and settings.carried_out_with(layout) == name


def test_a_baseline_far_behind_is_not_learned(cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch) -> None:
    enlarge_weights(folder)
    flags = (
        "--budget",
        BUDGET,
        *QUICK,
        "--own-text",
        6,
        "--quantizer",
        "kl-rounding",
        "--baselines",
        "uniform",
        "--json",
    )
    reports: dict[float, EvaluationReport] = {}
    for limit in (1e-9, 1e9):
        monkeypatch.setattr(variants, "HOPELESS", limit)
        run = tmp_path / f"run{limit:g}"
        outcome = cptquant("quantize", folder, "--output", run, *flags)
        assert outcome.code == 0, outcome.err
        reports[limit] = EvaluationReport.load(run / "evaluation.json")
        uniform = Manifest.load(run / "manifest-uniform.json")
        assert uniform.quantizer == ("gptq + own text" if limit < 1 else "kl-rounding + own text")
        assert any(record.learning for record in uniform.sites) == (limit > 1)
        assert Manifest.load(run / "manifest.json").quantizer == "kl-rounding + own text"
        told = "uniform bits were not learned: after GPTQ their kl_nats_per_token on validation text is"
        assert (told in reports[limit].guard) == (limit < 1)
        assert json.loads(outcome.out)["guard"] == reports[limit].guard
        assert "report" in (run / "report.html").read_text()
    before, after = (reports[limit].find("kl_nats_per_token", "quantized") for limit in reports)
    assert before is not None and after is not None and before.value == after.value


def test_fast_is_what_its_flags_say(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    assert (
        cptquant("quantize", folder, "--budget", "10bpw", "--output", tmp_path / "run", "--fast", *QUICK[:2]).code == 0
    )
    settings = RunSettings.load(tmp_path / "run/settings.json")
    assert (settings.calibration_sequences, settings.eval_sequences) == (4, 32)  # the first was given
    assert settings.baselines == ("uniform",) and settings.predict is False
    assert not (tmp_path / "run/forecast.json").exists() and not (tmp_path / "run/plan-random.json").exists()
