"""The verb `allocate`: which format each site gets, under a budget in real bytes."""

from collections.abc import Sequence

from cptquant.allocation.choices import build_problem
from cptquant.allocation.damages import sum_damages
from cptquant.allocation.explain import explain_choice
from cptquant.allocation.problem import Allocator, Problem
from cptquant.allocation.reach import check_reach, spell_budget
from cptquant.core.budget import Budget
from cptquant.core.errors import CptquantError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.provenance import Stopwatch
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target


def allocate(
    layout: ModelLayout,
    table: SensitivityTable | None,
    budget: Budget,
    target: Target,
    allocator: Allocator,
    *,
    formats: Sequence[QuantFormat],
    seed: int = 0,
) -> Plan:
    """Choose a format for each site so that the written tensors stay within the budget.

    Args:
        table: damages of the same model; may be None for allocators that do not read one.
        formats: candidates beside 16 bits; empty means every format of the table that the target allows. Group sizes
            that do not divide a row are replaced as `core.targets.candidate_formats` says, stated in the notes.
        seed: for allocators that draw.

    Raises:
        BudgetError: outside the reachable range, or not reachable by this allocator.
        FormatError: a format that the target refuses everywhere, or no format at all.
        ArtifactError: the table is missing, of another model, or lacks a format.
    """
    watch = Stopwatch()
    problem = build_problem(layout, table, target, formats, budget.scope)
    check_reach(problem, budget, target)
    problem = problem.with_limit(budget.limit_bytes(layout), spell_budget(budget))
    plan = solve_problem(problem, target, allocator, sources=source_digests(layout, table), seed=seed)
    return plan.model_copy(update={"provenance": watch.provenance(seed=seed)})


def solve_problem(
    problem: Problem, target: Target, allocator: Allocator, *, sources: dict[str, str], seed: int = 0
) -> Plan:
    """Let the allocator choose, and state the choice in exact bytes.

    Args:
        sources: `source_digests` of the problem's layout and table.

    Raises:
        BudgetError, ArtifactError: as the allocator.
        CptquantError: the allocator broke the limit (a fault of ours).
    """
    layout, table = problem.layout, problem.table
    solution = allocator(problem, seed=seed)
    formats = problem.formats(solution.choice)
    size_bytes, site_bytes = target.plan_bytes(layout, formats), target.block_site_bytes(layout, formats)
    counted_bytes = size_bytes if problem.scope == "file" else site_bytes
    if counted_bytes != problem.counted_bytes(solution.choice) or counted_bytes > problem.limit_bytes:
        raise CptquantError(
            f"--allocator {allocator.name} made a plan of {counted_bytes:,} bytes under a limit of "
            f"{problem.limit_bytes:,}; this is a fault of cptquant, please report it"
        )
    names = {site: fmt.name for site, fmt in formats.items()}
    read_sites = {name: fmt for name, fmt in formats.items() if name not in problem.kept_sites}
    block_weights = sum(site.weight_count for site in layout.block_sites)
    return Plan(
        inputs={**sources, **_option_inputs(problem, target, allocator, seed)},
        target=target.name,
        allocator=allocator.name,
        budget=problem.budget_text,
        budget_scope=problem.scope,
        limit_bytes=problem.limit_bytes,
        formats=names,
        size_bytes=size_bytes,
        site_bytes=site_bytes,
        bits_per_weight=8 * size_bytes / layout.parameters,
        bits_per_weight_sites=8 * site_bytes / block_weights,
        sensitivity_method=table.method if table else None,
        damage_unit=table.unit if table else None,
        predicted_damage=sum_damages(table, layout, read_sites) if table else None,
        status=solution.status,
        optimality_gap=solution.optimality_gap,
        notes=(*solution.notes, *explain_choice(problem, target, solution.choice)),
    )


def source_digests(layout: ModelLayout, table: SensitivityTable | None) -> dict[str, str]:
    """What a plan depends on beside its options."""
    return {"layout": layout.digest(), "table": table.digest() if table else ""}


def _option_inputs(problem: Problem, target: Target, allocator: Allocator, seed: int) -> dict[str, str]:
    return {
        "budget": f"{problem.limit_bytes} bytes ({problem.scope})",
        "allocator": repr(allocator),
        "target": target.name,
        "formats": ",".join(fmt.name for fmt in problem.requested),
        "seed": str(seed),
    }
