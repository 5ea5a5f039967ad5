"""plan.json -> the plan under another limit, and what that would change. Loads no framework."""

from pathlib import Path

from cptquant.allocation.allocate import allocate
from cptquant.allocation.choices import build_problem
from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.errors import ArtifactError, BudgetError, UserError
from cptquant.core.explanation import PlanComparison
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.stages.compare import compare_under_table
from cptquant.stages.plan_source import find_plan


def what_if(
    path: Path, *, more: str | None = None, less: str | None = None, budget: str | None = None
) -> tuple[Plan, PlanComparison]:
    """The plan that the same table, target and allocator give under another limit. Nothing is written.

    Args:
        path: run folder, or a plan file in one. more, less: change of the limit, e.g. `20MB`, `0.25bpw`, `5%`.
        budget: the new limit itself, e.g. `3bpw@sites`. Exactly one of the three.

    Raises:
        UserError: none or several of the three. BudgetError: unreadable, or outside the reachable range.
        ArtifactError: no plan, layout or table, or files of different models.
    """
    given = {"--more": more, "--less": less, "--budget": budget}
    flags = [name for name, value in given.items() if value is not None]
    if len(flags) != 1:
        raise UserError(
            f"{' and '.join(flags) or 'nothing'} was given; say one of --more 20MB, --less 20MB or --budget 3bpw@sites"
        )
    source = find_plan(path)
    layout, table = source.layout(), source.table()
    plan, target, formats = source.plan, find_target(source.plan.target), source.formats(table)
    if budget is not None:
        wanted = Budget.parse(budget)
    else:
        problem = build_problem(layout, table, target, formats, plan.budget_scope)
        span = (problem.smallest_bytes, problem.bytes_at_16_bit)
        wanted = _changed_budget(plan, layout, flags[0], more or less or "", span)
    seed = _seed(plan, path)
    after = allocate(layout, table, wanted, target, find_allocator(plan.allocator), formats=formats, seed=seed)
    return after, compare_under_table(source, layout, table, after, f"{flags[0]} {given[flags[0]]}")


def _seed(plan: Plan, path: Path) -> int:
    text = plan.inputs.get("seed", "0")
    if not text.isdecimal():
        raise ArtifactError(f"{path}: inputs.seed is {text!r}, expected a whole number; allocate the plan again")
    return int(text)


def _changed_budget(plan: Plan, layout: ModelLayout, flag: str, text: str, span: tuple[int, int]) -> Budget:
    """The plan's limit with the change, in the scope of its budget; bpw counts the weights of that scope."""
    try:
        amount = Budget.parse(text.replace("bpw@sites", "bpw") if plan.budget_scope == "sites" else text)
        if amount.scope != "file":
            raise BudgetError(f"--budget {text!r} counts the sites, the plan's budget the whole file; leave @sites out")
    except BudgetError as error:
        raise BudgetError(str(error).replace("--budget", flag)) from None
    change = Budget(amount.value, amount.unit, plan.budget_scope).limit_bytes(layout)
    limit = plan.limit_bytes + (change if flag == "--more" else -change)
    counted = "of the whole file" if plan.budget_scope == "file" else "of the blocks' linear sites"
    low, high = span
    if not low <= limit <= high:
        most = high - plan.limit_bytes if flag == "--more" else plan.limit_bytes - low
        raise BudgetError(
            f"{flag} {text} makes the limit {limit:,} bytes {counted}, outside the reachable {low:,} to {high:,}; the "
            f"plan's is {plan.limit_bytes:,}, so give {flag} {max(most, 0)}B at most"
        )
    return Budget(
        float(limit), "bytes", plan.budget_scope, f"{limit}B" + ("@sites" if plan.budget_scope == "sites" else "")
    )
