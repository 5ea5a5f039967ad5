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
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, StoredWeight
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
) -> CorrectedWeight:
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
    return CorrectedWeight(fmt, base, round_correction(wanted, columns, scale_dtype, clip_search=clip_search))


def quantize_with_columns(
    weight: Tensor,  # (out_features, in_features) float32
    damped: Tensor,  # (in_features, in_features) float32, positive definite
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    quantize: Callable[[Tensor, Tensor], StoredWeight],
    *,
    clip_search: bool = True,
) -> CorrectedWeight:
    """Choose columns, quantize the others under what the chosen ones leave, and fit the correction.

    Args:
        damped: mean of x x' with damping. quantize: (weight, second moments) -> codes in `fmt.base`; a column of zeros
            whose moments with all others are 0 must come back as zeros.

    Raises:
        ModelError: as `fit_grid`.
    """
    found = ColumnSearch(weight, damped, scale_dtype, clip_search=clip_search).find(fmt)
    columns = found.columns
    others = torch.ones(len(damped), dtype=torch.bool).index_fill_(0, columns, False).nonzero().flatten()
    carried = torch.linalg.solve(damped[columns][:, columns], damped[columns][:, others])  # H_CC^-1 H_CR
    base = quantize(weight.index_fill(1, columns, 0.0), left_over(damped, columns, others, carried))
    assert isinstance(base, QuantizedWeight)
    error = base.dequantize().neg_().add_(weight)
    wanted = error[:, columns].addmm_(error[:, others], carried.t())
    return CorrectedWeight(fmt, base, round_correction(wanted, columns, scale_dtype, clip_search=clip_search))


@dataclass(frozen=True)
class Chosen:
    """Columns to correct.

    Attributes:
        columns: int64 (count,), ascending.
        ratio: tr(E_R S E_R') over tr(E H E'), both by rounding to nearest, at most 1: what the correction leaves.
    """

    columns: Tensor
    ratio: float


class ColumnSearch:
    """The choice of columns of one matrix; formats that are asked for one after the other share what they can.

    Args:
        weight: (out_features, in_features) float32. damped: (in_features, in_features) float32, positive definite.
        clip_search: as the codes will be rounded.
    """

    def __init__(self, weight: Tensor, damped: Tensor, scale_dtype: torch.dtype, *, clip_search: bool = True) -> None:
        self._weight, self._damped, self._dtype, self._clip = weight, damped, scale_dtype, clip_search
        self._by_weight = torch.empty(0, dtype=torch.int64)
        self._errors: dict[QuantFormat, tuple[Tensor, float]] = {}

    def find(self, fmt: QuantFormat) -> Chosen:
        """The best of three choices of columns; see above.

        Raises:
            ModelError: as `fit_grid`.
        """
        count = fmt.column_count(self._weight.shape[1])
        if len(self._by_weight) < count:
            self._by_weight = rank_columns(self._weight, self._damped, count)
        if fmt.base not in self._errors:
            error = self._error(fmt, self._weight)
            self._errors[fmt.base] = error, float(((error @ self._damped) * error).sum(dtype=torch.float64))
        error, before = self._errors[fmt.base]
        choices = [rank_columns(error, self._damped, count), self._by_weight[:count]]
        if count > 1:
            half = self._by_weight[: count // 2]
            rest = self._error(fmt, self._weight.index_fill(1, half, 0.0))
            choices.append(rank_columns(rest, self._damped, count, given=half.tolist()))
        best: tuple[float, Tensor] | None = None
        for columns in choices:
            left = _left_power(self._error(fmt, self._weight.index_fill(1, columns, 0.0)), self._damped, columns)
            if best is None or left < best[0]:
                best = left, columns
        assert best is not None
        return Chosen(best[1].sort().values, min(1.0, best[0] / before) if before > 0 else 1.0)

    def _error(self, fmt: QuantFormat, values: Tensor) -> Tensor:
        """Of rounding to nearest under the inputs' mean squares."""
        importance = self._damped.diagonal()
        rounded = round_to_grid(values, fmt.base, self._dtype, importance=importance, clip_search=self._clip)
        return rounded.dequantize().sub_(values)


def rank_columns(
    error: Tensor,  # (out_features, in_features) float32
    hessian: Tensor,  # (in_features, in_features) float32, positive definite
    count: int,
    *,
    given: Sequence[int] = (),
) -> Tensor:
    """Greedy choice of the columns whose correction lowers tr(E H E') most, int64 (count,), the best first.

    Correcting column j as well as it can be lowers the error by |(E H)_j|^2 / H_jj; what is left is E H and H with that
    column swept out. A column that those before can stand for is taken last.

    Args:
        given: columns that are chosen already; they come first and count.
    """
    product, left = error @ hessian, hessian.clone()
    smallest = _SPENT * hessian.diagonal()
    free = torch.ones(len(hessian), dtype=torch.bool)
    chosen: list[int] = []
    for step in range(count):
        diagonal = left.diagonal()
        gains = torch.where(diagonal > smallest, product.square().sum(dim=0) / diagonal, torch.zeros_like(diagonal))
        best = given[step] if step < len(given) else int(gains.masked_fill(~free, -1.0).argmax())
        free[best] = False
        chosen.append(best)
        if gains[best] <= 0:
            continue
        swept = left[best] / diagonal[best]
        product.addr_(product[:, best].clone(), swept, alpha=-1)
        left.addr_(left[:, best].clone(), swept, alpha=-1)
    return torch.tensor(chosen, dtype=torch.int64)


def round_correction(
    wanted: Tensor,  # (out_features, count) float32
    columns: Tensor,  # int64 (count,), ascending
    scale_dtype: torch.dtype,
    *,
    clip_search: bool = True,
) -> ColumnCorrection:
    """The correction in 8 bits, a scale a column. One scale a row is as exact, but 16 bits a row are many here.

    Raises:
        ModelError: as `fit_grid`.
    """
    rows = wanted.t().contiguous()
    grid = fit_grid(rows, _EIGHT_BITS, scale_dtype, clip_search=clip_search)
    return ColumnCorrection(columns, grid.round(rows).t().to(torch.int8).contiguous(), grid.scales.to(scale_dtype))


def _left_power(
    error: Tensor,  # (out_features, in_features) float32, 0 on the columns
    damped: Tensor,
    columns: Tensor,
) -> float:
    """tr(E_R S E_R')."""
    product = error @ damped
    own = product[:, columns]
    carried = torch.linalg.solve(damped[columns][:, columns], own.t()).t()
    return float((product * error).sum(dtype=torch.float64) - (own * carried).sum(dtype=torch.float64))


def left_over(damped: Tensor, columns: Tensor, others: Tensor, carried: Tensor) -> Tensor:
    """S in the place of the others; the chosen columns by themselves, with the mean diagonal."""
    schur = damped[others][:, others].addmm_(damped[others][:, columns], carried, alpha=-1)
    mean = schur.diagonal().mean()
    result = torch.zeros_like(damped)
    result[others[:, None], others] = (schur + schur.t()) / 2
    result[columns, columns] = mean
    return result
