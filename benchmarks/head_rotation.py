"""Rotating each head's values, folded into v and o: exact, since attention only averages values over positions.

    value rows of head h:  W_v[h] <- R' W_v[h],  b_v[h] <- R' b_v[h]        output columns:  W_o[:, h] <- W_o[:, h] R

Holds with and without rotary embeddings (they touch queries and keys only), with biases, and where several heads share
a value head, if all heads have the same R. No engine has to know: shapes, names and plain weights stay. Queries and
keys can be turned together too where nothing lies between projection and product (OPT); a rotary embedding or a norm
there would have to commute with R. Not foldable: the inputs of the second MLP matrix, behind an element-wise
nonlinearity; the residual stream of models with LayerNorm, which subtracts the mean of the unrotated coordinates.
"""

import copy
from typing import Any

import torch
from format_options import rotation
from torch import Tensor, nn

from cptquant.models.load import LoadedModel


def fold_heads(model: LoadedModel, *, seed: int = 0, queries: bool = False) -> nn.Module:
    """A float64 copy with every head's values, and queries and keys, rotated by one Hadamard matrix."""
    module: Any = copy.deepcopy(model.module).double()
    width = model.layout.hidden_size // module.config.num_attention_heads
    turned = rotation(width, width, seed).sign().double() / width**0.5  # orthogonal to float64, not float32 alone
    for site in model.layout.block_sites:
        if site.role == "v" or (queries and site.role in ("q", "k")):
            _turn_rows_(module.get_submodule(site.name), turned)
        elif site.role == "o":
            linear = module.get_submodule(site.name)
            linear.weight.data = _blocks(linear.weight.data, turned)
    return module


def _turn_rows_(linear: Any, turned: Tensor) -> None:
    linear.weight.data = _blocks(linear.weight.data.t(), turned).t().contiguous()
    if linear.bias is not None:
        linear.bias.data = _blocks(linear.bias.data[None], turned)[0]


def _blocks(matrix: Tensor, turned: Tensor) -> Tensor:
    """Columns of each head times R."""
    return (matrix.view(len(matrix), -1, len(turned)) @ turned).view(matrix.shape)


@torch.no_grad()
def largest_logit_change(model: LoadedModel, input_ids: Tensor, *, queries: bool = False) -> tuple[float, float]:
    """max |logit of the folded - logit of the original| in float64, and the largest logit."""
    reference = copy.deepcopy(model.module).double()(input_ids=input_ids).logits
    folded = fold_heads(model, queries=queries)(input_ids=input_ids).logits
    return float((folded - reference).abs().max()), float(reference.abs().max())
