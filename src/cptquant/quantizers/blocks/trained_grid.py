"""The grid of a quantized matrix, taken apart for training: what may move, what is fixed, and the way back to storage.

Every stored form says value = s (q - z) + b with integer codes q inside [low, high], one step s a group of columns
(a zero point z in asymmetric formats; an offset b and fixed s in GGUF's blocks). Training moves s and z of a grid
whose steps are 16-bit floats; those of GGUF's blocks and the one-bit groups of mixed widths are products of stored
parts and stay as they are. So do corrected columns: what is trained are the codes beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.quantized_weight import CorrectedWeight, Correction, QuantizedWeight, StoredWeight
from cptquant.packing.segments import SegmentedWeight
from cptquant.quantizers.grid import code_range

_NO_STEP = 2.0**-100
"""In place of a step of zero, as GGUF's blocks may have: beside any offset it vanishes."""


@dataclass(frozen=True)
class TrainedGrid:
    """One matrix's grid.

    Attributes:
        codes: int8 (rows, columns), in the order in which they are stored.
        steps: float32 (rows or 1, groups), signed, as stored. zeros: the same shape, in codes; None for none.
        offsets: b, the same shape, in values; None for none.
        low, high: code limits; float, or float32 (1, groups, 1) where groups differ in width.
        width: columns a group; the last group may be shorter.
        step_dtype: of the stored steps; None where they are fixed.
        moves: bool (1, groups), which steps may move; None for all (or, with fixed steps, none).
        order: int64 (columns,), original number of each stored column; None where they keep their order.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    low: float | Tensor
    high: float | Tensor
    width: int
    step_dtype: torch.dtype | None
    moves: Tensor | None
    order: Tensor | None
    rebuild: Callable[[Tensor, Tensor | None, Tensor | None], StoredWeight]
    """(codes int8, steps, zeros int8) -> the matrix in its stored form."""
    correction: Correction | None = None
    """What is added to the values of the codes; None for none."""

    @classmethod
    def of(cls, stored: StoredWeight) -> "TrainedGrid":
        """The grid of a stored matrix."""
        if isinstance(stored, QuantizedWeight):
            return _of_affine(stored)
        if isinstance(stored, BlockWeight):
            return _of_blocks(stored)
        if isinstance(stored, CorrectedWeight):
            return _of_corrected(stored)
        return _of_segments(stored)

    def corrected(
        self,
        values: Tensor,  # (rows, columns), of the codes
    ) -> Tensor:
        """The values with the correction added."""
        return values if self.correction is None else self.correction.added(values)

    @property
    def learns_steps(self) -> bool:
        """Whether any step may move."""
        return self.step_dtype is not None


def _of_affine(stored: QuantizedWeight) -> TrainedGrid:
    fmt, columns = stored.format, stored.shape[1]
    one = fmt.granularity == "tensor"
    steps = stored.scales.view(1, 1) if one else stored.scales
    zeros = None if stored.zeros is None else stored.zeros.float().view_as(steps)
    low, high = code_range(fmt)

    def rebuild(codes: Tensor, steps: Tensor | None, zeros: Tensor | None) -> QuantizedWeight:
        assert steps is not None
        scales = steps.to(stored.scales.dtype).view_as(stored.scales)
        return QuantizedWeight(fmt, codes, scales, None if zeros is None else zeros.view_as(stored.scales))

    width = fmt.granularity if isinstance(fmt.granularity, int) else columns
    return TrainedGrid(
        stored.codes, steps.float(), zeros, None, float(low), float(high), width, stored.scales.dtype, None, None,
        rebuild,
    )  # fmt: skip


def _of_blocks(stored: BlockWeight) -> TrainedGrid:
    layout, steps = stored.layout, stored.sub_scales()
    steps = torch.where(steps == 0, torch.full_like(steps, _NO_STEP), steps)  # division by it then has a result
    return TrainedGrid(
        stored.codes, steps, None, stored.sub_offsets(), float(layout.lowest_code),
        float(layout.highest_code), layout.sub_block, None, None, None,
        lambda codes, _steps, _zeros: replace(stored, codes=codes),
    )  # fmt: skip


def _of_corrected(stored: CorrectedWeight) -> TrainedGrid:
    grid = _of_affine(stored.base)

    def rebuild(codes: Tensor, steps: Tensor | None, zeros: Tensor | None) -> CorrectedWeight:
        base = grid.rebuild(codes, steps, zeros)
        assert isinstance(base, QuantizedWeight)
        return replace(stored, base=base)

    return replace(grid, rebuild=rebuild, correction=stored.correction)


def _of_segments(stored: SegmentedWeight) -> TrainedGrid:
    widths = stored.widths.float()
    half = torch.pow(2.0, widths - 1)
    binary = widths == 1
    zeros = None
    if stored.means is not None and bool(binary.any()):  # levels of one-bit groups are (code + 1/2 + mean/32) scale
        shifts = -(0.5 + stored.means.float() / 32)
        zeros = torch.where(binary, shifts, torch.zeros_like(shifts))

    def rebuild(codes: Tensor, steps: Tensor | None, _zeros: Tensor | None) -> SegmentedWeight:
        assert steps is not None
        return replace(stored, codes=codes, scales=steps.to(stored.scales.dtype))

    assert isinstance(stored.format.granularity, int)
    return TrainedGrid(
        stored.codes, stored.scales.float(), zeros, None, (-half).view(1, -1, 1), (half - 1).view(1, -1, 1),
        stored.format.granularity, stored.scales.dtype, ~binary.view(1, -1) if bool(binary.any()) else None,
        stored.order, rebuild,
    )  # fmt: skip


_CELL = 0.49
"""Largest distance of a latent weight from its code at the start, in steps."""


def start_latent(
    grid: TrainedGrid,
    original: Tensor,  # (rows, columns), columns in the model's order
) -> Tensor:
    """The latent weight that rounds to the present codes and is nearest to the original.

    Returns:
        float32 (rows, columns), columns in stored order.
    """
    found = in_stored_order(original, grid)

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(grid.width, dim=1)[:, : found.shape[1]]

    if grid.offsets is not None:
        found = found - spread(grid.offsets)
    steps = spread(grid.steps)
    steps = torch.where(steps == 0, torch.ones_like(steps), steps)
    zeros = 0.0 if grid.zeros is None else spread(grid.zeros)
    codes = grid.codes.float()
    return (codes - zeros + (found / steps + zeros - codes).clamp_(-_CELL, _CELL)) * steps


def in_stored_order(
    original: Tensor,  # (rows, columns), columns in the model's order
    grid: TrainedGrid,
) -> Tensor:
    """What the codes stand for: float32, columns in stored order, without the correction."""
    found = original.detach().float()
    if grid.correction is not None:
        found = grid.correction.without(found)
    return found if grid.order is None else found.index_select(1, grid.order)


def grouped(
    values: Tensor,  # (rows, columns), columns in stored order
    grid: TrainedGrid,
) -> Tensor:
    """(rows, groups, width); a short last group is filled up with zeros."""
    groups = grid.steps.shape[1]
    short = groups * grid.width - values.shape[1]
    if short > 0:
        values = torch.nn.functional.pad(values, (0, short))
    return values.view(len(values), groups, grid.width)
