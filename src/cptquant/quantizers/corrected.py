"""Codes of all columns, and a correction in 8 bits of the few columns that need it most (formats like `int3-g64-c2`).

OWQ (arXiv 2306.02272) keeps the "weak" columns of a layer in 16 bits: those whose inputs are so large that rounding
them costs most. Here they are kept in 8 bits, and they also make up for what the other columns lose. With E = W - Q, H
the damped Hessian, C the chosen columns and R the others, the correction that leaves least of tr(E H E') is

    O = E_C + E_R H_RC H_CC^-1,     and it leaves  tr(E_R S E_R'),   S = H_RR - H_RC H_CC^-1 H_CR.

So C is chosen first, the codes of R are then made by GPTQ under S, and O comes last. The codes of C are 0: their
weights stretch no group's scale. To correct the codes of an ordinary GPTQ instead is worse than no correction at equal
bits (docs/columns.md).

C is found by trial. Of the error of rounding to nearest, each further column is the one whose correction lowers
tr(E H E') most, given those before; or the same with the weights themselves in the place of their error, which finds
columns of outliers: these stretch the scales of their groups, so that all columns but they are rounded badly; or half
of C in one way and half in the other. The codes are rounded to nearest with each C, and the one with the least
tr(E_R S E_R') is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.columns import Correction
from cptquant.packing.quantized_weight import ColumnsWeight, QuantizedWeight, StoredWeight
from cptquant.quantizers.grid import fit_grid, round_to_grid

_EIGHT_BITS = QuantFormat(code_bits=8)
_SPENT = 1e-6
"""Of a column's own second moment: what is left of it once the columns chosen before can stand for it."""


def round_with_columns(
    weight: Tensor,  # (out_features, in_features), any float dtype
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,  # (in_features,) float32
    clip_search: bool = True,
) -> ColumnsWeight:
    """Round to nearest; the columns of the largest importance-weighted error keep their weights in 8 bits.

    Raises:
        ModelError: as `fit_grid`.
    """

    def rounded(values: Tensor) -> QuantizedWeight:
        found = round_to_grid(values, fmt.base, scale_dtype, importance=importance, clip_search=clip_search)
        assert isinstance(found, QuantizedWeight)
        return found

    original, count = weight.float(), fmt.column_count(weight.shape[1])
    errors = rounded(original).dequantize().sub_(original)
    best: tuple[float, Tensor, QuantizedWeight] | None = None
    for matrix in (errors, original):
        costs = matrix.square().sum(dim=0)
        columns = (costs if importance is None else costs * importance).topk(count).indices.sort().values
        kept = original.index_fill(1, columns, 0.0)
        base = rounded(kept)
        lost = base.dequantize().sub_(kept).square_().sum(dim=0)
        left = float((lost if importance is None else lost * importance).sum(dtype=torch.float64))
        if best is None or left < best[0]:
            best = left, columns, base
    assert best is not None
    _, columns, base = best
    wanted = original[:, columns] - base.dequantize()[:, columns]
    return ColumnsWeight(fmt, base, round_correction(wanted, columns, scale_dtype, clip_search=clip_search))


def quantize_with_columns(
    weight: Tensor,  # (out_features, in_features) float32
    damped: Tensor,  # (in_features, in_features) float32, positive definite
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    quantize: Callable[[Tensor, Tensor], StoredWeight],
    *,
    clip_search: bool = True,
) -> ColumnsWeight:
    """Choose columns, quantize the others under what the chosen ones leave, and fit the correction.

    Args:
        damped: mean of x x' with damping. quantize: (weight, second moments) -> codes in `fmt.base`; a column of zeros
            whose moments with all others are 0 must come back as zeros.

    Raises:
        ModelError: as `fit_grid`.
    """
    found = find_columns(weight, damped, fmt, scale_dtype, clip_search=clip_search)
    base = quantize(weight.index_fill(1, found.columns, 0.0), found.moments)
    assert isinstance(base, QuantizedWeight)
    error = base.dequantize().neg_().add_(weight)
    wanted = error[:, found.columns].addmm_(error[:, found.others], found.carried.t())
    return ColumnsWeight(fmt, base, round_correction(wanted, found.columns, scale_dtype, clip_search=clip_search))


@dataclass(frozen=True)
class Chosen:
    """Columns to correct, and what is left for the codes of the others.

    Attributes:
        columns, others: int64, ascending. carried: H_CC^-1 H_CR, (chosen, others).
        moments: S in the place of the others, (in_features, in_features); the chosen by themselves.
        ratio: tr(E_R S E_R') over tr(E H E'), both by rounding to nearest, at most 1: what the correction leaves.
    """

    columns: Tensor
    others: Tensor
    carried: Tensor
    moments: Tensor
    ratio: float


