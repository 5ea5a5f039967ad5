"""Which kind of layer has the noisiest gradients once it is quantized: what KD-QAT freezes (arXiv 2403.18159).

The paper finds the variance of the gradient under low bits largest in the value and output projections of LLaMA-2 and
freezes these two ("ov-freeze"). We have its abstract, not its formula. Ours, with g_b the gradient of batch b's
cross-entropy with respect to a site's weight as it is used,

    r = sum_ij Var_b(g_ij) / sum_ij Mean_b(g_ij^2)      near 0: every batch pulls the same way; 1: nothing but noise

with unbiased variances, at the quantized model and at the original: what quantization adds is their ratio.

A diagnostic: whether freezing what it names helps is for held-out text to say.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptquant.core.errors import DataError
from cptquant.models.load import LoadedModel
from cptquant.models.losses import IGNORED, scored_targets
from cptquant.models.stream import WeightSource, kept_of, write_weight_
from cptquant.models.text import TokenSet

_TINY = 1e-30


@dataclass(frozen=True)
class GradientVariance:
    """Of one kind of layer, e.g. `v_proj`: means over its sites.

    Attributes:
        quantized, original: r above. sites: how many.
    """

    quantized: float
    original: float
    sites: int

    @property
    def ratio(self) -> float:
        """How much noisier quantization makes the gradient."""
        return self.quantized / max(self.original, _TINY)


def gradient_variances(
    model: LoadedModel, weights: WeightSource, tokens: TokenSet, *, batch_sequences: int = 2
) -> dict[str, GradientVariance]:
    """Kind of layer (the last part of its name) -> noise of its gradient, noisiest by ratio first.

    Sites that are not quantized are looked at all the same. Takes the model in float32 three times.

    Args:
        model: the original; never changed. weights: the quantized model's. tokens: all of them are used.

    Raises:
        DataError: fewer than two batches, or a task without targets (`scored_targets`).
    """
    batches = list(torch.arange(tokens.sequence_count).split(batch_sequences))
    if len(batches) < 2:
        raise DataError(
            f"the variance of gradients needs at least 2 batches of {batch_sequences} sequences, got "
            f"{tokens.sequence_count} sequences; give more text (--data FILE) or raise --sequences"
        )
    parts = [tokens.subset(batch) for batch in batches]
    quantized = _noise(model, _changed_copy(model, weights), parts)
    original = _noise(model, copy.deepcopy(model.module).float(), parts)
    kinds: dict[str, list[str]] = {}
    for site in quantized:
        kinds.setdefault(site.rpartition(".")[2], []).append(site)
    found = {
        kind: GradientVariance(_mean(quantized, sites), _mean(original, sites), len(sites))
        for kind, sites in kinds.items()
    }
    return dict(sorted(found.items(), key=lambda entry: -entry[1].ratio))


def _mean(values: Mapping[str, float], sites: list[str]) -> float:
    return sum(values[site] for site in sites) / len(sites)


def _changed_copy(model: LoadedModel, weights: WeightSource) -> nn.Module:
    """The quantized model in float32: weights of the blocks' sites, norms and biases."""
    module, kept = copy.deepcopy(model.module).float(), kept_of(weights)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    for site in model.layout.block_sites:
        weight = weights.weight(site.name)
        if weight is not None:
            write_weight_(module.get_submodule(site.name), site, weight)
    return module


def _noise(model: LoadedModel, module: nn.Module, parts: list[TokenSet]) -> dict[str, float]:
    """Site -> r."""
    module.requires_grad_(False).eval()
    sites = {site.name: cast(nn.Parameter, module.get_submodule(site.name).weight) for site in model.layout.block_sites}
    for parameter in sites.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in sites.items()}
    power = dict.fromkeys(sites, 0.0)
    for part in parts:
        loss = _cross_entropy(model, module, part)
        for (name, total), gradient in zip(sums.items(), torch.autograd.grad(loss, list(sites.values())), strict=True):
            total += gradient
            power[name] += float(gradient.square().sum(dtype=torch.float64)) / len(parts)
    spread = len(parts) / (len(parts) - 1)
    noise: dict[str, float] = {}
    for name, total in sums.items():
        mean_power = float((total / len(parts)).square().sum(dtype=torch.float64))
        noise[name] = spread * (power[name] - mean_power) / max(power[name], _TINY)
    return noise


def _cross_entropy(model: LoadedModel, module: nn.Module, part: TokenSet) -> Tensor:
    device = next(module.parameters()).device
    targets = scored_targets(part, model.layout.task).to(device)
    with torch.enable_grad():
        output = cast(Any, module)(
            input_ids=part.input_ids.to(device), attention_mask=part.attention_mask.to(device), return_dict=True
        )
        return nn.functional.cross_entropy(output.logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
