"""Codes and scales of a matrix as variables of a gradient method: what learned rounding moves.

A matrix starts from a finished solution with codes q0 (GPTQ's here) and becomes, in the notation of SignRound
(arXiv 2309.05516, equation 3) and with every group's step s and zero point z,

    value = (clip(q0 + round(v), low, high) - z) s,      |v| <= reach,

with an offset v a weight and, where the format's scales are 16-bit floats, one s a group. GGUF's grids
(value = s q + b, with s and b products of super-scales and integers) are fixed once chosen: only v is learned there.

Gradients. With g = dL/dvalue, rounding is passed straight through (d round(v)/dv = 1): dL/dv = g s. Codes do not depend
on s, so dL/ds = sum over the group of g (q - z) is exact. v is kept where the code is inside its range, so clipping
needs no case of its own.

v starts at W/s + z - q0 where that rounds to q0, else at the nearer end of q0's cell: how far the solution stands from
each neighbour is what the original weight says about it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.quantized_weight import QuantizedWeight, StoredWeight
from cptquant.quantizers.grid import code_range

_CELL = 0.499
"""Largest start offset: rounds to 0 whatever float32 does."""


class LearnedWeight:
    """One matrix while it is learned.

    Args:
        start: the finished solution; not changed.
        original: the weight it stands for, (out_features, in_features), any float dtype.
        reach: largest offset; a code moves by at most round(reach) from the start.
        learns_scales: False keeps every scale.

    Attributes:
        offsets: v, float32 (out_features, in_features).
        scales: float32, shape of the stored scales; None where they are fixed.
    """

    def __init__(self, start: StoredWeight, original: Tensor, *, reach: float, learns_scales: bool = True) -> None:
        self.start, self._reach = start, reach
        rows, columns = start.shape
        self._low, self._high = _code_limits(start)
        # One number a group of `_width` columns, (rows or 1, groups).
        self._steps, self._shift, self._width = _grid_of(start, columns)
        self._lines = self._steps.shape[0]
        self._learns_scales = learns_scales and isinstance(start, QuantizedWeight)
        self.scales = self._steps.clone() if self._learns_scales else None
        steps = self._spread(self._steps)
        safe = torch.where(steps == 0, torch.ones_like(steps), steps)
        exact = original.float().sub(self._added(start.codes.float())).div_(safe)
        self.offsets = exact.clamp_(-_CELL, _CELL).expand(rows, columns).contiguous()
        self.offsets.clamp_(-reach, reach)

    def codes(self) -> Tensor:
        """int8 (out_features, in_features)."""
        return (self.start.codes.float() + self.offsets.round()).clamp_(self._low, self._high).to(torch.int8)

    def value(self) -> Tensor:
        """The matrix as it would be stored now, float32; equal to `stored().dequantize()` bit for bit."""
        return self.stored().dequantize()

    def stored(self) -> StoredWeight:
        """The present codes and scales in the form of the start."""
        if isinstance(self.start, BlockWeight):
            return replace(self.start, codes=self.codes())
        return replace(self.start, codes=self.codes(), scales=self._stored_scales(self.start))

    def gradients(
        self,
        gradient: Tensor,  # (out_features, in_features): dL/dvalue
        value: Tensor,  # what `value()` gave when the gradient was taken
    ) -> tuple[Tensor, Tensor | None]:
        """(dL/dv, shape of `offsets`; dL/dlog s, shape of `scales`, or None where they are fixed)."""
        by_scale = None
        steps = self._steps
        if self.scales is not None:
            assert isinstance(self.start, QuantizedWeight)
            steps = self._stored_scales(self.start).float().view_as(self._steps)
            by_scale = self._sum_groups(gradient * value)  # s times the sum of g (q - z)
        return gradient * self._spread(steps), by_scale

    def move_(
        self,
        offsets: Tensor,  # (out_features, in_features): subtracted from v
        log_scales: Tensor | None,  # shape of `scales`: relative change, subtracted
    ) -> None:
        """One step, then back into the bounds."""
        self.offsets.sub_(offsets).clamp_(-self._reach, self._reach)
        if log_scales is not None and self.scales is not None:
            self.scales.sub_(log_scales * self.scales)

    def _stored_scales(self, start: QuantizedWeight) -> Tensor:
        assert self.scales is not None or not self._learns_scales
        if self.scales is None:
            return start.scales
        stored = self.scales.to(start.scales.dtype).view_as(start.scales)
        return torch.where(torch.isfinite(stored) & (stored != 0), stored, start.scales)

    def _added(self, codes: Tensor) -> Tensor:
        """The start's values, to subtract from the original."""
        values = codes - (0 if self._shift is None else self._spread(self._shift))
        values = values * self._spread(self._steps)
        offsets = self.start.sub_offsets() if isinstance(self.start, BlockWeight) else None
        return values if offsets is None else values + self._spread(offsets)

    def _spread(self, per_group: Tensor) -> Tensor:
        """(rows or 1, groups) -> broadcastable against (rows, columns)."""
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self._width, dim=1)[:, : self.start.shape[1]]

    def _sum_groups(self, values: Tensor) -> Tensor:
        """(rows, columns) -> sums a group, (rows or 1, groups)."""
        groups = self._steps.shape[1]
        short = groups * self._width - values.shape[1]
        if short > 0:
            values = torch.nn.functional.pad(values, (0, short))
        sums = values.view(values.shape[0], groups, -1).sum(dim=2)
        return sums.sum(dim=0, keepdim=True) if self._lines == 1 else sums


def _code_limits(start: StoredWeight) -> tuple[int, int]:
    if isinstance(start, BlockWeight):
        return start.layout.lowest_code, start.layout.highest_code
    return code_range(start.format)


def _grid_of(start: StoredWeight, columns: int) -> tuple[Tensor, Tensor | None, int]:
    """Steps and zero points, float32 (rows or 1, groups), and the columns of a group."""
    if isinstance(start, BlockWeight):
        return start.sub_scales(), None, start.layout.sub_block
    lines = start.scales.view(1, 1) if start.format.granularity == "tensor" else start.scales
    zeros = None if start.zeros is None else start.zeros.float().view_as(lines)
    width = start.format.granularity if isinstance(start.format.granularity, int) else columns
    return lines.float(), zeros, width
