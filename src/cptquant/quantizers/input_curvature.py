"""Inverse Hessians of layers' inputs, which turn gradients of codes before a step (kl_rounding.py says why)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.hessian import collect_block_hessians

_SURVEYED = 128
"""Sequences from which the Hessians are taken."""

Inverses = dict[str, Tensor | None]
"""Site -> float32 (in_features, in_features); None where there is none."""


def surveyed(tokens: TokenSet) -> TokenSet:
    """At most `_SURVEYED` sequences, evenly spread."""
    count = tokens.sequence_count
    return tokens.subset(torch.linspace(0, count - 1, min(count, _SURVEYED)).round().long())


def inverse_hessians(
    stream: ModelStream, block: nn.Module, wanted: Sequence[str], *, damping: float, coarse: bool
) -> Inverses:
    """(H + damping * mean diagonal)^-1 of every wanted site's inputs in the block that the stream stands at."""
    modules = site_modules(block, stream.layout, stream.block_index)
    chosen = {name: modules[name] for name in wanted}
    if not chosen:
        return {}
    hessians = collect_block_hessians(stream, block, chosen, coarse=coarse)
    made: Inverses = {}
    found: Inverses = {}
    for name in chosen:
        if hessians.has(name):
            leader = hessians.leader[name]
            if leader not in made:
                made[leader] = _damped_inverse(hessians.hessian(leader), damping)
            found[name] = made[leader]
    return found


def _damped_inverse(hessian: Tensor, damping: float) -> Tensor | None:
    """None where the Hessian is not finite or has no live input: such a site is moved by its plain gradient."""
    mean = float(hessian.diagonal().mean())
    if not math.isfinite(mean) or mean <= 0:
        return None
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean)
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else torch.cholesky_inverse(factor)
