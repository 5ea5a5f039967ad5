"""sensitivity.json -> plan.json, and the baselines at no more bytes. Loads no framework."""

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.engine_memory import find_context, fit_budget, parse_memory
from cptquant.core.errors import ArtifactError, BudgetError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.refinement import Refinement
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.settings import RunSettings
from cptquant.core.targets import candidate_formats, find_target, list_refusals
from cptquant.stages.presets import TARGET, PresetBaseline, find_preset
from cptquant.stages.run import Run

UNREFINED = "plan-unrefined.json"
"""The allocator's plan, where swaps went on from it."""

_LISTED = 8
"""Illegal places spelled out in a message."""


def needs_table(allocator: str) -> bool:
    """Whether an allocator reads a sensitivity table; the baselines do not."""
    return find_allocator(allocator).needs_table


def site_formats(run: Run, layout: ModelLayout) -> dict[str, tuple[QuantFormat, ...]]:
    """Candidate formats of every site under the run's target.

    Raises:
        UserError: the target allows none of `--formats` anywhere.
    """
    target, formats = find_target(run.settings.target), run.settings.formats_for(layout)
    candidates = {site.name: candidate_formats(site, layout, target, formats) for site in layout.sites}
    if all(fmt.is_float for row in candidates.values() for fmt in row):
        refusals = {target.refusal(site, fmt) for site in layout.block_sites for fmt in formats}
        reasons = "; ".join(sorted(reason for reason in refusals if reason))
        raise UserError(f"--target {target.name} allows none of --formats {','.join(map(str, formats))}: {reasons}")
    return candidates


def allocate_stage(run: Run, layout: ModelLayout, table: SensitivityTable | None, file_name: str = "plan.json") -> Plan:
    """sensitivity.json -> plan.json: which format each site gets under the budget and the target."""
    settings = run.settings
    inputs = {
        "layout": layout.digest(),
        "table": table.digest() if table else "",
        "budget": settings.budget_for(layout).text,
        "allocator": settings.allocator,
        "target": settings.target,
        "formats": ",".join(map(str, settings.formats_for(layout))),
        "seed": str(settings.seed),
    }
    return run.stage(
        file_name, Plan, inputs, lambda: _allocate_within(settings, layout, table), edited=file_name != UNREFINED,
    )  # fmt: skip


def _allocate_within(settings: RunSettings, layout: ModelLayout, table: SensitivityTable | None) -> Plan:
    """Allocate under the budget; under `--memory`, under smaller ones until the plan's predicted memory fits.

    Raises:
        BudgetError: unreachable.
    """
    budget, target = settings.budget_for(layout), find_target(settings.target)
    while True:
        plan = allocate(
            layout, table, budget, target, find_allocator(settings.allocator), formats=settings.formats_for(layout),
            seed=settings.seed,
        )  # fmt: skip
        if settings.memory is None:
            return plan
        context, limit = find_context(layout, settings.context), parse_memory(settings.memory)
        smaller = fit_budget(layout, budget, plan, context, limit)
        if smaller is None:
            return plan
        budget = smaller


def baseline_plans(run: Run, layout: ModelLayout, plan: Plan) -> dict[str, Plan]:
    """The wanted baselines at no more bytes than the plan, by name.

    A plan near the fewest possible bytes can leave no room for one width everywhere: that baseline is then left out,
    and the guard's sentence says that there is none.
    """
    plans: dict[str, Plan] = {}
    for name in run.settings.baselines_for(layout):
        if name == "preset" and plan.target != TARGET:
            continue
        try:
            found = _preset_plan(run, layout, plan) if name == "preset" else _baseline_plan(run, layout, plan, name)
        except BudgetError:
            found = None
        if found is None:
            (run.folder / f"plan-{name}.json").unlink(missing_ok=True)
        else:
            plans[name] = found
    return plans


def _preset_plan(run: Run, layout: ModelLayout, plan: Plan) -> Plan | None:
    """plan-preset.json; None where there is no preset to compare with."""
    made = preset_baseline(run, layout, plan).plan
    if made is None:
        return None
    wrong = ["plan-preset.json does not hold the preset's types"]
    return run.stage(
        "plan-preset.json", Plan, made.inputs, lambda: made,
        damage=lambda found: [] if found.formats == made.formats else wrong,
    )  # fmt: skip


