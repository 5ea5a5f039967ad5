"""Terms of a Taylor expansion of the loss, one block and one sequence at a time (arXiv 2412.03599; see taylor.py)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from cptquant.core.layout import Site

Curvature = Literal["diagonal", "rows", "projected"]


@dataclass
class Terms:
    """What one site and format collect, per sequence: <g, d>, and the quadratic term with the products it keeps."""

    inner: list[float] = field(default_factory=list)
    quadratic: list[float] = field(default_factory=list)


def products(
    gradient: Tensor | None,  # (out_features, in_features) of one sequence; None: it did not reach the site
    changes: Tensor,  # (formats, out_features, in_features) float32
    curvature: Curvature,
) -> tuple[list[float], list[float]]:
    """Per format <g, d>, and the quadratic term with the products that `curvature` keeps."""
    if gradient is None:
        return [0.0] * len(changes), [0.0] * len(changes)
    rows = torch.einsum("oi,foi->fo", gradient, changes).double()  # one pass over memory, no product is stored
    inner = rows.sum(dim=1)
    if curvature == "diagonal":
        quadratic = [float((gradient * change).square_().sum(dtype=torch.float64)) for change in changes]
    else:
        quadratic = (rows.square().sum(dim=1) if curvature == "rows" else inner.square()).tolist()
    return inner.tolist(), quadratic


def backward(
    run: Callable[[Tensor], Tensor],
    modules: Mapping[str, nn.Module],
    sites: Mapping[str, Site],
    hidden: Tensor,  # (1, T, d)
    gradient: Tensor,  # (1, T, d): of the block's output
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a block with gradients.

    Args:
        run: the block as a function of its input. modules, sites: whose weight gradients are wanted.
        hidden: the block's input. gradient: of the loss with respect to the block's output.

    Returns:
        Gradient of the loss with respect to each site's weight, (out_features, in_features), for the sites that took
        part (an expert may not be called), and to the block's input, (1, T, d).
    """
    parameters = {name: module.get_parameter("weight") for name, module in modules.items()}
    states = hidden.detach().requires_grad_(True)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            output = run(states)
            found = torch.autograd.grad(output, [states, *parameters.values()], gradient, allow_unused=True)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    weights = {
        name: (part.t() if sites[name].transposed else part).contiguous()
        for name, part in zip(parameters, found[1:], strict=True)
        if part is not None
    }
    return weights, torch.zeros_like(hidden) if found[0] is None else found[0]


def input_score(
    hidden: Tensor,  # (1, T, d)
    gradient: Tensor,  # (1, T, d): of the summed loss
    noise: float,
) -> float:
    """E |<gradient, e>| for e ~ noise * rms(hidden) * N(0, 1)."""
    rms = float(hidden.square().mean(dtype=torch.float64)) ** 0.5
    return math.sqrt(2 / math.pi) * noise * rms * float(gradient.double().norm())
