"""Choosing the grid of GGUF blocks: float16 super-scales and the integer scales and minima of their sub-blocks.

First every sub-block gets its own real scale a and offset b by weighted least squares, importance h_j a column, the
Hessian's diagonal (block_affine.py; grid.py where there are no offsets). Then the super-block's d (and dmin) are tried
around the values at which the largest sub-scale just fits, sub-scales are rounded to integers both ways, the error is
counted with the grid that will be stored, and the best of each super-block is kept; at last d and dmin are refitted to
the integers. This follows the aim of ggml's `make_qkx2_quants`, not its steps: there the sub-scales are rounded once,
and importance is mixed with the weights' magnitude.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import BlockLayout
from cptquant.packing.block_weight import BlockWeight, join_block_rows
from cptquant.quantizers.block_affine import fit_affine
from cptquant.quantizers.grid import ROWS_ENTRIES, fit_grid

_CHUNK_ENTRIES = 1 << 18
_SUPER_FACTORS = {2: (1.0, 0.9, 0.8, 1.1), 3: (1.0, 0.95), 4: (1.0,), 5: (1.0,), 6: (1.0,)}
"""Code bits -> factors tried on d and dmin."""
_SUPER_REFITS = 2
_FLOAT16_MAX = 65504.0
_FLOAT16_TINY = 2.0**-24


@dataclass
class BlockGrid:
    """The grid of some blocks, a row of blocks a line.

    Attributes:
        d: float32 (n, blocks), representable in float16. scales: float32 of integers (n, sub-blocks), or None.
        minimum: float32 (n, blocks), representable in float16, or None.
        minimum_codes: float32 of integers (n, sub-blocks), or None.
    """

    layout: BlockLayout
    d: Tensor
    scales: Tensor | None = None
    minimum: Tensor | None = None
    minimum_codes: Tensor | None = None

    def steps(self) -> Tensor:
        """Scale of every sub-block, float32 (n, sub-blocks)."""
        if self.scales is None:
            return self.d
        return _spread(self.d, self.layout) * self.scales

    def offsets(self) -> Tensor | None:
        """Offset of every sub-block, float32 (n, sub-blocks), or None."""
        if self.minimum is None or self.minimum_codes is None:
            return self.minimum
        return -(_spread(self.minimum, self.layout) * self.minimum_codes)

    def round(
        self,
        rows: Tensor,  # (n, columns) float32
    ) -> Tensor:
        """Nearest codes, float32 of integers, shape of `rows`."""
        grouped = rows.view(rows.shape[0], -1, self.layout.sub_block)
        return nearest_codes(grouped, self.steps(), self.offsets(), self.layout).view_as(rows)


def nearest_codes(
    values: Tensor,  # (..., sub_block)
    steps: Tensor,  # (...)
    offsets: Tensor | None,  # (...)
    layout: BlockLayout,
) -> Tensor:
    """Codes whose values are nearest, float32 of integers; any code where the step is 0."""
    shifted = values if offsets is None else values - offsets[..., None]
    codes = shifted / torch.where(steps == 0, torch.ones_like(steps), steps)[..., None]
    return codes.round_().clamp_(layout.lowest_code, layout.highest_code)


def to_half(values: Tensor) -> Tensor:
    """Rounded to float16, as float32; tiny ones to its smallest number rather than to 0.

    Raises:
        ModelError: beyond float16's range.
    """
    if bool((values.abs() > _FLOAT16_MAX).any()):
        raise ModelError(f"a block of weights needs a scale of {float(values.abs().max()):.3g}, beyond float16's 65504")
    stored = values.half().float()
    tiny = (stored == 0) & (values != 0)
    return torch.where(tiny, torch.copysign(torch.full_like(stored, _FLOAT16_TINY), values), stored)


def fit_blocks(
    rows: Tensor,  # (n, columns) float32, columns a multiple of the block
    layout: BlockLayout,
    importance: Tensor | None = None,  # (columns,) float32, at least 0
    *,
    search: bool = True,
) -> BlockGrid:
    """Choose the grid of every block of some rows.

    Args:
        importance: weight of each column's squared error; None counts all alike.
        search: False takes each sub-block's full range without a search.

    Raises:
        ModelError: a weight is NaN or infinite, or needs a scale beyond float16's range.
    """
    if not bool(torch.isfinite(rows).all()):
        raise ModelError("a weight to quantize is NaN or infinite; repair the model (inspect names the tensor)")
    weights = torch.ones(rows.shape[1]) if importance is None else importance
    floor = float(weights.mean()) * 1e-6 + torch.finfo(torch.float32).tiny
    weights = weights.clamp(min=floor)
    step = max(1, _CHUNK_ENTRIES // rows.shape[1])
    parts = [_fit_chunk(rows[start : start + step], layout, weights, search) for start in range(0, rows.shape[0], step)]

    def join(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    d = join("d")
    assert d is not None
    return BlockGrid(layout, d, join("scales"), join("minimum"), join("minimum_codes"))


def _spread(per_block: Tensor, layout: BlockLayout) -> Tensor:
    return per_block.repeat_interleave(layout.block_columns // layout.sub_block, dim=1)


def _fit_chunk(rows: Tensor, layout: BlockLayout, importance: Tensor, search: bool) -> BlockGrid:
    count, columns = rows.shape
    subs = columns // layout.sub_block
    grouped = rows.reshape(count * subs, layout.sub_block)
    weights = importance.view(1, subs, layout.sub_block).expand(count, -1, -1).reshape(grouped.shape)
    if layout.symmetric:
        dtype = torch.float16 if layout.scale_range is None else torch.float32
        fmt = QuantFormat(code_bits=layout.code_bits)
        grid = fit_grid(grouped, fmt, dtype, importance=weights, clip_search=search)
        step, offset = grid.scales, None
    else:
        step, offset = fit_affine(grouped, weights, layout, search=search)
    if layout.scale_range is None:
        minimum = None if offset is None else to_half(offset).view(count, subs)
        return BlockGrid(layout, to_half(step).view(count, subs), None, minimum)
    blocks = count * columns // layout.block_columns
    per_block = layout.block_columns // layout.sub_block
    problem = _SuperBlocks(
        layout,
        grouped.view(blocks, per_block, -1),
        weights.view(blocks, per_block, -1),
        step.view(blocks, per_block),
        None if offset is None else offset.view(blocks, per_block),
    )
    return problem.solve(search).reshaped(count)


@dataclass
class _Solved:
    """One line per super-block."""

    layout: BlockLayout
    d: Tensor
    scales: Tensor
    minimum: Tensor | None
    minimum_codes: Tensor | None

    def reshaped(self, count: int) -> BlockGrid:
        """Back to a row of blocks a line."""

        def lines(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(count, -1)

        return BlockGrid(
            self.layout,
            self.d.reshape(count, -1),
            lines(self.scales),
            lines(self.minimum),
            lines(self.minimum_codes),
        )


class _SuperBlocks:
    """Integer scales and minima of super-blocks, given the real ones of their sub-blocks."""

    def __init__(
        self,
        layout: BlockLayout,
        rows: Tensor,  # (blocks, sub-blocks, sub_block)
        importance: Tensor,  # the same shape
        steps: Tensor,  # (blocks, sub-blocks)
        offsets: Tensor | None,  # (blocks, sub-blocks)
    ) -> None:
        self._layout, self._rows, self._importance = layout, rows, importance
        self._steps, self._offsets = steps, offsets
        self._best: _Solved | None = None
        self._error = rows.new_full((rows.shape[0],), torch.inf)

    def solve(self, search: bool) -> _Solved:
        """The best of all that is tried."""
        d, minimum = self._starts()
        factors = _SUPER_FACTORS[self._layout.code_bits] if search else (1.0,)
        for factor in factors:
            for minimum_factor in factors if minimum is not None else (1.0,):
                self._consider(d * factor, None if minimum is None else minimum * minimum_factor)
        for _ in range(_SUPER_REFITS if search else 0):
            self._consider(*self._refit())
        assert self._best is not None
        return self._best

    def _starts(self) -> tuple[Tensor, Tensor | None]:
        """d and dmin at which the largest sub-scale and minimum just fit."""
        assert self._layout.scale_range is not None
        lowest, highest = self._layout.scale_range
        if self._offsets is None:
            index = self._steps.abs().argmax(dim=1, keepdim=True)
            return self._steps.gather(1, index).squeeze(1) / lowest, None
        assert self._layout.minimum_range is not None
        return self._steps.amax(dim=1) / highest, (-self._offsets).amax(dim=1) / self._layout.minimum_range[1]

    def _consider(self, d: Tensor, minimum: Tensor | None) -> None:
        d = to_half(d)
        minimum = None if minimum is None else to_half(minimum)
        scales, minima, error = self._choose_integers(d, minimum)
        if self._best is None:
            self._best = _Solved(self._layout, d, scales, minimum, minima)
            self._error = error
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        best = self._best
        best.d = torch.where(better, d, best.d)
        best.scales = torch.where(better[:, None], scales, best.scales)
        if minimum is not None and minima is not None and best.minimum is not None and best.minimum_codes is not None:
            best.minimum = torch.where(better, minimum, best.minimum)
            best.minimum_codes = torch.where(better[:, None], minima, best.minimum_codes)

    def _choose_integers(self, d: Tensor, minimum: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of the integers on both sides of each real scale and minimum, those of least error."""
        assert self._layout.scale_range is not None
        scale_pair = _both_sides(self._steps, d, self._layout.scale_range)
        minimum_pair: tuple[Tensor | None, ...] = (None,)
        if minimum is not None and self._offsets is not None:
            assert self._layout.minimum_range is not None
            minimum_pair = _both_sides(-self._offsets, minimum, self._layout.minimum_range)
        chosen, chosen_minimum = scale_pair[0], minimum_pair[0]
        least = torch.full_like(self._steps, torch.inf)
        for scale in scale_pair:
            for minima in minimum_pair:
                error = self._sub_errors(d, scale, minimum, minima)
                better = error < least
                least = torch.where(better, error, least)
                chosen = torch.where(better, scale, chosen)
                if minima is not None and chosen_minimum is not None:
                    chosen_minimum = torch.where(better, minima, chosen_minimum)
        return chosen, chosen_minimum, least.sum(dim=1)

    def _sub_errors(self, d: Tensor, scale: Tensor, minimum: Tensor | None, minima: Tensor | None) -> Tensor:
        steps = d[:, None] * scale
        offsets = None if minimum is None or minima is None else -(minimum[:, None] * minima)
        codes = nearest_codes(self._rows, steps, offsets, self._layout)
        values = codes.mul_(steps[..., None])
        if offsets is not None:
            values += offsets[..., None]
        return values.sub_(self._rows).square_().mul_(self._importance).sum(dim=2)

    def _refit(self) -> tuple[Tensor, Tensor | None]:
        """Least-squares d and dmin for the best integers and their codes."""
        best = self._best
        assert best is not None
        steps = best.d[:, None] * best.scales
        if best.minimum is None or best.minimum_codes is None:
            codes = nearest_codes(self._rows, steps, None, self._layout)
            basis = codes.mul_(best.scales[..., None])
            weighted = self._importance * basis
            fitted = (weighted * self._rows).sum((1, 2)) / (weighted * basis).sum((1, 2))
            return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, best.d), None
        offsets = -(best.minimum[:, None] * best.minimum_codes)
        codes = nearest_codes(self._rows, steps, offsets, self._layout)
        first = codes.mul_(best.scales[..., None])
        second = -best.minimum_codes[..., None].expand_as(first)
        d, minimum = solve_pair(first, second, self._rows, self._importance)
        usable = torch.isfinite(d) & torch.isfinite(minimum) & (d > 0) & (minimum >= 0)
        return torch.where(usable, d, best.d), torch.where(usable, minimum, best.minimum)


