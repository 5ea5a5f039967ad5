"""SQC, the salience-weighted search for a group's scale (SliM-LLM, arXiv 2405.14917, section 3.3 and algorithm 2).

    min over tau in [1 - reach, 1 + reach] of   sum_unsalient |w - Q(w)|^e + weight * sum_salient |w - Q(w)|^e,
    Q with scale tau * s, one tau a row, `steps` values on either side of 1

Salient and other weights partition the group, so that with weight 1, as published, the mask decides nothing and the
objective is the plain error; a larger weight makes it what the paper says.

What we changed. The mask is the paper's three standard deviations (its code uses two). s is the min-max scale of a
symmetric grid of either sign (the paper's has a zero point), or, as `start` "search", the scale of least squared error
that our GPTQ uses, from which the search goes on. Errors may be weighed by the Hessian's diagonal besides.

By default there are no steps: on top of the scale of least error and descent the search did not help
(docs/segments.md).

One bit: levels mu -+ alpha, mu the row's mean over the group and alpha the mean of |w - mu| (the paper's equation 2 has
no mean; its code subtracts one), with tau on alpha. Both are held as they are stored (packing/segments.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.segments import (
    HIGHEST_MEAN,
    LOWEST_MEAN,
    MEAN_STEPS,
    one_bit_offset,
    round_one_bit_scale,
)
from cptquant.quantizers.grid import Grid, fit_grid, round_scale
from cptquant.quantizers.salience import salient_mask


@dataclass(frozen=True)
class ScaleSearch:
    """Hyper-parameters of SQC.

    Attributes:
        start: "minmax" (the paper) or "search", the scale that tau multiplies.
        reach, steps: tau goes from 1 - reach to 1 + reach, `steps` values on either side; 0 steps leave tau = 1.
        salient_weight: how much more an error of a salient weight counts; 1 is the plain error.
        exponent: of the errors; the paper's formula has 2, its code 2.4.
        sigmas: a weight is salient so many standard deviations above its group's mean salience.
        diagonal_importance: weigh errors by the Hessian's diagonal too.
    """

    start: Literal["minmax", "search"] = "search"
    reach: float = 0.1
    steps: int = 0
    salient_weight: float = 1.0
    exponent: float = 2.0
    sigmas: float = 3.0
    diagonal_importance: bool = True


PUBLISHED_SCALE_SEARCH = ScaleSearch(start="minmax", steps=50, exponent=2.4, diagonal_importance=False)
"""The paper's code, but for the mask, which is without effect at weight 1."""


def fit_scale(
    rows: Tensor,  # (out_features, group columns) float32: the group, as compensated so far
    bits: int,
    scale_dtype: torch.dtype,
    options: ScaleSearch,
    *,
    saliences: Tensor | None = None,  # shape of `rows`; None only where salient_weight is 1
    importance: Tensor | None = None,  # (group columns,)
) -> Grid:
    """One scale a row (and, for one bit, a mean as fractional zero point).

    Raises:
        ModelError: as `fit_grid`.
    """
    weights = _error_weights(rows, options, saliences, importance)
    start = _one_bit_grid(rows, weights) if bits == 1 else _start_grid(rows, bits, scale_dtype, options, weights)
    return _scale(start, rows, bits, scale_dtype, options, weights)


def objective(
    rows: Tensor,  # (n, g) float32
    grid: Grid,
    weights: Tensor | None,  # (n, g) or (g,)
    exponent: float,
) -> Tensor:
    """sum of weight * |w - Q(w)|^exponent in each row, (n,)."""
    error = (grid.value(grid.round(rows)) - rows).abs_()
    error = error.square_() if exponent == 2 else error.pow_(exponent)
    return (error if weights is None else error.mul_(weights)).sum(dim=1)


def _error_weights(
    rows: Tensor, options: ScaleSearch, saliences: Tensor | None, importance: Tensor | None
) -> Tensor | None:
    """What each error counts, broadcastable to `rows`; None if all count alike."""
    weights = importance if options.diagonal_importance else None
    if options.salient_weight == 1:
        return weights
    if saliences is None:
        raise ValueError("a weight for salient errors needs the saliences")
    mask = salient_mask(saliences, options.sigmas)
    salient = torch.where(mask, options.salient_weight, 1.0)
    return salient if weights is None else salient * weights


def _start_grid(rows: Tensor, bits: int, dtype: torch.dtype, options: ScaleSearch, weights: Tensor | None) -> Grid:
    searches = options.start == "search"
    fmt = QuantFormat(code_bits=bits, granularity=rows.shape[1])
    return fit_grid(rows, fmt, dtype, importance=weights if searches else None, clip_search=searches)


def _one_bit_grid(rows: Tensor, weights: Tensor | None) -> Grid:
    """Mean and mean distance from it, as stored: (code - zero) * scale with code -1, 0, zero = -1/2 - mean/32."""
    counts = torch.ones_like(rows) if weights is None else weights.expand_as(rows)
    total = counts.sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    mean = (counts * rows).sum(dim=1) / total
    alpha = (counts * (rows - mean[:, None]).abs()).sum(dim=1) / total
    return one_bit_grid(mean, 2 * alpha)


def one_bit_grid(
    mean: Tensor,  # (n,) float32
    scale: Tensor,  # (n,) float32, at least 0: distance of the two levels
) -> Grid:
    """The grid of a one-bit group, mean and scale rounded to what is stored.

    The mean's six bits reach as far as one scale. Where it lies further out, the outer level is put on it at least.
    """
    stored = round_one_bit_scale(torch.maximum(scale, mean.abs() / (HIGHEST_MEAN / MEAN_STEPS + 0.5)))
    steps = (mean / stored * MEAN_STEPS).round().clamp(LOWEST_MEAN, HIGHEST_MEAN)
    return Grid(stored, -one_bit_offset(steps), -1, 0)


def _scale(
    start: Grid, rows: Tensor, bits: int, dtype: torch.dtype, options: ScaleSearch, weights: Tensor | None
) -> Grid:
    """The start or the best multiple of it, row by row."""
    best, least = start, objective(rows, start, weights, options.exponent)
    distance = [options.reach * step / options.steps for step in range(1, options.steps + 1)]
    mean = None if start.zeros is None else (-start.zeros - 0.5) * start.scales
    for tau in [1 + step for step in distance] + [1 - step for step in distance]:
        if bits == 1 and mean is not None:
            tried = one_bit_grid(mean, start.scales * tau)
        else:
            tried = Grid(round_scale(start.scales * tau, dtype), None, start.low, start.high)
        error = objective(rows, tried, weights, options.exponent)
        better = error < least
        least = torch.where(better, error, least)
        zeros = None
        if best.zeros is not None and tried.zeros is not None:
            zeros = torch.where(better, tried.zeros, best.zeros)
        best = Grid(torch.where(better, tried.scales, best.scales), zeros, start.low, start.high)
    return best
