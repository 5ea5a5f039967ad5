"""Coordinate descent on a grid of GGUF blocks: codes, integer sub-scales and minima, and the float16 super-scales.

As in `descent.py`, f(Q) = tr((W - Q) H (W - Q)') can only fall. A sweep goes through the columns 32 at a time. In
every sub-block first the scale and minimum are set anew, codes fixed: f is a quadratic in the two, the real optimum is
found, and of the integers around it the best pair is taken if it lowers f (where the scale is a float16 of its own, the
rounded optimum). Neighbouring scales are also tried together with codes rounded anew, a move that no coordinate alone
can make. Then each column is rounded to its best code given all others (QuantEase, arXiv 2309.01885, equation 8). When
the last column of a super-block is done, its d and dmin are refitted the same way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import BlockLayout
from cptquant.packing.block_weight import BlockWeight
from cptquant.quantizers.block_grid import BlockGrid, assemble, to_half

_BLOCK_COLUMNS = 32
_JOINT_STEPS = {2: (-1.0, 1.0), 3: (-1.0, 1.0)}
"""Code bits -> changes of the integer scale that are tried together with new codes."""


@dataclass
class Placed:
    """Matrices on their grid, columns first; changed in place.

    Attributes:
        codes: float32 of integers (columns, rows). d, minimum: float32 (blocks, rows).
        scales, minimum_codes: float32 of integers (sub-blocks, rows).
    """

    layout: BlockLayout
    codes: Tensor
    d: Tensor
    scales: Tensor | None
    minimum: Tensor | None
    minimum_codes: Tensor | None

    def step(self, sub: int) -> Tensor:
        """Scale of a sub-block, (rows,)."""
        d = self.d[self._block(sub)]
        return d if self.scales is None else d * self.scales[sub]

    def offset(self, sub: int) -> Tensor | None:
        """Offset of a sub-block, (rows,)."""
        if self.minimum is None:
            return None
        minimum = self.minimum[self._block(sub)]
        return minimum if self.minimum_codes is None else -(minimum * self.minimum_codes[sub])

    def columns_of(self, sub: int) -> slice:
        """Columns of a sub-block."""
        return slice(sub * self.layout.sub_block, (sub + 1) * self.layout.sub_block)

    def set_grid(self, block: int, grid: BlockGrid) -> None:
        """Take over the grid fitted to one column of blocks (its lines are our rows)."""
        per_block = self.layout.block_columns // self.layout.sub_block
        subs = slice(block * per_block, (block + 1) * per_block)
        self.d[block] = grid.d[:, 0]
        for mine, theirs in ((self.scales, grid.scales), (self.minimum_codes, grid.minimum_codes)):
            if mine is not None and theirs is not None:
                mine[subs] = theirs.t()
        if self.minimum is not None and grid.minimum is not None:
            self.minimum[block] = grid.minimum[:, 0]

    def values(self) -> Tensor:
        """What is stored: float32 (columns, rows)."""
        subs = self.codes.shape[0] // self.layout.sub_block
        values = (
            self.codes.view(subs, self.layout.sub_block, -1) * torch.stack([self.step(s) for s in range(subs)])[:, None]
        )
        if self.minimum is not None:
            values += torch.stack([self._known_offset(sub) for sub in range(subs)])[:, None]
        return values.view_as(self.codes)

    def weight(self, rows: slice, fmt: QuantFormat) -> BlockWeight:
        """Some rows, as they are stored."""

        def turned(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, rows].t().contiguous()

        d = turned(self.d)
        assert d is not None
        grid = BlockGrid(self.layout, d, turned(self.scales), turned(self.minimum), turned(self.minimum_codes))
        return assemble(fmt, self.codes[:, rows].t().contiguous(), grid)

    def _known_offset(self, sub: int) -> Tensor:
        offset = self.offset(sub)
        assert offset is not None
        return offset

    def _block(self, sub: int) -> int:
        return sub * self.layout.sub_block // self.layout.block_columns


def empty_placed(columns: int, rows: int, layout: BlockLayout) -> Placed:
    """Codes and scales to be filled."""
    blocks, subs = columns // layout.block_columns, columns // layout.sub_block
    return Placed(
        layout,
        torch.zeros(columns, rows),
        torch.zeros(blocks, rows),
        torch.zeros(subs, rows) if layout.scale_range else None,
        None if layout.symmetric else torch.zeros(blocks, rows),
        torch.zeros(subs, rows) if layout.minimum_range else None,
    )


def descend_blocks_(
    placed: Placed,
    weight: Tensor,  # (columns, rows) float32
    hessian: Tensor,  # (columns, columns) float32, positive diagonal
    rounds: int,
) -> None:
    """Lower f by sweeping over the columns `rounds` times; f never rises in any row, apart from float32 rounding."""
    gradient = hessian @ (weight - placed.values())
    for _ in range(rounds):
        sweep = _Sweep(placed, hessian, gradient)
        for start in range(0, weight.shape[0], _BLOCK_COLUMNS):
            sweep.take(start)
            if (start + _BLOCK_COLUMNS) % placed.layout.block_columns == 0 and placed.scales is not None:
                sweep.refit_super(start // placed.layout.block_columns)


class _Sweep:
    """One pass over the columns; `gradient` is H (W - Q) and is kept up to date."""

    def __init__(self, placed: Placed, hessian: Tensor, gradient: Tensor) -> None:
        self._placed, self._hessian, self._gradient = placed, hessian, gradient
        self._diagonal = hessian.diagonal().tolist()

    def take(self, start: int) -> None:
        """Columns start to start + 32: grids of their sub-blocks, then their codes."""
        stop = start + _BLOCK_COLUMNS
        width = self._placed.layout.sub_block
        local = self._gradient[start:stop].clone()
        square = self._hessian[start:stop, start:stop]
        change = torch.zeros_like(local)
        for first in range(0, _BLOCK_COLUMNS, width):
            sub = (start + first) // width
            part = slice(first, first + width)
            before = self._values_of(sub)
            block_hessian = square[part, part].contiguous()
            self._refit_sub(sub, block_hessian, local[part])
            self._try_joint(sub, block_hessian, local[part] - block_hessian @ (self._values_of(sub) - before))
            moved = self._values_of(sub) - before
            local -= square[:, part] @ moved
            change[part] += moved
            self._round_columns(sub, first, square, local, change)
        self._gradient.addmm_(self._hessian[:, start:stop], change, alpha=-1)

    def _values_of(self, sub: int) -> Tensor:
        placed = self._placed
        values = placed.codes[placed.columns_of(sub)] * placed.step(sub)
        offset = placed.offset(sub)
        return values if offset is None else values + offset

    def _round_columns(self, sub: int, first: int, square: Tensor, local: Tensor, change: Tensor) -> None:
        placed = self._placed
        layout, step = placed.layout, placed.step(sub)
        safe = torch.where(step == 0, torch.ones_like(step), step)
        base = placed.columns_of(sub).start
        for index in range(first, first + layout.sub_block):
            column = base + index - first
            codes = placed.codes[column]
            moved = torch.div(local[index], safe).div_(self._diagonal[column]).add_(codes)
            moved = moved.round_().clamp_(layout.lowest_code, layout.highest_code)
            difference = (moved - codes).mul_(step)
            placed.codes[column] = moved
            change[index] += difference
            local[index:].addr_(square[index:, index], difference, alpha=-1)

    # The grid of a sub-block, codes fixed.

    def _refit_sub(
        self,
        sub: int,
        hessian: Tensor,  # (sub_block, sub_block)
        gradient: Tensor,  # (sub_block, rows)
    ) -> None:
        placed = self._placed
        form = _Quadratic.of(placed.codes[placed.columns_of(sub)], hessian, gradient, placed.minimum is not None)
        step, offset = placed.step(sub), placed.offset(sub)
        block = placed._block(sub)
        if placed.scales is None:
            self._refit_floats(block, form, step, offset)
            return
        assert placed.layout.scale_range is not None
        d = placed.d[block]
        safe = torch.where(d == 0, torch.ones_like(d), d)
        wanted = (step + form.best_step()) / safe
        best_scale, best_minimum = placed.scales[sub].clone(), None
        least = torch.zeros_like(d)
        if placed.minimum_codes is not None:
            best_minimum = placed.minimum_codes[sub].clone()
        for scale in (wanted.floor(), wanted.ceil(), placed.scales[sub]):
            scale = scale.clamp(*placed.layout.scale_range)
            step_change = d * scale - step
            minima, offset_change = self._minimum_for(block, form, step_change, offset)
            fall = form.change(step_change, offset_change)
            better = fall < least
            least = torch.where(better, fall, least)
            best_scale = torch.where(better, scale, best_scale)
            if minima is not None and best_minimum is not None:
                best_minimum = torch.where(better, minima, best_minimum)
        placed.scales[sub] = best_scale
        if placed.minimum_codes is not None and best_minimum is not None:
            placed.minimum_codes[sub] = best_minimum

    def _minimum_for(
        self, block: int, form: "_Quadratic", step_change: Tensor, offset: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The integer minimum that goes best with a change of the scale."""
        placed = self._placed
        if placed.minimum is None or offset is None or placed.layout.minimum_range is None:
            return None, None
        unit = placed.minimum[block]
        safe = torch.where(unit == 0, torch.ones_like(unit), unit)
        wanted = -(offset + form.best_offset(step_change)) / safe
        minima = wanted.round().clamp(*placed.layout.minimum_range)
        return minima, -(unit * minima) - offset

    def _refit_floats(self, block: int, form: "_Quadratic", step: Tensor, offset: Tensor | None) -> None:
        placed = self._placed
        if placed.minimum is None or offset is None:
            new = _half_or(step + form.best_step(), step)
            better = form.change(new - step, None) < 0
            placed.d[block] = torch.where(better, new, step)
            return
        step_change, offset_change = form.best_pair()
        new, new_offset = _half_or(step + step_change, step), _half_or(offset + offset_change, offset)
        better = form.change(new - step, new_offset - offset) < 0
        placed.d[block] = torch.where(better, new, step)
        placed.minimum[block] = torch.where(better, new_offset, offset)

    def _try_joint(self, sub: int, hessian: Tensor, gradient: Tensor) -> None:
        """Another integer scale with codes rounded anew, one column after the other; kept where f falls."""
        placed = self._placed
        steps = _JOINT_STEPS.get(placed.layout.code_bits, ())
        if placed.scales is None or not steps:
            return
        assert placed.layout.scale_range is not None
        columns, block = placed.columns_of(sub), placed._block(sub)
        before, old_scale, old_codes = self._values_of(sub), placed.scales[sub].clone(), placed.codes[columns].clone()
        offset = placed.offset(sub)
        least, best_scale, best_codes = torch.zeros_like(old_scale), old_scale, old_codes
        diagonal = hessian.diagonal()
        for step_change in steps:
            scale = (old_scale + step_change).clamp(*placed.layout.scale_range)
            step = placed.d[block] * scale
            codes = _round_in_turn(before, offset, step, hessian, gradient, placed.layout)
            values = codes * step if offset is None else codes * step + offset
            moved = values - before
            fall = (moved * (hessian @ moved - 2 * gradient)).sum(0)
            better = fall < least - 1e-7 * diagonal.mean() * before.square().sum(0)
            least = torch.where(better, fall, least)
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better, codes, best_codes)
        placed.scales[sub] = best_scale
        placed.codes[columns] = best_codes

    # The super-scales, integers fixed.

    def refit_super(self, block: int) -> None:
        """d and dmin of one super-block where that lowers f."""
        placed = self._placed
        assert placed.scales is not None
        width, sub_block = placed.layout.block_columns, placed.layout.sub_block
        columns = slice(block * width, (block + 1) * width)
        subs = slice(columns.start // sub_block, columns.stop // sub_block)
        square = self._hessian[columns, columns]
        gradient = self._gradient[columns]
        first = placed.codes[columns] * placed.scales[subs].repeat_interleave(sub_block, dim=0)
        d = placed.d[block].clone()
        if placed.minimum is None or placed.minimum_codes is None:
            form = _Quadratic.of(first, square, gradient, False)
            new = _half_or(d + form.best_step(), d)
            placed.d[block] = torch.where(form.change(new - d, None) < 0, new, d)
            moved = first * (placed.d[block] - d)
        else:
            second = -placed.minimum_codes[subs].repeat_interleave(sub_block, dim=0)
            form = _Quadratic.of(first, square, gradient, True, second)
            minimum = placed.minimum[block].clone()
            d_change, minimum_change = form.best_pair()
            new = _half_or((d + d_change).clamp(min=0), d)
            new_minimum = _half_or((minimum + minimum_change).clamp(min=0), minimum)
            better = form.change(new - d, new_minimum - minimum) < 0
            placed.d[block] = torch.where(better, new, d)
            placed.minimum[block] = torch.where(better, new_minimum, minimum)
            moved = first * (placed.d[block] - d) + second * (placed.minimum[block] - minimum)
        self._gradient.addmm_(self._hessian[:, columns], moved, alpha=-1)


def _half_or(wanted: Tensor, otherwise: Tensor) -> Tensor:
    """Rounded to float16; the old value where the new one is undefined or would vanish."""
    usable = torch.isfinite(wanted) & (wanted.abs() < 65504) & (wanted != 0)
    return to_half(torch.where(usable, wanted, otherwise))


def _round_in_turn(
    before: Tensor,  # (sub_block, rows): values now
    offset: Tensor | None,
    step: Tensor,  # (rows,)
    hessian: Tensor,  # (sub_block, sub_block)
    gradient: Tensor,  # (sub_block, rows): H (W - Q) at `before`
    layout: BlockLayout,
) -> Tensor:
    """Codes on another scale, each column given the ones before it in their new values and the later in their old."""
    local = gradient.clone()
    codes = torch.empty_like(before)
    safe = torch.where(step == 0, torch.ones_like(step), step)
    for index in range(before.shape[0]):
        wanted = before[index] + local[index] / hessian[index, index]
        if offset is not None:
            wanted = wanted - offset
        codes[index] = (wanted / safe).round_().clamp_(layout.lowest_code, layout.highest_code)
        value = codes[index] * step if offset is None else codes[index] * step + offset
        local.addr_(hessian[:, index], value - before[index], alpha=-1)
    return codes


@dataclass
class _Quadratic:
    """Change of f when a multiple x of one basis vector and y of another are added to Q, per row:

    -2 (x p + y q) + x^2 a + 2 x y b + y^2 c.
    """

    a: Tensor
    p: Tensor
    b: Tensor | None = None
    c: Tensor | None = None
    q: Tensor | None = None

    @classmethod
    def of(
        cls, first: Tensor, hessian: Tensor, gradient: Tensor, has_second: bool, second: Tensor | None = None
    ) -> "_Quadratic":
        """For basis vectors `first` and `second` (None: all ones), each (columns, rows)."""
        product = hessian @ first
        a, p = (first * product).sum(0), (first * gradient).sum(0)
        if not has_second:
            return cls(a, p)
        if second is None:
            total = hessian.sum()
            return cls(a, p, product.sum(0), total.expand_as(a), gradient.sum(0))
        return cls(a, p, (second * product).sum(0), (second * (hessian @ second)).sum(0), (second * gradient).sum(0))

    def best_step(self) -> Tensor:
        """x at the optimum of both, 0 where it is undefined."""
        return self.best_pair()[0]

    def best_pair(self) -> tuple[Tensor, Tensor]:
        """(x, y) at the optimum, 0 where it is undefined."""
        if self.b is None or self.c is None or self.q is None:
            return _defined(self.p / self.a), torch.zeros_like(self.p)
        determinant = self.a * self.c - self.b.square()
        safe = torch.where(determinant > 1e-6 * self.a * self.c, determinant, torch.nan)
        return _defined((self.c * self.p - self.b * self.q) / safe), _defined(
            (self.a * self.q - self.b * self.p) / safe
        )

    def best_offset(self, step_change: Tensor) -> Tensor:
        """y that goes best with a given x."""
        assert self.b is not None and self.c is not None and self.q is not None
        return _defined((self.q - self.b * step_change) / self.c)

    def change(self, x: Tensor, y: Tensor | None) -> Tensor:
        """f after minus f before."""
        total = x * (x * self.a - 2 * self.p)
        if y is None or self.b is None or self.c is None or self.q is None:
            return total
        return total + y * (y * self.c - 2 * self.q) + 2 * x * y * self.b


def _defined(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))
