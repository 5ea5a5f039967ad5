"""Two plans side by side: sites whose formats differ, bytes, predicted and measured loss. Loads no framework."""

from pathlib import Path

from cptquant.allocation.damages import sum_damages
from cptquant.core.errors import ArtifactError
from cptquant.core.evaluation import DAMAGE_NAMES
from cptquant.core.explanation import PlanComparison, PlanSummary, SiteChange
from cptquant.core.forecast import Interval
from cptquant.core.frontier import DamageCalibration
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import find_target
from cptquant.stages.calibration import find_measured, run_calibration
from cptquant.stages.plan_source import PlanSource, find_plan


def diff_plans(first: Path, second: Path) -> PlanComparison:
    """Compare two plans of one model.

    Args:
        first, second: run folders, or plan files in them.

    Raises:
        ArtifactError: no plan or layout, or plans of different models.
    """
    sources = find_plan(first), find_plan(second)
    before, after = sources
    layouts = before.layout(), after.layout()
    _check_same_model(before, after, layouts)
    tables = [_table_of(source) for source in sources]
    calibrations = [
        None if table is None else run_calibration(source.folder, layout, table, source.plan, source.quantizer)
        for source, layout, table in zip(sources, layouts, tables, strict=True)
    ]
    summaries = [
        summarize(source, layout, table, calibration, source.quantizer)
        for source, layout, table, calibration in zip(sources, layouts, tables, calibrations, strict=True)
    ]
    alike = tables[0] is not None and tables[1] is not None and tables[0].digest() == tables[1].digest()
    notes: list[str] = []
    if tables[0] is not None and tables[1] is not None and not alike:
        notes.append("made from different sensitivity tables: their damages do not compare")
    pairs = zip(sources, tables, strict=True)
    for source, table in pairs:
        notes.extend(() if table is None else source.stale(table, f"the plan of {source.label}"))
    if before.quantizer != after.quantizer:
        alike = False
        notes.append(f"carried out with {before.quantizer} and {after.quantizer}: their damages alone say no ratio")
    return PlanComparison(
        measure=DAMAGE_NAMES[layouts[0].task],
        before=summaries[0],
        after=summaries[1],
        changes=list_changes(layouts[0], before.plan, after.plan),
        ratio=_ratio(tables[0], layouts[0], (before.plan, after.plan), _better(calibrations)) if alike else None,
        notes=tuple(notes),
    )


def compare_under_table(
    source: PlanSource, layout: ModelLayout, table: SensitivityTable, after: Plan, label: str
) -> PlanComparison:
    """A plan beside another one for the same table, as `what-if` makes it."""
    calibration = run_calibration(source.folder, layout, table, source.plan, source.quantizer)
    other = PlanSource(Path(label), source.folder, after)
    before = summarize(source, layout, table, calibration, source.quantizer)
    changed = summarize(other, layout, table, calibration, source.quantizer)
    return PlanComparison(
        measure=DAMAGE_NAMES[layout.task],
        before=before,
        after=changed,
        changes=list_changes(layout, source.plan, after),
        ratio=_ratio(table, layout, (source.plan, after), calibration),
        notes=source.stale(table),
    )


def summarize(
    source: PlanSource,
    layout: ModelLayout,
    table: SensitivityTable | None,
    calibration: DamageCalibration | None,
    quantizer: str,
) -> PlanSummary:
    """Sizes, damage by the table, predicted and measured loss of one plan."""
    plan = source.plan
    damage = None if table is None else sum_damages(table, layout, plan.quant_formats)
    measured = find_measured(source.folder, DAMAGE_NAMES[layout.task], plan, quantizer)
    return PlanSummary(
        label=source.label,
        budget=plan.budget,
        target=plan.target,
        size_bytes=plan.size_bytes,
        site_bytes=plan.site_bytes,
        bits_per_weight=plan.bits_per_weight,
        bits_per_weight_sites=plan.bits_per_weight_sites,
        damage=damage,
        damage_unit=None if table is None else table.unit,
        predicted=None if calibration is None or damage is None else calibration.predict(damage),
        measured=None if measured is None else measured.value,
        measured_stderr=None if measured is None else measured.stderr,
        measured_n=None if measured is None else measured.n,
    )


def list_changes(layout: ModelLayout, before: Plan, after: Plan) -> tuple[SiteChange, ...]:
    """Sites whose formats differ, in the layout's order, with their bytes under each plan's own target."""
    return tuple(
        SiteChange(
            site=site.name,
            before=before.formats[site.name],
            after=after.formats[site.name],
            bytes_before=_site_bytes(layout, before, site.name),
            bytes_after=_site_bytes(layout, after, site.name),
        )
        for site in layout.sites
        if before.formats[site.name] != after.formats[site.name]
    )


def _site_bytes(layout: ModelLayout, plan: Plan, name: str) -> int | None:
    if layout.shared_head is not None and name in layout.shared_head:
        return None
    return find_target(plan.target).site_bytes(layout, layout.site_by_name[name], plan.quant_formats[name])


def _table_of(source: PlanSource) -> SensitivityTable | None:
    """The table a plan was made from; where that is gone or there was none, the one at hand, as `stale` says."""
    try:
        table = source.table()
    except ArtifactError:
        if (source.folder / "sensitivity.json").exists():
            raise
        return None
    held = all(fmt.is_float or (name in table.damages and fmt.name in table.damages[name])
               for name, fmt in source.plan.quant_formats.items())  # fmt: skip
    return table if held else None


def _check_same_model(before: PlanSource, after: PlanSource, layouts: tuple[ModelLayout, ModelLayout]) -> None:
    first, second = layouts
    if first.source_digest == second.source_digest:
        return
    missing = [name for name in before.plan.formats if name not in after.plan.formats]
    reason = f"{len(missing)} sites of the first are not in the second (first: {missing[0]})" if missing else (
        "the same names, other weights"
    )  # fmt: skip
    raise ArtifactError(
        f"{before.label} is a plan of {first.source}, {after.label} of {second.source}: {reason}; only plans of one "
        "model compare"
    )


def _better(calibrations: list[DamageCalibration | None]) -> DamageCalibration | None:
    """The one from more measured points; of equal ones the narrower, whatever the order of the plans."""
    known = [found for found in calibrations if found is not None]
    return max(known, key=lambda found: (found.points, -found.scatter), default=None)


def _ratio(
    table: SensitivityTable | None,
    layout: ModelLayout,
    plans: tuple[Plan, Plan],
    calibration: DamageCalibration | None,
) -> Interval | None:
    """Predicted loss of the second plan over the first; None where nothing is known, or one of them has no damage."""
    if table is None or calibration is None:
        return None
    before, after = (sum_damages(table, layout, plan.quant_formats) for plan in plans)
    if before <= 0 or after <= 0:
        return None
    first, second = (plan.quant_formats for plan in plans)
    kept = {name: fmt for name, fmt in first.items() if second[name] == fmt}
    return calibration.change(before, after, min(1.0, sum_damages(table, layout, kept) / max(before, after)))