def solve_pair(first: Tensor, second: Tensor, target: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of two basis vectors a block: argmin over (x, y) of sum h (x first + y second - target)^2."""
    weighted_first, weighted_second = importance * first, importance * second
    a, b, c = (
        (weighted_first * first).sum((1, 2)),
        (weighted_first * second).sum((1, 2)),
        (weighted_second * second).sum((1, 2)),
    )
    p, q = (weighted_first * target).sum((1, 2)), (weighted_second * target).sum((1, 2))
    determinant = a * c - b * b
    return (c * p - b * q) / determinant, (a * q - b * p) / determinant


def _both_sides(real: Tensor, unit: Tensor, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    safe = torch.where(unit == 0, torch.ones_like(unit), unit)
    ratio = real / safe[:, None]
    return ratio.floor().clamp(*bounds), ratio.ceil().clamp(*bounds)


def round_to_blocks(
    weight: Tensor,  # (out_features, in_features), any float dtype
    fmt: QuantFormat,
    *,
    importance: Tensor | None = None,  # (in_features,) float32
    search: bool = True,
) -> BlockWeight:
    """Fit every block of a matrix and round to nearest, a few rows at a time.

    Args, Raises: as `fit_blocks`.
    """
    layout = fmt.block_layout
    if layout is None:
        raise ValueError(f"{fmt.name} is no block format")
    step = max(1, ROWS_ENTRIES // weight.shape[1])
    parts = []
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        grid = fit_blocks(rows, layout, importance, search=search)
        parts.append(assemble(fmt, grid.round(rows), grid))
    return join_block_rows(parts)


def assemble(
    fmt: QuantFormat,
    codes: Tensor,  # (n, columns) float32 of integers
    grid: BlockGrid,
) -> BlockWeight:
    """Codes and their grid in stored types."""

    def small(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(torch.int8)

    return BlockWeight(
        fmt,
        codes.to(torch.int8),
        grid.d.half(),
        small(grid.scales),
        None if grid.minimum is None else grid.minimum.half(),
        small(grid.minimum_codes),
    )
