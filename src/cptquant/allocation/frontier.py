"""The whole trade of size against damage from one table: what each further byte would buy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cptquant.allocation.allocate import solve_problem, source_digests
from cptquant.allocation.choices import build_problem
from cptquant.allocation.hull import trace_hull
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.problem import Problem
from cptquant.core.artifact import digest_json
from cptquant.core.formats import QuantFormat
from cptquant.core.frontier import DamageCalibration, FrontierVertex
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


def trace_vertices(
    problem: Problem, target: Target, calibration: DamageCalibration | None = None
) -> tuple[FrontierVertex, ...]:
    """Every vertex of the frontier with exact bytes; between two of them, `allocate` finds the plan of a budget.

    Args:
        problem: from `build_problem`, with a table. calibration: turns damage into a predicted loss.

    Raises:
        ValueError: the problem has no table.
    """
    layout = problem.layout
    weights = sum(site.weight_count for site in layout.block_sites)
    hull = trace_hull(problem)
    chosen = {name: fmt.name for name, fmt in problem.formats(hull[0].choice).items()}
    # what a choice does not change: sites outside the scope, and all that is no site
    outside_bytes = target.plan_bytes(layout, problem.formats(hull[0].choice)) - hull[0].counted_bytes
    vertices: list[FrontierVertex] = []
    for vertex in hull:
        changes = dict(chosen) if not vertices else {}
        for index in vertex.changed if vertices else ():
            group = problem.groups[index]
            formats = group.options[vertex.choice[index]].formats
            changes |= {site.name: fmt.name for site, fmt in zip(group.sites, formats, strict=True)}
        chosen |= changes
        size_bytes = vertex.counted_bytes + outside_bytes
        site_bytes = sum(problem.groups[i].options[vertex.choice[i]].size_bytes for i in problem.block_groups)
        vertices.append(
            FrontierVertex(
                size_bytes=size_bytes,
                site_bytes=site_bytes,
                bits_per_weight=8 * size_bytes / layout.parameters,
                bits_per_weight_sites=8 * site_bytes / weights,
                damage=vertex.damage,
                gain_per_byte=vertex.gain_per_byte,
                predicted=None if calibration is None else calibration.predict(vertex.damage),
                extrapolated=calibration is None or calibration.extrapolates(vertex.damage),
                changes=changes,
                plan_digest=digest_json(chosen),
            )
        )
    return tuple(vertices)
