"""GPTQ onto the blocks of GGUF: the recursion of `gptq.py` with grids that are fitted a super-block at a time.

On entering a super-block its super-scales, sub-scales and minima are chosen for the weights as compensated so far
(`block_grid.py`) and stay fixed while its columns are rounded and their errors spread; afterwards `block_descent.py`
improves codes and integers together.
"""

import torch
from torch import Tensor

from cptquant.core.gguf_types import BlockLayout
from cptquant.quantizers.block_descent import Placed, empty_placed
from cptquant.quantizers.block_grid import fit_blocks

_LEAF_COLUMNS = 16


class BlockLoop:
    """The columns of one stack of matrices on their way through GPTQ.

    Args:
        columns: float32 (in_features, rows of all matrices).
        feedback: U_kj / U_kk - I, strictly upper triangular.
        importance: (in_features,), the damped Hessian's diagonal; None counts all columns alike.
    """

    def __init__(
        self, columns: Tensor, feedback: Tensor, layout: BlockLayout, importance: Tensor | None, *, search: bool
    ) -> None:
        self._feedback, self._layout, self._importance, self._search = feedback, layout, importance, search
        self._compensated = columns.clone()
        self._error = torch.zeros_like(columns)
        self.placed: Placed = empty_placed(columns.shape[0], columns.shape[1], layout)

    def run(self) -> Placed:
        """Round all columns."""
        self._sweep(0, self._compensated.shape[0])
        return self.placed

    def _sweep(self, start: int, stop: int) -> None:
        """Columns start to stop, which have received all errors of the columns before `start`."""
        if stop - start <= _LEAF_COLUMNS:
            self._round_leaf(start, stop)
            return
        middle = self._split(start, stop)
        self._sweep(start, middle)
        feedback = self._feedback[start:middle, middle:stop]
        self._compensated[middle:stop].addmm_(feedback.t(), self._error[start:middle], alpha=-1)
        self._sweep(middle, stop)

    def _split(self, start: int, stop: int) -> int:
        """A middle on a block's edge if there is one inside, so that a block is complete when it is fitted."""
        width = self._layout.block_columns
        middle = round((start + stop) / 2 / width) * width
        if start < middle < stop:
            return middle
        return start + -(-(stop - start) // 2 // _LEAF_COLUMNS) * _LEAF_COLUMNS

    def _round_leaf(self, start: int, stop: int) -> None:
        layout, placed = self._layout, self.placed
        width = layout.block_columns
        if start % width == 0:
            rows = self._compensated[start : start + width].t().contiguous()
            importance = None if self._importance is None else self._importance[start : start + width]
            placed.set_grid(start // width, fit_blocks(rows, layout, importance, search=self._search))
        sub = start // layout.sub_block
        step, offset = placed.step(sub), placed.offset(sub)
        safe = torch.where(step == 0, torch.ones_like(step), step)
        for index in range(start, stop):
            column = self._compensated[index]
            codes = (column if offset is None else column - offset).div(safe).round_()
            codes = codes.clamp_(layout.lowest_code, layout.highest_code)
            placed.codes[index] = codes
            value = codes * step if offset is None else codes * step + offset
            error = torch.sub(column, value, out=self._error[index])
            if index + 1 < stop:
                self._compensated[index + 1 : stop].addr_(self._feedback[index, index + 1 : stop], error, alpha=-1)
