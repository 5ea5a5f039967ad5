"""Coordinate descent on codes and scales: what is left to gain once GPTQ has gone through the columns once.

GPTQ decides each column for good while the later ones are still real numbers. Afterwards, with all codes known, the
squared output error

    f(Q) = tr((W - Q) H (W - Q)'),   Q = code * scale

can only fall when (1) all scales of a row are replaced by their least-squares values for these codes, a small linear
system per row, and (2) each column in turn is rounded anew to its best value given all others:

    Q_j  <-  round(Q_j + [(W - Q) H]_j / H_jj).

Step 2 is QuantEase (arXiv 2309.01885, equation 8), alternating with the scales is COMQ (arXiv 2403.07134). What we
changed: the scales of all groups of a row are solved for together instead of one by one, rounded to 16 bits, and kept
only in rows where f falls; H is GPTQ's damped Hessian, so that directions the calibration text never showed stay quiet.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.packing.segments import round_one_bit_scale
from cptquant.quantizers.grid import code_range

_BLOCK_COLUMNS = 32
"""Columns between two products with the whole Hessian."""
_SYSTEM_ENTRIES = 1 << 22
"""Entries of the rows' linear systems held at a time."""
_RIDGE = 1e-6
"""Of the mean diagonal of a row's system: decides where two groups' scales cannot be told apart."""


@dataclass
class Rounded:
    """A stack of rounded matrices, columns first; changed in place by `descend_`.

    Attributes:
        shifted: code - zero, float32 of integers (columns, rows).
        scales: float32 (groups, rows), representable in `scale_dtype`; (1, 1) if one scale serves the whole matrix.
        low, high: smallest and largest `shifted`, float32, shape of `scales`.
        group_columns: consecutive columns per scale; the last group may be shorter.
        scale_dtype: float16 or bfloat16.
        fractions: float32 (groups, rows), what is added to `shifted` to make it an integer, where that is not 0
            already (one-bit groups, whose mean is a fractional zero point); None if it is 0 everywhere.
        one_bit: bool (groups,), groups whose scale is stored as `round_one_bit_scale` does; None if there are none.
    """

    shifted: Tensor
    scales: Tensor
    low: Tensor
    high: Tensor
    group_columns: int
    scale_dtype: torch.dtype
    fractions: Tensor | None = None
    one_bit: Tensor | None = None

    def values(self) -> Tensor:
        """What is stored: float32 (columns, rows)."""
        return self.shifted * self.scales.repeat_interleave(self.group_columns, dim=0)[: self.shifted.shape[0]]


def descend_(
    rounded: Rounded,
    weight: Tensor,  # (columns, rows) float32
    hessian: Tensor,  # (columns, columns) float32, positive diagonal
    rounds: int,
) -> None:
    """Lower f by refitting the scales and sweeping over the columns, `rounds` times.

    f never rises in any row, apart from float32 rounding. Rows do not influence each other, except through a scale
    they share. A round costs about two and a half products of the Hessian with the weight.
    """
    target = hessian @ weight
    gradient = target - hessian @ rounded.values()
    for _ in range(rounds):
        gradient = _refit_scales_(rounded, weight, hessian, target, gradient)
        _sweep_(rounded, hessian, gradient)


def descend_stored(
    weight: QuantizedWeight,
    target: Tensor,  # (rows, columns) float32: what it should stand for now
    hessian: Tensor,  # (columns, columns) float32, positive diagonal
    rounds: int,
) -> QuantizedWeight:
    """Descent from a finished matrix, towards another target than it was made for; zero points stay."""
    columns = weight.shape[1]
    one = weight.format.granularity == "tensor"
    scales = weight.scales.float().view(1, 1) if one else weight.scales.float().t().contiguous()
    zeros = torch.zeros_like(scales) if weight.zeros is None else weight.zeros.float().reshape(-1, len(scales)).t()
    width = weight.format.granularity if isinstance(weight.format.granularity, int) else columns
    spread = zeros.repeat_interleave(width, dim=0)[:columns]
    low, high = code_range(weight.format)
    rounded = Rounded(weight.codes.float().t() - spread, scales, low - zeros, high - zeros, width, weight.scales.dtype)
    descend_(rounded, target.t().contiguous(), hessian, rounds)
    codes = (rounded.shifted + spread).t().to(torch.int8).contiguous()
    return replace(weight, codes=codes, scales=rounded.scales.t().to(weight.scales.dtype).reshape(weight.scales.shape))


