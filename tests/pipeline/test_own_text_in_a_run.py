"""Own text in a run: written once, read by all that quantizes, said in records; baselines that are not learned."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from laws.planted_ptq import planted_table
from safetensors.torch import load_file, save_file

from cptquant.cli.quantize import FAST, fast_changes
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import PtqForecast
from cptquant.core.manifest import Manifest
from cptquant.core.settings import OWN_TEXT, OwnTextDefault, RunSettings
from cptquant.laws.ptq import fit_observations
from cptquant.models import own_text
from cptquant.models.load import read_layout
from cptquant.quantizers import methods
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.stages import estimate, predict, variants
from cptquant.stages.plan_source import find_plan

QUICK = ("--quantizer", "gptq", "--calibration-sequences", 4, "--eval-sequences", 8, "--sequence-length", 32)
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


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The default and the law that these tests are about, whatever the package's own are."""
    monkeypatch.setitem(OWN_TEXT, "gptq", 256)
    law = tmp_path_factory.mktemp("law") / "law.json"
    fit_observations(planted_table(noise=0.1), form="full", source="planted.csv").save(law)
    monkeypatch.setattr(predict, "SHIPPED_LAW", law)
    monkeypatch.setattr("cptquant.laws.ptq.SHIPPED_LAW", law)


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
        ("gptq", None, 256, "gptq + own text"), ("gptq", 0, 0, "gptq"), ("gptq", 7, 7, "gptq + own text"),
        ("signround", None, 0, "signround"), ("block-ap", None, 256, "block-ap + own text"),
        (None, None, 256, "block-ap + own text"),
        ("kl-rounding", None, 768, "kl-rounding + own text"), ("kl-rounding", 0, 0, "kl-rounding"),
        ("rtn", 0, 0, "rtn"),
    ):  # fmt: skip
        settings = RunSettings(model="m", quantizer=quantizer, own_text=own)
        assert settings.own_text_for(layout) == expected and settings.carried_out_with(layout) == name
    assert RunSettings(model="m").quantizer_for(layout) == "block-ap"
    large, encoder = (layout.model_copy(update=u) for u in ({"parameters": 50_000_000}, {"task": "encoder"}))
    for quantizer, of_large in (("gptq", 0), ("block-ap", 0), ("kl-rounding", 768)):
        settings = RunSettings(model="m", quantizer=quantizer)
        assert settings.own_text_for(large) == of_large and settings.own_text_for(encoder) == 0
        without = settings.settled(quantizer, 0, "why not")
        assert without.own_text_for(layout) == 0 and without.carried_out_with(layout) == quantizer
        assert without.own_text_note(layout) == "why not"
        asked = without.model_copy(update={"own_text": 9})
        assert asked.own_text_for(layout) == 9 and asked.own_text_note(layout) == ""
    assert RunSettings(model="m", own_text=256).own_text_for(large) == 256
    for other in (large, encoder):
        assert RunSettings(model="m").quantizer_for(other) == "gptq"


