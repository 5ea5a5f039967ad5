"""The budgets of a frontier: read from a person, or spread so that neighbours differ by the same factor of damage."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from cptquant.allocation.hull import HullVertex, trace_hull
from cptquant.allocation.problem import Problem
from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError, UserError

Scope = Literal["file", "sites"]
_SPAN = 1e3
"""Spread budgets end where the damage is this many times below the largest: beyond, nothing can be told apart."""


def read_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Parse, each once.

    Raises:
        BudgetError: unreadable. UserError: budgets of the whole file and of `@sites` in one frontier.
    """
    budgets: list[Budget] = []
    for text in dict.fromkeys(text.strip() for text in texts):
        try:
            budgets.append(replace(Budget.parse(text), flag="--budgets"))
        except BudgetError as error:
            raise BudgetError(str(error).replace("--budget", "--budgets")) from None
    scopes = {budget.scope: budget.text for budget in reversed(budgets)}
    if len(scopes) > 1:
        raise UserError(
            f"--budgets mixes {scopes['file']!r}, which counts the whole file, with {scopes['sites']!r}, which counts "
            "the blocks' linear sites; a frontier has one scale: write all of them with @sites, or none"
        )
    return tuple(budgets)


def spread_budgets(problem: Problem, count: int) -> tuple[Budget, ...]:
    """`count` budgets from the smallest plan up, evenly spaced in ln damage; fewer on a short frontier.

    Raises:
        UserError: no plan has a damage.
    """
    hull = [vertex for vertex in trace_hull(problem) if vertex.damage > 0]
    if not hull:
        raise UserError(
            "every plan has damage 0 by this table, so there is nothing to trade; measure with other --formats"
        )
    most = math.log(hull[0].damage)
    least = max(math.log(hull[-1].damage), most - math.log(_SPAN))
    chosen: dict[int, HullVertex] = {}
    for index in range(count):
        wanted = most + (least - most) * index / (count - 1)
        vertex = min(hull, key=lambda v: (abs(math.log(v.damage) - wanted), v.counted_bytes))
        chosen[vertex.counted_bytes] = vertex
    return tuple(_spell(problem, vertex.counted_bytes) for vertex in chosen.values())


def _spell(problem: Problem, counted_bytes: int) -> Budget:
    """The least budget of four decimals in bits per weight that holds so many bytes."""
    layout = problem.layout
    weights = layout.parameters if problem.scope == "file" else sum(s.weight_count for s in layout.block_sites)
    suffix = "bpw" if problem.scope == "file" else "bpw@sites"
    steps = math.ceil(1e4 * 8 * counted_bytes / weights)
    while True:
        budget = Budget.parse(f"{steps / 1e4:g}{suffix}")
        if budget.limit_bytes(layout) >= counted_bytes:
            return budget
        steps += 1
