"""The real scale and offset of every sub-block of GGUF's blocks with minima, before they are stored in few bits.

    minimise sum_j h_j (a q_j + b - w_j)^2,   q_j the nearest code

over shrunken min-max grids, then by alternating codes with the least-squares (a, b).
"""

import torch
from torch import Tensor

from cptquant.core.gguf_types import BlockLayout

_SHRINKS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.9, 0.8), 5: (1.0, 0.95, 0.9)}
"""Code bits -> factors tried on each end of a sub-block's range."""
_ALTERNATIONS = 3


def fit_affine(
    rows: Tensor,  # (n, g) float32
    importance: Tensor,  # (n, g) float32, positive
    layout: BlockLayout,
    *,
    search: bool = True,
) -> tuple[Tensor, Tensor]:
    """Real scale (n,) > 0 or 0 and offset (n,) of every row; the offset is never positive with integer minima."""
    top = float(layout.highest_code)
    bounded = layout.minimum == "integer"
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    if bounded:
        low = low.clamp(max=0)
        high = torch.maximum(high, low)
    best = _BestAffine(rows, importance, top, bounded)
    shrinks = _SHRINKS[layout.code_bits] if search else (1.0,)
    middle = (low + high) / 2 if not bounded else torch.zeros_like(low)
    for shrink_low in shrinks:
        for shrink_high in shrinks:
            start = middle + (low - middle) * shrink_low
            best.consider((middle + (high - middle) * shrink_high - start).clamp(min=0) / top, start)
    for _ in range(_ALTERNATIONS if search else 0):
        best.refit()
    return best.step, best.offset


class _BestAffine:
    """The best (scale, offset) seen so far, per row."""

    def __init__(self, rows: Tensor, importance: Tensor, top: float, bounded: bool) -> None:
        self._rows, self._importance, self._top, self._bounded = rows, importance, top, bounded
        self.step, self.offset = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
        self._error = rows.new_full((len(rows),), torch.inf)
        self._sums = (importance.sum(dim=1), (importance * rows).sum(dim=1))

    def consider(self, step: Tensor, offset: Tensor) -> None:
        """Keep it in the rows where it is better than what was seen."""
        codes = self._codes(step, offset)
        error = codes.mul_(step[:, None]).add_(offset[:, None]).sub_(self._rows).square_().mul_(self._importance).sum(1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.step = torch.where(better, step, self.step)
        self.offset = torch.where(better, offset, self.offset)

    def refit(self) -> None:
        """Least-squares scale and offset for the codes of the best grid."""
        codes = self._codes(self.step, self.offset)
        weighted = self._importance * codes
        total, total_rows = self._sums
        first, second, cross = weighted.sum(1), (weighted * codes).sum(1), (weighted * self._rows).sum(1)
        determinant = total * second - first.square()
        step = (total * cross - first * total_rows) / determinant
        offset = (total_rows - step * first) / total
        if self._bounded:
            alone = cross / second
            step, offset = torch.where(offset > 0, alone, step), offset.clamp(max=0)
        usable = torch.isfinite(step) & torch.isfinite(offset) & (step > 0)
        self.consider(torch.where(usable, step, self.step), torch.where(usable, offset, self.offset))

    def _codes(self, step: Tensor, offset: Tensor) -> Tensor:
        safe = torch.where(step == 0, torch.ones_like(step), step)
        return (self._rows - offset[:, None]).div_(safe[:, None]).round_().clamp_(0, self._top)
