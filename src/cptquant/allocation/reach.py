"""Which budgets a model can meet, and the message for those it cannot."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cptquant.allocation.choices import build_problem
from cptquant.allocation.problem import Problem
from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.targets import Target


@dataclass(frozen=True)
class Reach:
    """Fewest bytes any plan can have, and the bytes with every site in 16 bits, both in the scope of a budget."""

    smallest_bytes: int
    bytes_at_16_bit: int


def find_reach(layout: ModelLayout, budget: Budget, target: Target, formats: Sequence[QuantFormat]) -> Reach:
    """The reachable range for these formats, in the scope of the budget. Needs no table.

    Raises:
        FormatError: a format that the target refuses everywhere, or no format at all.
    """
    problem = build_problem(layout, None, target, formats, budget.scope)
    return Reach(problem.smallest_bytes, problem.bytes_at_16_bit)


def check_budget(layout: ModelLayout, budget: Budget, target: Target, formats: Sequence[QuantFormat]) -> None:
    """Refuse an unreachable budget as soon as the layout is known, before any measuring.

    Raises:
        BudgetError: below the smallest plan, or above everything in 16 bits. FormatError: as `find_reach`.
    """
    check_reach(build_problem(layout, None, target, formats, budget.scope), budget, target)


def check_reach(problem: Problem, budget: Budget, target: Target) -> None:
    """As `check_budget`, for a problem already built.

    Raises:
        BudgetError: below the smallest plan, or above everything in 16 bits.
    """
    layout, limit = problem.layout, budget.limit_bytes(problem.layout)
    low, high = problem.smallest_bytes, problem.bytes_at_16_bit
    if not problem.groups:
        raise BudgetError(
            f"{budget.flag} {spell_budget(budget)}: {layout.source} has no site in the scope of this budget"
        )
    if low <= limit <= high:
        return
    counted = "the whole file" if budget.scope == "file" else "the blocks' linear sites"
    span = (
        f"reachable for {counted} under --target {target.name}: {_spell(layout, budget, low, math.ceil)} "
        f"({low:,} bytes) to {_spell(layout, budget, high, math.floor)} ({high:,} bytes)"
    )
    if limit < low:
        advice = f"raise {budget.flag}, or offer narrower --formats"
        if budget.scope == "file":
            fixed = problem.fixed_bytes + sum(
                group.options[0].size_bytes for group in problem.groups if len(group.options) == 1
            )
            advice += f"; {fixed:,} bytes are tensors that stay in 16 bits whatever the plan"
        raise BudgetError(f"{budget.flag} {spell_budget(budget)} allows {limit:,} bytes, too few; {span}; {advice}")
    raise BudgetError(
        f"{budget.flag} {spell_budget(budget)} allows {limit:,} bytes, more than every weight in 16 bits takes, "
        f"so nothing would be quantized; {span}; lower {budget.flag}"
    )


def spell_budget(budget: Budget) -> str:
    """The budget as written, or spelled from its value where it was made in code."""
    if budget.text:
        return budget.text
    if budget.unit == "bytes":
        return f"{int(budget.value)}B" + ("@sites" if budget.scope == "sites" else "")
    return f"{budget.value:g}{budget.unit}" + ("@sites" if budget.scope == "sites" else "")


def _spell(layout: ModelLayout, budget: Budget, size_bytes: int, rounded: Callable[[float], int]) -> str:
    """Bytes in the budget's own unit, rounded towards the inside of the range, so that the number can be used."""
    if budget.unit == "bytes":
        return f"{size_bytes}B"
    if budget.unit == "%":
        return f"{rounded(1e4 * 100 * size_bytes / layout.source_bytes) / 1e4:g}%"
    if budget.scope == "sites":
        weights = sum(site.weight_count for site in layout.block_sites)
        return f"{rounded(1e4 * 8 * size_bytes / weights) / 1e4:g}bpw@sites"
    return f"{rounded(1e4 * 8 * size_bytes / layout.parameters) / 1e4:g}bpw"