def _refit_scales_(rounded: Rounded, weight: Tensor, hessian: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Least-squares scales where they lower f. Takes and returns H (W - Q), (columns, rows)."""
    before = ((weight - rounded.values()) * gradient).sum(dim=0)
    kept = rounded.scales
    rounded.scales = _storable(_solve_scales(rounded, hessian, target), rounded)
    new = rounded.values()
    new_gradient = target - hessian @ new
    after = ((weight - new) * new_gradient).sum(dim=0)
    if kept.shape[1] == 1 and weight.shape[1] > 1:  # one scale for all rows: they rise or fall together
        before, after = before.sum(), after.sum()
    better = after < before
    rounded.scales = torch.where(better, rounded.scales, kept)
    return torch.where(better, new_gradient, gradient)


def _solve_scales(rounded: Rounded, hessian: Tensor, target: Tensor) -> Tensor:
    """argmin over the scales s of f, per row: sum_h <c_g, H c_h> s_h = <c_g, H w>, c_g the codes of group g."""
    groups, lines = rounded.scales.shape
    rows = rounded.shifted.shape[1]
    if groups == 1:
        system = (rounded.shifted * (hessian @ rounded.shifted)).sum(dim=0, keepdim=True)
        right = (rounded.shifted * target).sum(dim=0, keepdim=True)
        if lines != rows:  # one scale for the whole matrix
            system, right = system.sum(dim=1, keepdim=True), right.sum(dim=1, keepdim=True)
        return right / system
    solved = torch.empty_like(rounded.scales)
    step = max(1, _SYSTEM_ENTRIES // (groups * groups))
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        codes = rounded.shifted[:, chunk]
        system = codes.new_zeros(codes.shape[1], groups, groups)
        for group in range(groups):
            first = group * rounded.group_columns
            member = slice(first, first + rounded.group_columns)
            product = hessian[first:, member] @ codes[member]
            system[:, group:, group] = _sum_by_group(product.mul_(codes[first:]), rounded.group_columns).t()
        right = _sum_by_group(target[:, chunk] * codes, rounded.group_columns)
        diagonal = system.diagonal(dim1=1, dim2=2)
        ridge = _RIDGE * diagonal.mean(dim=1, keepdim=True)
        diagonal.add_(ridge).clamp_(min=torch.finfo(torch.float32).tiny)
        system += system.tril(-1).mT
        solved[:, chunk] = torch.linalg.solve(system, right.t()).t()
    return solved


def _sum_by_group(
    values: Tensor,  # (columns, rows), beginning at a group's first column
    group_columns: int,
) -> Tensor:
    """(groups, rows)."""
    columns, rows = values.shape
    if columns % group_columns == 0:
        return values.view(-1, group_columns, rows).sum(dim=1)
    group_of = torch.arange(columns, device=values.device) // group_columns
    return values.new_zeros(int(group_of[-1]) + 1, rows).index_add_(0, group_of, values)


def _storable(scales: Tensor, rounded: Rounded) -> Tensor:
    """Rounded to 16 bits; the old scale where the new one is 0, infinite or undefined (a group of zero codes)."""
    stored = scales.to(rounded.scale_dtype).float()
    usable = torch.isfinite(stored) & (stored != 0)
    if rounded.one_bit is not None:
        stored = torch.where(rounded.one_bit[:, None], round_one_bit_scale(scales), stored)
        usable &= ~rounded.one_bit[:, None] | (scales > 0)  # a one-bit group's scale has no sign
    return torch.where(usable, stored, rounded.scales)


def _sweep_(rounded: Rounded, hessian: Tensor, gradient: Tensor) -> None:
    """Round every column anew, given all others; `gradient` is H (W - Q) and is kept up to date."""
    columns, width = rounded.shifted.shape[0], rounded.group_columns
    inverse_diagonal = hessian.diagonal().reciprocal().tolist()
    # One column is a few short calls: views are made once, and constant limits are numbers.
    codes, scales = rounded.shifted.unbind(0), rounded.scales.unbind(0)
    limits, fractions = _limits(rounded), _fractions(rounded)
    for start in range(0, columns, _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, columns)
        local = gradient[start:stop].clone()
        change = torch.empty_like(local)
        for row, (index, residual, moved_by) in enumerate(
            zip(range(start, stop), local.unbind(0), change.unbind(0), strict=True)
        ):
            group, code = index // width, codes[index]
            # In units of the scale: where this column's code should be, nearest integer, and how far that moves it.
            moved = torch.addcdiv(code, residual, scales[group], value=inverse_diagonal[index])
            low, high = limits[group]
            fraction = fractions[group]
            rounds = moved.round_() if fraction is None else moved.add_(fraction).round_().sub_(fraction)
            torch.clamp(rounds, low, high, out=moved)
            torch.sub(moved, code, out=moved_by).mul_(scales[group])
            code.copy_(moved)
            if index + 1 < stop:
                local[row + 1 :].addr_(hessian[index + 1 : stop, index], moved_by, alpha=-1)
        gradient.addmm_(hessian[:, start:stop], change, alpha=-1)


def _limits(rounded: Rounded) -> list[tuple[Any, Any]]:
    """Smallest and largest code of each group: numbers where all rows share them (symmetric formats)."""
    low, high = rounded.low, rounded.high
    constant = ((low == low[:, :1]) & (high == high[:, :1])).all(dim=1).tolist()
    return [
        (float(low[group, 0]), float(high[group, 0])) if is_constant else (low[group], high[group])
        for group, is_constant in enumerate(constant)
    ]


def _fractions(rounded: Rounded) -> list[Tensor | None]:
    """What makes each group's `shifted` integers; None where it is an integer already."""
    groups = len(rounded.scales)
    if rounded.fractions is None or rounded.one_bit is None:
        return [None] * groups
    return [
        rounded.fractions[group] if is_one_bit else None for group, is_one_bit in enumerate(rounded.one_bit.tolist())
    ]
