"""The exact multiple-choice knapsack: the least total damage of the table within the bytes of the budget.

Relaxation, then dynamic programming over what it leaves open; why not a general solver is in
docs/decisions/0001-allocation-solver.md.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cptquant.allocation.core_search import DEFAULT_LIMITS, SearchLimits, close_core
from cptquant.allocation.problem import Problem, Solution
from cptquant.allocation.relaxation import FloatArray, IntArray, solve_relaxation, undominated_options
from cptquant.core.errors import ArtifactError
from cptquant.core.plan import SolverStatus


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of damages; of equal sums take fewer bytes.

    Attributes:
        limits: beyond them the search keeps the most promising partial choices, and the plan says GAP_BOUNDED with the
            gap that remains proven. Only tables whose damages are nearly linear in the bytes come near them.
    """

    name: ClassVar[str] = "knapsack"
    needs_table: ClassVar[bool] = True
    limits: SearchLimits = DEFAULT_LIMITS

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Solve.

        Raises:
            ArtifactError: there is no table to minimise.
        """
        if problem.table is None:
            raise ArtifactError(
                "--allocator knapsack minimises the damages of a sensitivity table and none was given; "
                "make one with: cptquant measure RUN --sensitivity METHOD, or choose --allocator uniform"
            )
        sizes, damages = option_arrays(problem)
        chosen, excess, candidates = solve_knapsack(
            sizes, damages, problem.limit_bytes - problem.fixed_bytes, self.limits
        )
        choice = tuple(int(j) for j in chosen)
        if excess == 0:
            return Solution(choice, SolverStatus.OPTIMAL, optimality_gap=0.0)
        gap = min(excess / problem.damage(choice), 1.0)
        note = f"the search was cut after {candidates:,} partial choices; a longer one could gain at most {gap:.2e}"
        return Solution(choice, SolverStatus.GAP_BOUNDED, optimality_gap=gap, notes=(note,))


def solve_knapsack(
    size_bytes: IntArray,  # (groups, width)
    damage: FloatArray,  # (groups, width), at least 0; +inf where a group has fewer options
    limit_bytes: int,
    limits: SearchLimits = DEFAULT_LIMITS,
) -> tuple[IntArray, float, int]:
    """Choose one column per group.

    Returns:
        The columns, (groups,) int64; a proven upper limit of the damage above the optimum, 0 if optimal (to rounding:
        1e-14 of the largest damage still open); the number of partial choices looked at.

    Raises:
        ValueError: the smallest options together exceed the limit.
    """
    options = undominated_options(size_bytes, _scaled(damage))
    if int(options.size_bytes[:, 0].sum()) > limit_bytes:
        raise ValueError(f"the smallest choice has {int(options.size_bytes[:, 0].sum())} bytes, limit {limit_bytes}")
    relaxation = solve_relaxation(options, limit_bytes)
    result = close_core(options, relaxation, limits)
    chosen = np.take_along_axis(options.index, result.columns[:, None], axis=1)[:, 0]
    return chosen, result.excess_damage * _unit(damage), result.candidate_count


def _unit(damage: FloatArray) -> float:
    """A power of two near the largest damage: dividing by it is exact, so equal sums stay equal."""
    largest = float(damage[np.isfinite(damage)].max(initial=0.0))
    return math.ldexp(1.0, math.frexp(largest)[1]) if largest > 0 else 1.0


def _scaled(damage: FloatArray) -> FloatArray:
    return damage / _unit(damage)


def option_arrays(problem: Problem) -> tuple[IntArray, FloatArray]:
    """Bytes and damage of every option, (groups, width); +inf damage where a group has fewer options."""
    width = max(len(group.options) for group in problem.groups)
    sizes = np.zeros((len(problem.groups), width), dtype=np.int64)
    damages = np.full((len(problem.groups), width), np.inf)
    for i, group in enumerate(problem.groups):
        sizes[i, : len(group.options)] = [option.size_bytes for option in group.options]
        damages[i, : len(group.options)] = [option.damage for option in group.options]
    return sizes, damages
