"""The whole trade of size against damage from one table: what each further byte would buy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cptquant.allocation.allocate import solve_problem, source_digests
from cptquant.allocation.choices import build_problem
from cptquant.allocation.knapsack import Knapsack
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan at one size.

    Attributes:
        size_bytes: the whole file. site_bytes: the blocks' linear sites.
        predicted_damage: in the table's unit. plan: all of it, with status and gap.
    """

    size_bytes: int
    site_bytes: int
    predicted_damage: float
    plan: Plan


def trace_frontier(
    layout: ModelLayout,
    table: SensitivityTable,
    target: Target,
    formats: Sequence[QuantFormat],
    *,
    points: int = 33,
    scope: Literal["file", "sites"] = "file",
) -> tuple[FrontierPoint, ...]:
    """Solve the knapsack at evenly spaced byte limits, from the smallest plan to everything in 16 bits.

    Returns:
        Points of strictly rising size and strictly falling damage; fewer than asked where neighbouring limits give
        the same plan.

    Raises:
        ValueError: fewer than two points.
        FormatError, ArtifactError: as `allocate`.
    """
    if points < 2:
        raise ValueError(f"a frontier has at least 2 points, got {points}")
    problem = build_problem(layout, table, target, formats, scope)
    low, high = problem.smallest_bytes, problem.bytes_at_16_bit
    sources = source_digests(layout, table)
    traced: list[FrontierPoint] = []
    for index in range(points):
        limit = low + (high - low) * index // (points - 1)
        plan = solve_problem(problem.with_limit(limit, f"{limit}B"), target, Knapsack(), sources=sources)
        assert plan.predicted_damage is not None  # the knapsack has a table
        point = FrontierPoint(plan.size_bytes, plan.site_bytes, plan.predicted_damage, plan)
        if not traced or point.predicted_damage < traced[-1].predicted_damage:
            traced.append(point)
    return tuple(traced)
