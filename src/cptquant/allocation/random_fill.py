"""A random plan that fills the budget: what a table must beat to be worth measuring."""

import random
from dataclasses import dataclass
from typing import ClassVar

from cptquant.allocation.problem import Problem, Solution
from cptquant.core.plan import SolverStatus


@dataclass(frozen=True)
class RandomFill:
    """Start at the fewest bytes and raise a random group to its next larger option until none fits.

    Single steps keep the widths near their mean, as plans are in practice; drawing whole formats would give the first
    groups 16 bits and starve the rest. The table is not looked at.
    """

    name: ClassVar[str] = "random"
    needs_table: ClassVar[bool] = False

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Draw with `random.Random(seed)`."""
        draw = random.Random(seed)
        ladders = [_ladder([option.size_bytes for option in group.options]) for group in problem.groups]
        rungs = [0] * len(ladders)
        spare = problem.limit_bytes - problem.smallest_bytes
        open_groups = [i for i, ladder in enumerate(ladders) if len(ladder) > 1]
        while open_groups:
            position = draw.randrange(len(open_groups))
            i = open_groups[position]
            options, ladder = problem.groups[i].options, ladders[i]
            step = options[ladder[rungs[i] + 1]].size_bytes - options[ladder[rungs[i]]].size_bytes
            fits = step <= spare
            if fits:
                spare -= step
                rungs[i] += 1
            if not fits or rungs[i] + 1 == len(ladder):  # room only shrinks, so a step that does not fit never will
                open_groups[position] = open_groups[-1]
                open_groups.pop()
        choice = tuple(ladder[rung] for ladder, rung in zip(ladders, rungs, strict=True))
        return Solution(choice, SolverStatus.HEURISTIC, notes=(f"random steps drawn with seed {seed}",))


def _ladder(sizes_bytes: list[int]) -> list[int]:
    """Option indices from few bytes to many, one per distinct size."""
    first_of = {size: j for j, size in reversed(list(enumerate(sizes_bytes)))}
    return [first_of[size] for size in sorted(first_of)]
