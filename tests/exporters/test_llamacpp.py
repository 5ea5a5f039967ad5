"""What llama.cpp itself makes of our files; skipped where llama-cpp-python is not installed."""

import pytest
import torch
from gguf_toys import TOYS, quantize_toy, save_toy, train_sentencepiece, train_wordpiece

from cptquant.core.errors import CptquantError, UserError
from cptquant.exporters.gguf.write import write_gguf
from cptquant.exporters.llamacpp import engine as engines
from cptquant.exporters.llamacpp.check import BOUND_NATS, check_token_ids, compare_in_engine
from cptquant.exporters.llamacpp.engine import find_llamacpp
from cptquant.models.text import TokenSet

needs_engine = pytest.mark.skipif(find_llamacpp() is None, reason="llama-cpp-python is not installed")


def random_tokens(model, sequences=3, length=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.layout.vocabulary_size, (sequences, length), generator=generator)
    return TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(sequences), "random tokens")


@needs_engine
@pytest.mark.parametrize("name", TOYS)
def test_the_engine_computes_what_our_model_does(name, quantized, tmp_path):
    toy = quantized(name)
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.gguf"
    dequantized, file = compare_in_engine(
        find_llamacpp(), path, toy.model, toy.plan, toy.shards, random_tokens(toy.model)
    )
    assert dequantized.kl_nats_per_token < (1e-4 if name in ("bert", "gpt_neox") else 1e-5) < BOUND_NATS
    assert file.kl_nats_per_token < 0.05
    if name != "bert":
        assert dequantized.top1_agreement > 0.98 and dequantized.n == 72


@needs_engine
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "wordpiece"])
def test_token_ids_are_hugging_faces_on_mixed_text(kind, tmp_path):
    name = "bert" if kind == "wordpiece" else "llama"
    source = save_toy(name, tmp_path / "model")
    if kind != "byte-level":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (source / file).unlink()
        (train_sentencepiece() if kind == "sentencepiece" else train_wordpiece()).save_pretrained(source)
    toy = quantize_toy(source, tmp_path / "work", ("Q8_0",))
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    assert check_token_ids(find_llamacpp(), tmp_path / "checkpoint" / "model.gguf", toy.model)


@needs_engine
def test_a_wrong_graph_fails_above_the_bound(quantized, tmp_path, monkeypatch):
    toy = quantized("llama")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    monkeypatch.setattr("cptquant.exporters.gguf.metadata._rope", lambda config: {"rope_theta": 77.0})
    with pytest.raises(CptquantError, match=r"nats per token, at most 0\.001 is allowed; every tensor of the file is"):
        compare_in_engine(
            find_llamacpp(), tmp_path / "checkpoint" / "model.gguf", toy.model, toy.plan, toy.shards,
            random_tokens(toy.model),
        )  # fmt: skip


@needs_engine
def test_a_file_that_is_no_model_is_an_error_of_ours_with_the_engines_words(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CptquantError, match=r"llama\.cpp \(llama-cpp-python .*\) failed on "):
        find_llamacpp().tokenize(tmp_path / "model.gguf", ["a"], special=True)


def test_an_interpreter_without_the_engine_is_named(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv(engines.PYTHON_VARIABLE, str(python))
    with pytest.raises(UserError, match="has no llama-cpp-python that can be imported; pip install"):
        find_llamacpp()


def test_an_old_engine_is_refused(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.2.90\n")
    python.chmod(0o755)
    monkeypatch.setenv(engines.PYTHON_VARIABLE, str(python))
    with pytest.raises(UserError, match=r"llama-cpp-python 0\.2\.90 is too old, 0\.3\.0 or newer is needed"):
        find_llamacpp()


def test_no_engine_is_no_error(monkeypatch):
    monkeypatch.delenv(engines.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert find_llamacpp() is None
