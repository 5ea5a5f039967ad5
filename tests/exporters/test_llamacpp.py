"""What llama.cpp itself makes of our files; skipped where llama-cpp-python is not installed."""

import json
from dataclasses import replace

import pytest
import torch
from engines_models.llamacpp_here import needs_llamacpp
from gguf_toys import TOYS, quantize_toy, save_toy, train_sentencepiece, train_wordpiece

from cptquant.core.errors import EngineError
from cptquant.exporters.gguf.write import write_gguf
from cptquant.models.text import TokenSet
from cptquant.stages.engine_check import Written, check_files, compare_files, compare_token_ids

pytestmark = [pytest.mark.engines, needs_llamacpp]


def random_tokens(model, sequences=3, length=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.layout.vocabulary_size, (sequences, length), generator=generator)
    mask = torch.ones_like(ids)
    if model.layout.task == "encoder":
        mask[0, 15:] = 0  # padding
    return TokenSet.build(ids, mask, None, torch.arange(sequences), "random tokens")


def write(toy, folder) -> Written:
    write_gguf(toy.model, toy.plan, toy.shards, folder)
    return Written(toy.model, toy.plan, toy.shards, folder / "model.gguf")


@pytest.mark.parametrize("name", TOYS)
def test_the_engine_computes_what_our_model_does(name, quantized, tmp_path):
    toy = quantized(name)
    comparisons, version = compare_files(write(toy, tmp_path / "checkpoint"), random_tokens(toy.model))
    exact, rounded, alone = comparisons
    assert version.startswith("llama-cpp-python ")
    assert (exact.arithmetic, rounded.arithmetic) == ("float activations", "int8 activations")
    assert exact.bound == 1e-3 and rounded.bound is None
    assert exact.distance < (1e-4 if name in ("bert", "gpt_neox") else 1e-5)
    assert (alone.arithmetic, alone.weights) == ("16-bit activations", "original") and alone.bound is None
    assert 0 < alone.distance < rounded.distance
    assert 0 < rounded.distance < 0.05 and exact.distance < rounded.distance
    assert exact.stderr is not None and rounded.stderr is not None and 0 < exact.stderr < 1e-4
    if name == "bert":
        assert exact.kl_nats is None and exact.n == 3 and exact.cosine_lowest > 0.9999
        assert rounded.cosine > 0.95 and rounded.cosine_lowest <= rounded.cosine
    else:
        assert exact.top1_agreement > 0.98 and exact.n == 3 * 23


def test_text_longer_than_the_file_allows_is_cut(quantized, tmp_path):
    toy = quantized("mistral")  # 64 positions, a window of 48
    comparisons, _ = compare_files(write(toy, tmp_path / "checkpoint"), random_tokens(toy.model, 2, 60))
    assert comparisons[0].n == 2 * 47 and comparisons[0].kl_nats < 1e-5


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "wordpiece"])
def test_token_ids_are_hugging_faces_on_mixed_text(kind, tmp_path):
    name = "bert" if kind == "wordpiece" else "llama"
    source = save_toy(name, tmp_path / "model")
    if kind != "byte-level":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (source / file).unlink()
        (train_sentencepiece() if kind == "sentencepiece" else train_wordpiece()).save_pretrained(source)
    toy = quantize_toy(source, tmp_path / "work", ("Q8_0",))
    assert compare_token_ids(toy.model, write(toy, tmp_path / "checkpoint").entry) == ("", "")


def test_what_llamacpps_wordpiece_loses_is_stated_and_does_not_fail(tmp_path):
    """A vocabulary with jamo, as BERT's own has: llama.cpp keeps the first of a syllable."""
    source = save_toy("bert", tmp_path / "model")
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary, jamo = content["model"]["vocab"], [chr(code) for code in (0x110B, 0x1161, 0x11AB)]
    longest = [token for token in vocabulary if len(token) > 6 and token.isalpha()]
    for token, replaced in zip((jamo[0], f"##{jamo[1]}", f"##{jamo[2]}"), longest, strict=False):
        vocabulary[token] = vocabulary.pop(replaced)
    file.write_text(json.dumps(content))
    toy = quantize_toy(source, tmp_path / "work", ("Q8_0",))
    tokenizer = toy.model.require_tokenizer()
    assert len(tokenizer.encode("안")) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cptquant.stages.engine_check._DECOMPOSED", ("안 ",))
        checked = check_files(write(toy, tmp_path / "checkpoint"), random_tokens(toy.model))
    assert checked.tokens_equal is True
    assert checked.tokens_note.startswith("the engine's tokenizer cuts '안' unlike Hugging Face's: first at position 2")


def test_other_token_ids_fail_the_export_with_text_and_position(quantized, tmp_path):
    toy = quantized("llama")
    written = write(toy, tmp_path / "checkpoint")
    other = replace(written, model=replace(toy.model, tokenizer=train_sentencepiece()))
    with pytest.raises(EngineError) as caught:
        check_files(other, random_tokens(toy.model))
    line = "<html>&amp;</html> don't WE'LL 00 3.0e-7"
    ours = train_sentencepiece().encode(line)[:8]
    message = str(caught.value)
    assert (
        f"the engine's tokenizer cuts \"{line}\" unlike Hugging Face's: first at position 0, where it gives ["
        in message
    )
    assert message.endswith(f"and Hugging Face {ours}; the files are kept for a look, do not use them")
    assert "nats" not in message and "computes something else" not in message
    assert written.entry.exists()


def test_a_wrong_graph_fails_above_the_bound(quantized, tmp_path, monkeypatch):
    toy = quantized("llama")
    written = write(toy, tmp_path / "checkpoint")
    monkeypatch.setattr("cptquant.exporters.gguf.metadata._rope", lambda config: {"rope_theta": 77.0})
    with pytest.raises(EngineError, match=r"\(float activations: .* nats, allowed 0\.001\); every quantized tensor "):
        check_files(written, random_tokens(toy.model))
    assert written.entry.exists()


def test_weights_that_are_no_numbers_fail_in_an_encoder_and_a_decoder(quantized, tmp_path, monkeypatch):
    for name, unit in (("gpt2", "nats"), ("bert", "of 1 - cosine")):
        toy = quantized(name)
        written = write(toy, tmp_path / name)
        width = toy.model.layout.vocabulary_size if name == "gpt2" else toy.model.layout.hidden_size
        monkeypatch.setattr(
            "cptquant.stages.engine_check._read", lambda at, index, w=width: torch.full((24, w), torch.nan)
        )
        with pytest.raises(
            EngineError, match=rf"float activations: nan {unit}, allowed 0\.001; int8 activations: nan "
        ):
            check_files(written, random_tokens(toy.model))


def test_a_file_that_is_no_model_is_refused_with_the_engines_words(quantized, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineError, match=r"^llama\.cpp cannot load .*model\.gguf \(ValueError: .*is the file whole\?"):
        compare_token_ids(quantized("llama").model, tmp_path / "model.gguf")
