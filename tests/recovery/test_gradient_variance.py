"""Noise of gradients: against variances taken entry by entry, and at its two ends."""

import copy
from pathlib import Path

import pytest
import torch
from quantizers.blocks.toys import Changed, rounded, toy
from quantizers.test_quantize import make_tokens

from cptquant.core.errors import DataError
from cptquant.models.text import TokenSet
from cptquant.recovery.gradient_variance import gradient_variances


def slow_share(module: torch.nn.Module, tokens: TokenSet) -> float:
    """Mean over the blocks of the down projections' r, from the gradients of all batches at once."""
    layers = [block.mlp.down_proj.weight.requires_grad_(True) for block in module.model.layers]
    per_batch = []
    for start in range(0, tokens.sequence_count, 2):
        ids, mask = tokens.input_ids[start : start + 2], tokens.attention_mask[start : start + 2]
        labels = ids.masked_fill(mask == 0, -100)
        loss = module(input_ids=ids, attention_mask=mask, labels=labels).loss
        per_batch.append(torch.autograd.grad(loss, layers))
    shares = []
    for layer in range(len(layers)):
        gradients = torch.stack([batch[layer] for batch in per_batch]).double()
        shares.append(float(gradients.var(dim=0).sum() / gradients.square().mean(dim=0).sum()))
    return sum(shares) / len(shares)


def test_shares_are_those_of_variances_taken_entry_by_entry(tmp_path: Path) -> None:
    model, tokens = toy("llama", tmp_path), make_tokens(sequences=8)
    weights = rounded(model, "int2-g16")
    found = gradient_variances(model, Changed(weights, {}), tokens, batch_sequences=2)
    assert set(found) == {site.name.rpartition(".")[2] for site in model.layout.block_sites}
    assert list(found) == sorted(found, key=lambda kind: -found[kind].ratio)
    assert found["down_proj"].sites == 3
    module = copy.deepcopy(model.module).float()
    assert found["down_proj"].original == pytest.approx(slow_share(module, tokens), rel=1e-4)
    for site in model.layout.block_sites:
        module.get_submodule(site.name).weight.data.copy_(weights[site.name].dequantize())
    assert found["down_proj"].quantized == pytest.approx(slow_share(module, tokens), rel=1e-4)


def test_the_same_batch_again_has_no_noise(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    one = make_tokens(sequences=3).subset([0, 0, 0])
    found = gradient_variances(model, Changed(rounded(model), {}), one, batch_sequences=1)
    assert all(abs(entry.quantized) < 1e-5 and abs(entry.original) < 1e-5 for entry in found.values())


def test_one_batch_is_refused(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    with pytest.raises(DataError, match=r"at least 2 batches of 4 sequences, got 3 sequences"):
        gradient_variances(model, Changed(rounded(model), {}), make_tokens(sequences=3), batch_sequences=4)