def preset_baseline(run: Run, layout: ModelLayout, plan: Plan) -> PresetBaseline:
    """llama.cpp's preset that the plan is compared with, or why there is none."""
    path = run.folder / "sensitivity.json"
    return find_preset(layout, plan, SensitivityTable.load(path) if path.exists() else None)


def _baseline_plan(run: Run, layout: ModelLayout, plan: Plan, allocator: str) -> Plan:
    """plan-NAME.json: uniform or random bits at no more bytes than the plan, in the scope of its budget."""
    limit_bytes = plan.counted_bytes
    budget = Budget(limit_bytes, "bytes", plan.budget_scope, f"{limit_bytes} bytes ({plan.budget_scope}), as the plan")
    formats = {name for name in plan.formats.values() if not QuantFormat.parse(name).is_float}
    offered = tuple(
        dict.fromkeys((*run.settings.formats_for(layout), *(QuantFormat.parse(name) for name in sorted(formats))))
    )
    inputs = {"plan": plan.digest(), "formats": ",".join(map(str, offered)), "seed": str(run.settings.seed)}
    return run.stage(
        f"plan-{allocator}.json",
        Plan,
        inputs,
        lambda: allocate(
            layout, None, budget, find_target(plan.target), find_allocator(allocator), formats=offered,
            seed=run.settings.seed,
        ),
        damage=lambda found: [f"plan-{allocator}.json is too large"] if found.counted_bytes > limit_bytes else [],
    )  # fmt: skip


def unrefined_plan(run: Run, plan: Plan) -> dict[str, Plan]:
    """The plan before swaps, by name, where the plan came from it and differs.

    Not where the plan was edited since, or the plan before swaps made anew: only what a search started from keeps to
    the limit of what came out of it.
    """
    if "refinement" not in plan.inputs or not (run.folder / UNREFINED).exists():
        return {}
    before, found = run.load(UNREFINED, Plan), run.load("refinement.json", Refinement)
    whole = (plan.inputs["refinement"], found.inputs.get("plan")) == (found.digest(), before.digest())
    return {"unrefined": before} if whole and found.formats == plan.formats != before.formats else {}


def check_plan(plan: Plan, layout: ModelLayout) -> None:
    """A plan may have been edited by hand: it must name every site, be legal, and say its true size.

    Raises:
        ArtifactError: what does not fit, and what it should be.
    """
    missing = [site.name for site in layout.sites if site.name not in plan.formats]
    unknown = [name for name in plan.formats if name not in layout.site_by_name]
    if missing or unknown:
        raise ArtifactError(
            f"plan.json does not fit the model: {len(missing)} sites without a format (first: {missing[:1]}), "
            f"{len(unknown)} unknown names (first: {unknown[:1]}); make it anew with: {Plan.MADE_BY}"
        )
    target = find_target(plan.target)
    refusals = list_refusals(layout, target, plan.quant_formats)
    if refusals:
        raise ArtifactError(
            f"plan.json is illegal under --target {target.name} in {len(refusals)} "
            f"{'place' if len(refusals) == 1 else 'places'}: {'; '.join(refusals[:_LISTED])}"
            + ("" if len(refusals) <= _LISTED else f"; and {len(refusals) - _LISTED} more")
        )
    taken = {
        "size_bytes": target.plan_bytes(layout, plan.quant_formats),
        "site_bytes": target.block_site_bytes(layout, plan.quant_formats),
    }
    wrong = {name: size_bytes for name, size_bytes in taken.items() if getattr(plan, name) != size_bytes}
    if wrong:
        said = ", ".join(f"{name} = {getattr(plan, name)}" for name in wrong)
        raise ArtifactError(
            f"plan.json says {said}, its formats take {', '.join(map(str, wrong.values()))}; correct what is wrong if "
            f"the formats were edited on purpose, or make it anew with: {Plan.MADE_BY}"
        )
