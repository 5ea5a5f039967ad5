"""Uniform bits: one requested format at every site inside the blocks, the baseline every method must beat."""

from dataclasses import dataclass
from typing import ClassVar

from cptquant.allocation.outside import lowest_outside, outside_bytes, raise_outside
from cptquant.allocation.problem import Problem, Solution, refuse_limit
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import SolverStatus


@dataclass(frozen=True)
class Uniform:
    """The largest requested format that fits at every site inside the blocks.

    Sites outside the blocks (embedding, head, pooler) are never narrower than the blocks, and take the bytes that are
    left, the largest first. If no format fits that way, they may be narrower. The table is not looked at.
    """

    name: ClassVar[str] = "uniform"
    needs_table: ClassVar[bool] = False

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Choose the format.

        Raises:
            BudgetError: not even the smallest uniform plan fits.
        """
        smallest: list[int] = []
        for floor_is_blocks in (True, False):
            for fmt in reversed(problem.block_requests):
                outside = lowest_outside(problem, fmt.code_bits if floor_is_blocks else 0)
                inside_bytes = problem.fixed_bytes + problem.uniform_block_bytes(fmt)
                spare = problem.limit_bytes - inside_bytes - outside_bytes(problem, outside)
                if spare >= 0:
                    return _solution(problem, fmt, raise_outside(problem, outside, spare), narrower=not floor_is_blocks)
                smallest.append(problem.limit_bytes - spare)
        raise refuse_limit(problem, self.name, min(smallest))


def _solution(problem: Problem, fmt: QuantFormat, outside: dict[int, int], *, narrower: bool) -> Solution:
    choice = tuple(outside[i] if i in outside else group.option_of[fmt.name] for i, group in enumerate(problem.groups))
    notes = [f"every site inside the blocks has {fmt.name}, the largest offered format that fits"]
    if outside:
        rule = (
            "may be narrower than the blocks, or nothing would fit" if narrower else "are no narrower than the blocks"
        )
        notes.append(f"sites outside the blocks {rule} and take the bytes that are left, the largest site first")
    return Solution(choice, SolverStatus.HEURISTIC, notes=tuple(notes))
