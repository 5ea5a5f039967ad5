"""Codes and scales of a matrix as variables of a gradient method: what learned rounding moves.

A matrix starts from a finished solution with codes q0 (GPTQ's here) and becomes, in the notation of SignRound
(arXiv 2309.05516, equation 3) and with every group's step s and zero point z,

    value = (clip(q0 + round(v), low, high) - z) s,      |v| <= reach,

with an offset v a weight and, where the format's scales are 16-bit floats, one s a group. GGUF's grids
(value = s q + b, with s and b products of super-scales and integers) are fixed once chosen: only v is learned there.

Gradients. With g = dL/dvalue, rounding is passed straight through (d round(v)/dv = 1): dL/dv = g s. Codes do not depend
on s, so dL/ds = sum over the group of g (q - z) is exact. v is kept where the code is inside its range, so clipping
needs no case of its own.

Corrected columns are fixed, and the codes of the others are learned around them. Of a product of low rank A B the left
factor may be learned as well, rounded to its 8 bits straight through: dL/dA = g B'.

v starts at W/s + z - q0 where that rounds to q0, else at the nearer end of q0's cell: how far the solution stands from
each neighbour is what the original weight says about it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.low_rank import RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, Correction, QuantizedWeight
from cptquant.quantizers.grid import code_range

Learnable = QuantizedWeight | BlockWeight | CorrectedWeight
"""What can be learned; matrices with groups of mixed width keep the solution that learning would start from."""
_CELL = 0.49
"""Largest start offset. Many of GPTQ's codes are not the nearest ones: these stand here, ready to flip."""


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
        left: of a product of low rank beside the codes, float32 (out_features, rank); None where there is none.
    """

    def __init__(self, start: Learnable, original: Tensor, *, reach: float, learns_scales: bool = True) -> None:
        self.start, self._reach = start, reach
        self._correction = start.correction if isinstance(start, CorrectedWeight) else None
        self.left = self._correction.columns() if isinstance(self._correction, LowRankCorrection) else None
        self._codes = start.base if isinstance(start, CorrectedWeight) else start
        self._low, self._high = _code_limits(self._codes)
        # One number a group of `_width` columns, (rows or 1, groups).
        self._steps, self._zeros, self._added, self._width = _grid_of(self._codes)
        self.scales = self._steps.clone() if learns_scales and isinstance(self._codes, QuantizedWeight) else None
        steps = self._spread(self._steps)
        safe = torch.where(steps == 0, torch.ones_like(steps), steps)
        self.offsets = (original.float() - start.dequantize()).div_(safe).clamp_(-_CELL, _CELL)
        self.offsets.clamp_(-reach, reach)
        self._fix_corrected()

    def codes(self) -> Tensor:
        """int8 (out_features, in_features)."""
        return self._float_codes().to(torch.int8)

    def value(self) -> Tensor:
        """The matrix as it would be stored now, float32; equal to `stored().dequantize()` bit for bit."""
        codes = self._float_codes()
        if self._zeros is not None:
            codes.sub_(self._spread(self._zeros))
        values = self._times(codes, self._stored_steps())
        if self._correction is not None:
            return self._present(self._correction).add_(values)
        return values if self._added is None else values.add_(self._spread(self._added))

    def stored(self) -> Learnable:
        """The present codes and scales in the form of the start."""
        start = self._codes
        if isinstance(start, BlockWeight) or self.scales is None:
            found: QuantizedWeight | BlockWeight = replace(start, codes=self.codes())
        else:
            steps = self._stored_steps().to(start.scales.dtype)
            found = replace(start, codes=self.codes(), scales=steps.view_as(start.scales))
        if isinstance(self.start, CorrectedWeight) and isinstance(found, QuantizedWeight):
            return replace(self.start, base=found, correction=self._present(self.start.correction))
        return found

    def gradients(
        self,
        gradient: Tensor,  # (out_features, in_features): dL/dvalue
        value: Tensor,  # what `value()` gave when the gradient was taken
    ) -> tuple[Tensor, Tensor | None]:
        """(dL/dv, shape of `offsets`; dL/dlog s, shape of `scales`, or None where they are fixed)."""
        by_scale = None
        if self.scales is not None:
            if self._correction is not None:
                value = self._present(self._correction).without(value)
            by_scale = self._sum_groups(gradient * value)  # s times the sum of g (q - z)
        return self._times(gradient, self._stored_steps()), by_scale

    def left_gradient(
        self,
        gradient: Tensor,  # (out_features, in_features): dL/dvalue
    ) -> Tensor | None:
        """dL/dleft, (out_features, rank); None where there is no product."""
        if not isinstance(self._correction, LowRankCorrection):
            return None
        return (gradient @ (self._correction.right.float() / RIGHT_UNIT).t()).float()  # coarse where that is allowed

    def left_unit(self) -> float:
        """The mean step of the grid, beside which changes of the left factor are told."""
        return float(self._stored_steps().abs().mean())

    def _present(self, correction: Correction) -> Correction:
        """With the left factor as it would be stored now."""
        if self.left is None or not isinstance(correction, LowRankCorrection):
            return correction
        codes = (self.left / correction.scales.float()).round_().clamp_(-128, 127).to(torch.int8)
        return correction if torch.equal(codes, correction.left) else replace(correction, left=codes)

    def move_(
        self,
        offsets: Tensor,  # (out_features, in_features): subtracted from v
        log_scales: Tensor | None,  # shape of `scales`: relative change, subtracted
    ) -> None:
        """One step, then back into the bounds."""
        self.offsets.sub_(offsets).clamp_(-self._reach, self._reach)
        self._fix_corrected()
        if log_scales is not None and self.scales is not None:
            self.scales.sub_(log_scales * self.scales)

    def _fix_corrected(self) -> None:
        """Corrected columns keep their codes."""
        fixed = None if self._correction is None else self._correction.fixed_columns
        if fixed is not None:
            self.offsets.index_fill_(1, fixed, 0.0)

    def _float_codes(self) -> Tensor:
        return self.offsets.round().add_(self._codes.codes).clamp_(self._low, self._high)

    def _stored_steps(self) -> Tensor:
        """Float32 (rows or 1, groups), rounded as they are stored; the start's where that is 0 or not finite."""
        if self.scales is None or isinstance(self._codes, BlockWeight):
            return self._steps
        stored = self.scales.to(self._codes.scales.dtype).float()
        return torch.where(torch.isfinite(stored) & (stored != 0), stored, self._steps)

    def _times(self, values: Tensor, per_group: Tensor) -> Tensor:
        """Every column times the number of its group."""
        rows, columns = values.shape
        groups = per_group.shape[1]
        if groups > 1 and groups * self._width == columns:
            return (values.reshape(rows, groups, -1) * per_group.unsqueeze(-1)).view(rows, columns)
        return values * self._spread(per_group)

    def _spread(self, per_group: Tensor) -> Tensor:
        """(rows or 1, groups) -> broadcastable against (rows, columns)."""
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self._width, dim=1)[:, : self._codes.shape[1]]

    def _sum_groups(self, values: Tensor) -> Tensor:
        """(rows, columns) -> sums a group, (rows or 1, groups)."""
        groups = self._steps.shape[1]
        short = groups * self._width - values.shape[1]
        if short > 0:
            values = torch.nn.functional.pad(values, (0, short))
        sums = values.view(values.shape[0], groups, -1).sum(dim=2)
        return sums.sum(dim=0, keepdim=True) if len(self._steps) == 1 else sums


def _code_limits(start: QuantizedWeight | BlockWeight) -> tuple[int, int]:
    if isinstance(start, BlockWeight):
        return start.layout.lowest_code, start.layout.highest_code
    return code_range(start.format)


def _grid_of(start: QuantizedWeight | BlockWeight) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Steps, zero points in codes and offsets in values, each float32 (rows or 1, groups); columns of a group."""
    if isinstance(start, BlockWeight):
        return start.sub_scales(), None, start.sub_offsets(), start.layout.sub_block
    granularity = start.format.granularity
    lines = start.scales.view(1, 1) if granularity == "tensor" else start.scales
    zeros = None if start.zeros is None else start.zeros.float().view_as(lines)
    return lines.float(), zeros, None, granularity if isinstance(granularity, int) else start.shape[1]
