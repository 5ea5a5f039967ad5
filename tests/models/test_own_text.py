"""Text a model writes itself: exactly what sampling without a cache gives, from the person's own beginnings."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from cptquant.core.errors import ModelError
from cptquant.models import own_text
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.own_text import NO_DOCUMENT, OwnTextError, join_texts, write_own_text
from cptquant.models.text import TokenSet

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64),
    "mistral-sliding": lambda: hf.MistralConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, sliding_window=6
    ),
    "opt": lambda: hf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "gpt2": lambda: hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def make(name: str, folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():  # random models are otherwise almost indifferent to what they read
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    return load_model(str(folder))


def make_text(length: int = 20) -> TokenSet:
    ids = torch.randint(5, 60, (4, length), generator=torch.Generator().manual_seed(3))
    return TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(4), "four windows")


@torch.no_grad()
def slowly(model: LoadedModel, text: TokenSet, sequences: int, seed: int) -> torch.Tensor:
    """Every token from a pass over all tokens before it; the same draws in the same order."""
    generator = torch.Generator().manual_seed(seed)
    length = text.input_ids.shape[1]
    rows = torch.randint(4, (sequences,), generator=generator)
    starts = torch.randint(length - 8 + 1, (sequences,), generator=generator)
    ids = torch.stack([text.input_ids[row, start : start + 8] for row, start in zip(rows, starts, strict=True)])
    while ids.shape[1] < length:
        chances = model.module(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1).cumsum(-1)
        places = torch.rand(sequences, 1, generator=generator) * chances[:, -1:]
        ids = torch.cat([ids, (chances <= places).sum(dim=1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_sampling_without_a_cache_gives(name: str, tmp_path: Path) -> None:
    model, text = make(name, tmp_path), make_text()
    written = write_own_text(model, text, 5, seed=7)
    assert torch.equal(written.input_ids, slowly(model, text, 5, 7))
    assert written.attention_mask.all() and (written.documents == NO_DOCUMENT).all() and written.labels is None
    assert written.description == "5 windows of 20 tokens the model wrote itself"
    assert len({tuple(row.tolist()) for row in written.input_ids}) == 5


def test_the_seed_decides_and_batches_show_their_progress(tmp_path: Path, monkeypatch) -> None:
    model, text = make("llama", tmp_path), make_text()
    monkeypatch.setattr(own_text, "_LARGEST_BATCH", 2)
    seen: list[tuple[int, int]] = []
    one = write_own_text(model, text, 3, seed=1, progress=lambda *step: seen.append(step))
    assert seen == [(step, 24) for step in range(1, 25)]
    assert one.digest == write_own_text(model, text, 3, seed=1).digest
    assert one.digest != write_own_text(model, text, 3, seed=2).digest
    both = join_texts(text, one)
    assert both.sequence_count == 7 and torch.equal(both.input_ids[4:], one.input_ids)
    assert both.description == "four windows, and 3 windows of 20 tokens the model wrote itself"


def test_frequencies_are_the_models(tmp_path: Path) -> None:
    """The first written token of 4,000 copies of one prompt, against the model's probabilities: a chi-square."""
    model = make("llama", tmp_path)
    ids = torch.randint(5, 60, (1, 9), generator=torch.Generator().manual_seed(3))
    text = TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(1), "one window")
    written = write_own_text(model, text, 8000, seed=0).input_ids
    mine = written[(written[:, :8] == ids[:, :8]).all(dim=1), 8]
    with torch.no_grad():
        chances = model.module(input_ids=ids[:, :8]).logits[0, -1].softmax(-1)
    expected = chances * len(mine)
    counts = torch.bincount(mine, minlength=60)
    usual = expected > 5
    chi_square = float(((counts - expected)[usual] ** 2 / expected[usual]).sum())
    assert len(mine) > 3500 and usual.sum() >= 3 and chi_square < 2.5 * int(usual.sum())


def test_refusals(tmp_path: Path) -> None:
    encoder = hf.BertModel(hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64))
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match="is for encoder; only causal language models write text"):
        write_own_text(load_model(str(tmp_path / "encoder")), make_text(), 2, seed=0)
    model = make("llama", tmp_path / "llama")
    model.module.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(OwnTextError, match=r"overflows while it writes calibration text; use --own-text 0"):
        write_own_text(model, make_text(), 2, seed=0)


@pytest.mark.parametrize("fault", ("ignores the cache", "takes none"))
def test_a_model_that_does_not_go_on_from_a_cache_is_refused(fault: str, tmp_path: Path, monkeypatch) -> None:
    model = make("llama", tmp_path)
    forward = model.module.forward

    def without(input_ids: torch.Tensor, past_key_values: object = None, **others: object) -> object:
        if fault == "takes none" and past_key_values is not None:
            raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")
        return forward(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model.module, "forward", without)
    reason = "unexpected keyword" if fault == "takes none" else "nats from those made without a cache"
    told = f"LlamaForCausalLM cannot go on from keys and values kept in a cache .*{reason}.*use --own-text 0"
    with pytest.raises(OwnTextError, match=told):
        write_own_text(model, make_text(), 5, seed=0)