def test_by_default_it_is_read_and_forecast(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--budget", "10bpw", "--output", run, *QUICK, "--baselines", "uniform")
    assert outcome.code == 0, outcome.err
    manifest, forecast = Manifest.load(run / "manifest.json"), PtqForecast.load(run / "forecast.json")
    assert manifest.quantizer == "gptq + own text" and "own_text" not in manifest.settings
    assert "and 256 windows of 32 tokens the model wrote itself" in manifest.settings["calibration"]
    assert {row.method for row in forecast.rows} == {"gptq + own text"}
    assert "GPTQ + OWN TEXT" in (run / "report.html").read_text()
    assert find_plan(run).quantizer == "gptq + own text"


def test_a_model_that_cannot_write_goes_without_and_says_so(
    cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    def no_cache(*_: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")

    run = tmp_path / "run"
    flags = ("--budget", "10bpw", *QUICK, "--baselines", "uniform")
    with monkeypatch.context() as patched:
        patched.setattr(own_text, "_continue", no_cache)
        outcome = cptquant("quantize", folder, "--output", run, *flags)
    assert outcome.code == 0, outcome.err
    reason = "OPTForCausalLM cannot go on from keys and values kept in a cache (forward() got an unexpected keyword"
    assert "calibrated on the given text alone: " in outcome.err and reason in outcome.err
    settings, manifest = RunSettings.load(run / "settings.json"), Manifest.load(run / "manifest.json")
    assert settings.own_text is None and reason in settings.own_text_note(read_layout(folder))
    assert manifest.quantizer == "gptq" and reason in manifest.settings["own_text"]
    assert {row.method for row in PtqForecast.load(run / "forecast.json").rows} == {"gptq"}
    assert reason.split(" (")[0] in (run / "report.html").read_text()
    checkpoint = (run / "checkpoint/model.safetensors").read_bytes()

    # what was found once holds for the run, so that its bits stay, also where the model can write again
    for again in (("quantize", run), ("quantize", folder, "--output", run, *flags)):
        assert cptquant(*again).code == 0
        assert Manifest.load(run / "manifest.json").quantizer == "gptq"
        assert (run / "checkpoint/model.safetensors").read_bytes() == checkpoint

    monkeypatch.setattr(own_text, "_continue", no_cache)
    swaps = tmp_path / "swaps"  # reads own text as quantizing does, stage by stage too
    wanted = ("--calibration-sequences", 16, "--sequence-length", 32)
    assert cptquant("inspect", folder, "--output", swaps).code == 0
    assert cptquant("measure", swaps, *wanted).code == 0
    outcome = cptquant("allocate", swaps, "--budget", "4bpw@sites", "--refine-swaps", 1)
    assert outcome.code == 0 and "calibrated on the given text alone: " in outcome.err
    assert reason in RunSettings.load(swaps / "settings.json").own_text_note(read_layout(folder))
    refused = cptquant("quantize", folder, "--output", tmp_path / "asked", *flags, "--own-text", 4)
    assert refused.code == 2 and "use --own-text 0, which calibrates on the given text alone" in refused.err
    assert not (tmp_path / "asked/sensitivity.json").exists()  # before compute is spent


def _as_before(run: Path) -> None:
    """settings.json as it was written before own text was a default of GPTQ."""
    settings = json.loads((run / "settings.json").read_text())
    settings["own_text"], settings["quantizer"] = None, "gptq"
    del settings["own_text_default"]
    (run / "settings.json").write_text(json.dumps(settings))


def test_a_run_begun_before_keeps_its_bits(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    flags = ("--budget", "10bpw", *QUICK, "--baselines", "uniform")
    old, told = tmp_path / "old", "this run was begun before GPTQ read own text by default; --own-text 256 adds it"
    assert cptquant("quantize", folder, "--output", old, *flags, "--own-text", 0).code == 0
    manifest, checkpoint = (old / "manifest.json").read_bytes(), (old / "checkpoint/model.safetensors").read_bytes()
    commands = {
        "resumed": lambda run: ("quantize", run),
        "the same command again": lambda run: ("quantize", folder, "--output", run, *flags),
        "evaluated": lambda run: ("evaluate", run),
        "of a killed one": lambda run: ("quantize", run),
    }
    for name, command in commands.items():
        run = tmp_path / name.replace(" ", "-")
        shutil.copytree(old, run)
        _as_before(run)
        assert find_plan(run).quantizer == "gptq"
        if name == "of a killed one":
            for path in run.glob("manifest*.json"):
                path.unlink()
            assert find_plan(run).quantizer == "gptq"
        outcome = cptquant(*command(run))
        assert outcome.code == 0, outcome.err
        assert (run / "checkpoint/model.safetensors").read_bytes() == checkpoint
        assert not list((run / "work").glob("own-text-*"))
        if name != "of a killed one":
            assert (run / "manifest.json").read_bytes() == manifest
        if name != "evaluated":
            assert told in outcome.err and told in RunSettings.load(run / "settings.json").own_text_note(
                read_layout(folder)
            )
            assert {row.method for row in PtqForecast.load(run / "forecast.json").rows} == {"gptq"}

    # asked for, it is added; a run that had quantized nothing yet takes the new default, and keeps it
    assert cptquant("quantize", run, "--own-text", 4).code == 0
    assert Manifest.load(run / "manifest.json").quantizer == "gptq + own text"
    fresh = tmp_path / "fresh"
    shutil.copytree(old, fresh)
    for path in (*fresh.glob("manifest*.json"), *fresh.glob("forecast.json")):
        path.unlink()
    shutil.rmtree(fresh / "work")
    _as_before(fresh)
    for command in ("quantize", "evaluate"):
        assert cptquant(command, fresh).code == 0
        assert Manifest.load(fresh / "manifest.json").quantizer == "gptq + own text"
        assert RunSettings.load(fresh / "settings.json").own_text_default == {"gptq": OwnTextDefault(sequences=256)}


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
        assert uniform.quantizer == ("gptq" if limit < 1 else "kl-rounding + own text")
        assert any(record.learning for record in uniform.sites) == (limit > 1)
        assert Manifest.load(run / "manifest.json").quantizer == "kl-rounding + own text"
        told = "uniform bits were not learned: after GPTQ their kl_nats_per_token on some validation text is"
        assert (told in reports[limit].guard) == (limit < 1)
        assert json.loads(outcome.out)["guard"] == reports[limit].guard
        assert "report" in (run / "report.html").read_text()
    before, after = (reports[limit].find("kl_nats_per_token", "quantized") for limit in reports)
    assert before is not None and after is not None and before.value == after.value


def test_fast_is_what_its_flags_say(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    assert (
        cptquant("quantize", folder, "--budget", "10bpw", "--output", tmp_path / "run", "--fast", *QUICK[2:4]).code == 0
    )
    settings = RunSettings.load(tmp_path / "run/settings.json")
    assert (settings.calibration_sequences, settings.eval_sequences) == (4, 32)  # the first was given
    assert settings.quantizer == "gptq"
    assert settings.baselines == ("uniform",) and settings.predict is False and settings.own_text == 0
    assert not (tmp_path / "run/forecast.json").exists() and not (tmp_path / "run/plan-random.json").exists()
    learned = RunSettings(model=str(folder), quantizer="kl-rounding")
    (tmp_path / "learned").mkdir()
    learned.save(tmp_path / "learned/settings.json")
    for model, flags, own in (
        (str(folder), {}, {"quantizer": "gptq", "own_text": 0}),
        (str(folder), {"quantizer": "kl-rounding"}, {"quantizer": "kl-rounding"}),
        (str(folder), {"quantizer": "block-ap"}, {"quantizer": "block-ap"}),
        (str(tmp_path / "learned"), {}, {"quantizer": "kl-rounding"}),
        (str(tmp_path / "learned"), {"quantizer": "gptq"}, {"quantizer": "gptq", "own_text": 0}),
    ):  # fmt: skip
        assert fast_changes(model, flags) == FAST | own


def test_the_estimate_counts_it(cptquant: Callable, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(estimate, "_measure_flops_per_second", lambda: 1e11)
    flags = ("quantize", folder, "--budget", "4bpw@sites", "--dry-run", "--json")
    default, given = (json.loads(cptquant(*flags, *more).out) for more in ((), ("--own-text", 0)))
    assert default["stage_seconds"]["quantize"] > 1.5 * given["stage_seconds"]["quantize"]
    assert default["stage_seconds"]["measure"] == given["stage_seconds"]["measure"]
