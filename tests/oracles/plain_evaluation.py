"""Slow, readable references for evaluation: the whole Hugging Face model at once, loops over positions in float64."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cptquant.models.load import LoadedModel


def substituted(model: LoadedModel, weight: Callable[[str], Tensor | None]) -> nn.Module:
    """A float32 copy of the whole model with some sites' weights replaced."""
    module = copy.deepcopy(model.module).float().eval()
    shared = model.layout.shared_head
    if shared is not None:  # the two halves of a shared matrix may get different weights
        head = module.get_submodule(shared[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for site in model.layout.sites:
            replacement = weight(site.name)
            if replacement is not None:
                stored = replacement.t() if site.transposed else replacement
                module.get_submodule(site.name).weight.copy_(stored)
    return module


def run(module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits, or the last hidden state of a bare encoder."""
    with torch.no_grad():
        output = module(input_ids=input_ids, attention_mask=attention_mask)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def log_probabilities(
    logits: Tensor,  # (V,)
) -> list[float]:
    values = logits.double().tolist()
    top = max(values)
    log_sum = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - log_sum for value in values]


def nll_nats(
    logits: Tensor,  # (V,)
    target: int,
) -> float:
    return -log_probabilities(logits)[target]


def kl_nats(
    reference: Tensor,  # (V,)
    logits: Tensor,  # (V,)
) -> float:
    pairs = zip(log_probabilities(reference), log_probabilities(logits), strict=True)
    return sum(math.exp(p) * (p - q) for p, q in pairs)
