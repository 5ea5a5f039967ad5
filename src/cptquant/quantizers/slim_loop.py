"""GPTQ on a matrix whose groups have different widths: the recursion of `gptq.py`, each group with a grid of its own.

A group's scale is fitted when the loop enters it, on the weights as compensated so far, with their saliences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.segments import (
    MEAN_STEPS,
    SegmentedWeight,
    group_size,
)
from cptquant.quantizers.descent import Rounded
from cptquant.quantizers.grid import Grid
from cptquant.quantizers.hessian_factor import HessianFactor
from cptquant.quantizers.salience import salience
from cptquant.quantizers.slim_scale import ScaleSearch, fit_scale

_LEAF_COLUMNS = 16


class SegmentLoop:
    """The columns of one matrix on their way through GPTQ.

    Args:
        columns: float32 (in_features, out_features), in the order of the groups.
        factor: of the Hessian in that order. widths: bits of each group.
        search: how scales are found.
    """

    def __init__(
        self,
        columns: Tensor,
        factor: HessianFactor,
        fmt: QuantFormat,
        widths: Sequence[int],
        scale_dtype: torch.dtype,
        search: ScaleSearch,
    ) -> None:
        self._factor, self._fmt, self._widths, self._dtype, self._search = factor, fmt, widths, scale_dtype, search
        self._size = group_size(fmt)
        self._compensated = columns.clone()
        self._error = torch.zeros_like(columns)
        self._shifted = torch.empty_like(columns)
        self._grids: list[Grid] = []

    def run(self) -> Rounded:
        """Round all columns."""
        self._sweep(0, self._compensated.shape[0])
        one_bit = torch.tensor(self._widths) == 1
        scales = torch.stack([grid.scales for grid in self._grids])
        zeros = torch.stack([torch.zeros_like(g.scales) if g.zeros is None else g.zeros for g in self._grids])
        low = torch.tensor([float(grid.low) for grid in self._grids])[:, None] - zeros
        high = torch.tensor([float(grid.high) for grid in self._grids])[:, None] - zeros
        has_one_bit = bool(one_bit.any())
        return Rounded(
            self._shifted, scales, low, high, self._size, self._dtype,
            zeros if has_one_bit else None, one_bit if has_one_bit else None,
        )  # fmt: skip

    def _sweep(self, start: int, stop: int) -> None:
        """Columns start to stop, which have received all errors of the columns before `start`."""
        if stop - start <= _LEAF_COLUMNS:
            self._round_leaf(start, stop)
            return
        middle = round((start + stop) / 2 / self._size) * self._size  # on a group's edge, so that it is fitted whole
        if not start < middle < stop:
            middle = start + -(-(stop - start) // 2 // _LEAF_COLUMNS) * _LEAF_COLUMNS
        self._sweep(start, middle)
        feedback = self._factor.feedback[start:middle, middle:stop]
        self._compensated[middle:stop].addmm_(feedback.t(), self._error[start:middle], alpha=-1)
        self._sweep(middle, stop)

    def _round_leaf(self, start: int, stop: int) -> None:
        if start % self._size == 0:
            self._fit(slice(start, start + self._size))
        grid = self._grids[start // self._size]
        for index in range(start, stop):
            codes = grid.round(self._compensated[index])
            self._shifted[index] = codes if grid.zeros is None else codes - grid.zeros
            error = torch.sub(self._compensated[index], grid.value(codes), out=self._error[index])
            if index + 1 < stop:
                feedback = self._factor.feedback[index, index + 1 : stop]
                self._compensated[index + 1 : stop].addr_(feedback, error, alpha=-1)

    def _fit(self, columns: slice) -> None:
        rows = self._compensated[columns].t().contiguous()
        saliences = salience(rows, self._factor.pivots[columns])
        bits = self._widths[len(self._grids)]
        importance = self._factor.importance[columns]
        grid = fit_scale(rows, bits, self._dtype, self._search, saliences=saliences, importance=importance)
        self._grids.append(grid)


def assemble(
    rounded: Rounded, fmt: QuantFormat, widths: Sequence[int], scale_dtype: torch.dtype, order: Tensor | None
) -> SegmentedWeight:
    """The stored form of a rounded matrix."""
    codes, means = rounded.shifted, None
    if rounded.fractions is not None and rounded.one_bit is not None:
        codes = codes + rounded.fractions.repeat_interleave(rounded.group_columns, dim=0)
        means = ((-rounded.fractions - 0.5) * MEAN_STEPS * rounded.one_bit[:, None]).round().to(torch.int8)
    if means is None and fmt.code_bits == 2:
        means = torch.zeros_like(rounded.scales, dtype=torch.int8)
    return SegmentedWeight(
        fmt,
        torch.tensor(widths, dtype=torch.uint8),
        codes.t().round().to(torch.int8).contiguous(),
        rounded.scales.t().to(scale_dtype).contiguous(),
        None if means is None else means.t().contiguous(),
        order,
    )