def find_columns(
    weight: Tensor,  # (out_features, in_features) float32
    damped: Tensor,  # (in_features, in_features) float32, positive definite
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    clip_search: bool = True,
) -> Chosen:
    """The best of three choices of columns; see above.

    Raises:
        ModelError: as `fit_grid`.
    """

    def error_of(values: Tensor) -> Tensor:
        rounded = round_to_grid(values, fmt.base, scale_dtype, importance=damped.diagonal(), clip_search=clip_search)
        return rounded.dequantize().sub_(values)

    error, count = error_of(weight), fmt.column_count(weight.shape[1])
    before = _power(error, damped)
    by_weight = choose_columns(weight, damped, count)
    half = choose_columns(weight, damped, count // 2) if count > 1 else by_weight[:0]
    mixed = choose_columns(error_of(weight.index_fill(1, half, 0.0)), damped, count, given=half.tolist())
    best: tuple[float, Chosen] | None = None
    for columns in (choose_columns(error, damped, count), by_weight, mixed):
        others, carried = _sweep_out(damped, columns)
        moments = _left_over(damped, columns, others, carried)
        left = _power(error_of(weight.index_fill(1, columns, 0.0)), moments)
        if best is None or left < best[0]:
            ratio = min(1.0, left / before) if before > 0 else 1.0
            best = left, Chosen(columns, others, carried, moments, ratio)
    assert best is not None
    return best[1]


def choose_columns(
    error: Tensor,  # (out_features, in_features) float32
    hessian: Tensor,  # (in_features, in_features) float32, positive definite
    count: int,
    *,
    given: Sequence[int] = (),
) -> Tensor:
    """Greedy choice of the columns whose correction lowers tr(E H E') most, int64 (count,) ascending.

    Correcting column j as well as it can be lowers the error by |(E H)_j|^2 / H_jj; what is left is E H and H with that
    column swept out. A column that those before can stand for is taken last.

    Args:
        given: columns that are chosen already, counted in `count`.
    """
    product, left = error @ hessian, hessian.clone()
    smallest = _SPENT * hessian.diagonal()
    free = torch.ones(len(hessian), dtype=torch.bool)
    for step in range(count):
        diagonal = left.diagonal()
        gains = torch.where(diagonal > smallest, product.square().sum(dim=0) / diagonal, torch.zeros_like(diagonal))
        best = given[step] if step < len(given) else int(gains.masked_fill(~free, -1.0).argmax())
        free[best] = False
        if gains[best] <= 0:
            continue
        swept = left[best] / diagonal[best]
        product.addr_(product[:, best].clone(), swept, alpha=-1)
        left.addr_(left[:, best].clone(), swept, alpha=-1)
    return (~free).nonzero().flatten()


def round_correction(
    wanted: Tensor,  # (out_features, count) float32
    columns: Tensor,  # int64 (count,), ascending
    scale_dtype: torch.dtype,
    *,
    clip_search: bool = True,
) -> Correction:
    """The correction in 8 bits, a scale a column. One scale a row is as exact, but 16 bits a row are many here.

    Raises:
        ModelError: as `fit_grid`.
    """
    rows = wanted.t().contiguous()
    grid = fit_grid(rows, _EIGHT_BITS, scale_dtype, clip_search=clip_search)
    return Correction(columns, grid.round(rows).t().to(torch.int8).contiguous(), grid.scales.to(scale_dtype))


def _power(error: Tensor, moments: Tensor) -> float:
    """tr(E M E')."""
    return float(((error @ moments) * error).sum(dtype=torch.float64))


def _sweep_out(damped: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the other columns, and H_CC^-1 H_CR (chosen, others)."""
    others = torch.ones(len(damped), dtype=torch.bool).index_fill_(0, columns, False).nonzero().flatten()
    return others, torch.linalg.solve(damped[columns][:, columns], damped[columns][:, others])


def _left_over(damped: Tensor, columns: Tensor, others: Tensor, carried: Tensor) -> Tensor:
    """S in the place of the others; the chosen columns by themselves, with the mean diagonal."""
    schur = damped[others][:, others].addmm_(damped[others][:, columns], carried, alpha=-1)
    mean = schur.diagonal().mean()
    result = torch.zeros_like(damped)
    result[others[:, None], others] = (schur + schur.t()) / 2
    result[columns, columns] = mean
    return result
