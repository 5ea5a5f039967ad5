"""A run folder's artifacts arranged into the sections of the report; the template only places them."""

import math
from dataclasses import dataclass

from cptquant.core.evaluation import EvaluationReport
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import Manifest, SiteOutcome
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.reports.composition import Portion, portions_by_format, site_bytes
from cptquant.reports.figures.arrangement import MOST_CELLS, arrange, reference_code_bits, row_label
from cptquant.reports.figures.comparison import VariantPoint, draw_distances, draw_frontier, draw_sizes
from cptquant.reports.figures.depth import draw_block_scores, draw_curve_panels, draw_role_panels
from cptquant.reports.figures.errors import draw_errors, role_legend
from cptquant.reports.figures.grids import HeatMap, draw_heat_map, draw_plan
from cptquant.reports.figures.learning import draw_block_training
from cptquant.reports.headline import SUBJECT_LABELS, damage_points, spell_distance, spell_plain
from cptquant.reports.quantities import (
    METHOD_NAMES,
    spell_exact_bytes,
    spell_measured,
    spell_number,
    spell_share,
    spell_unit,
)
from cptquant.reports.run_folder import FrontierPoint, RunRecord

Cell = tuple[str, str]
"""What is shown, and what a column sorts by (the exact value; empty: the shown text)."""


@dataclass(frozen=True)
class SensitivitySection:
    """One method: pictures and the facts a caption needs."""

    method: str
    unit: str
    score_count: str
    is_plan_source: bool
    block_scores: str
    code_bits: int | None
    role_panels: list[tuple[str, str]]
    curve_panels: list[tuple[str, str]]
    heat_map: HeatMap | None
    heat_map_left_out: bool
    metadata: list[tuple[str, str]]


def sensitivity_sections(record: RunRecord) -> list[SensitivitySection]:
    """One per method measured; heat maps until the report's budget of cells is spent, the plan's method first."""
    sections: list[SensitivitySection] = []
    cells_left = MOST_CELLS
    for table in record.tables:
        heat_map = draw_heat_map(table, record.layout, cells_left)
        cells_left -= heat_map.cell_count if heat_map else 0
        sections.append(_sensitivity_section(table, record, heat_map))
    return sections


def _sensitivity_section(table: SensitivityTable, record: RunRecord, heat_map: HeatMap | None) -> SensitivitySection:
    arrangement = arrange(record.layout)
    code_bits = reference_code_bits(table, record.layout.block_sites)
    counts = sorted(
        {score.n for score in table.block_scores} | {d.n for r in table.damages.values() for d in r.values()}
    )
    has_damage = any(damage.value > 0 for row in table.damages.values() for damage in row.values())
    return SensitivitySection(
        method=METHOD_NAMES.get(table.method, table.method),
        unit=spell_unit(table.unit),
        score_count=f"{counts[-1]:,}" if counts else "0",
        is_plan_source=record.plan is not None and record.plan.sensitivity_method == table.method,
        block_scores=draw_block_scores(table, record.layout) if table.block_scores else "",
        code_bits=code_bits,
        role_panels=draw_role_panels(table, arrangement, code_bits) if code_bits is not None else [],
        curve_panels=draw_curve_panels(table.curves, record.layout.block_count),
        heat_map=heat_map,
        heat_map_left_out=heat_map is None and has_damage,
        metadata=[(key.replace("_", " "), _spell_setting(value)) for key, value in table.metadata.items()],
    )


def _spell_setting(value: str | int | float | bool | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return spell_number(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class PlanSection:
    """One plan as a picture with the bytes of its formats."""

    title: str
    plan: Plan
    drawings: list[str]
    portions: list[tuple[Portion, str]]
    widths: list[int]
    facts: list[tuple[str, str]]


def plan_sections(record: RunRecord) -> list[PlanSection]:
    """The plan that was written; before it the allocator's own, where the guard preferred another."""
    if record.plan is None:
        return []
    if record.written != "quantized" and record.written_plan is not None:
        label = SUBJECT_LABELS[record.written]
        return [
            _plan_section(record.written_plan, record.layout, f"What was written: {label[0].lower()}{label[1:]}"),
            _plan_section(record.plan, record.layout, "What the allocator proposed, and the guard turned down"),
        ]
    return [_plan_section(record.plan, record.layout, "")]


def _plan_section(plan: Plan, layout: ModelLayout, title: str) -> PlanSection:
    portions = portions_by_format(plan, layout)
    facts = [
        ("Allocator", plan.allocator),
        ("Sensitivity", METHOD_NAMES.get(plan.sensitivity_method or "", plan.sensitivity_method or "none")),
        ("Target", plan.target),
        ("Solution", plan.status.sentence),
        ("Size", f"{spell_exact_bytes(plan.size_bytes)} of all tensors"),
        ("Allowed", f"{spell_exact_bytes(plan.limit_bytes)} ({plan.budget}, {_scope(plan)})"),
    ]
    if plan.optimality_gap is not None:
        facts.append(("Optimality gap", spell_number(plan.optimality_gap)))
    if plan.predicted_damage is not None:
        unit = spell_unit(plan.damage_unit or "")
        facts.append(("Predicted damage", f"{spell_number(plan.predicted_damage)} {unit}".strip()))
    return PlanSection(
        title=title,
        plan=plan,
        drawings=draw_plan(plan, layout),
        portions=[(portion, spell_share(portion.size_bytes, plan.size_bytes)) for portion in portions],
        widths=sorted({fmt.code_bits for fmt in plan.quant_formats.values()}),
        facts=facts,
    )


def _scope(plan: Plan) -> str:
    return "whole file" if plan.budget_scope == "file" else "linear sites of the blocks"


@dataclass(frozen=True)
class ComparisonSection:
    """Distance to the original by variant, against size, and the predicted frontier."""

    distance: str
    distances: str = ""
    sizes: str = ""
    frontier: str = ""
    frontier_unit: str = ""


def comparison_section(record: RunRecord) -> ComparisonSection | None:
    """Pictures of the evaluation and of frontier.json; None if there is neither."""
    name, points = _variant_points(record)
    frontier = _frontier(record)
    if not points and not frontier:
        return None
    label = spell_distance(name) if name else ""
    sized = [point for point in points if point.size_bytes > 0]
    return ComparisonSection(
        distance=label,
        distances=draw_distances(points, label) if points else "",
        sizes=draw_sizes(sized, f"{label} against size") if sized else "",
        frontier=frontier,
        frontier_unit=spell_unit(record.plan.damage_unit or "") if record.plan else "",
    )


def _variant_points(record: RunRecord) -> tuple[str, list[VariantPoint]]:
    evaluation = record.evaluation
    if evaluation is None:
        return "", []
    name, pairs = damage_points(evaluation, [subject for subject in SUBJECT_LABELS if subject != "original"])
    plans = {"quantized": record.written_plan, **(record.baselines or {})}
    points: list[VariantPoint] = []
    for subject, found in pairs:
        if math.isnan(found.value):
            continue  # it has no place on an axis; the tables say "not a number"
        size = evaluation.find("weight_bytes", subject)
        plan = plans.get(subject)
        size_bytes = size.value if size else plan.size_bytes if plan else 0
        points.append(VariantPoint(subject, SUBJECT_LABELS[subject], size_bytes, found.value, found.stderr))
    return name, points


def _frontier(record: RunRecord) -> str:
    if not record.frontier:
        return ""
    plan = record.plan
    point = (
        FrontierPoint(plan.size_bytes, plan.predicted_damage) if plan and plan.predicted_damage is not None else None
    )
    return draw_frontier(record.frontier, point, "predicted damage against size")


@dataclass(frozen=True)
class ErrorSection:
    """Errors per site, and every outcome that is not nominal."""

    quantizer: str
    output_errors: str | None
    weight_errors: str | None
    block_errors: str | None
    legend: list[tuple[str, int]]
    columns: list[str]
    rows: list[list[Cell]]
    outcomes: list[tuple[str, str, int, str]]
    settings: list[tuple[str, str]]


def error_section(record: RunRecord) -> ErrorSection | None:
    """Of what was written; None before `quantize`."""
    manifest = record.written_manifest
    if manifest is None:
        return None
    in_blocks = {site.name for site in record.layout.block_sites}
    drawn = any(
        found.relative_output_error for found in manifest.sites if found.site in in_blocks
    )  # none if all learned
    output_label = "relative output error of every site, by block"
    weight_label = "relative weight error of every site, by block"
    return ErrorSection(
        quantizer=manifest.quantizer.upper(),
        output_errors=draw_errors(manifest, record.layout, lambda r: r.relative_output_error, output_label)
        if drawn
        else None,
        weight_errors=draw_errors(manifest, record.layout, lambda r: r.relative_weight_error, weight_label),
        block_errors=draw_block_training(manifest, record.layout, "error of every block's output, by block"),
        legend=role_legend(record.layout),
        columns=["Site", "Block", "Role", "Format", "Weight error", "Output error", "Damping", "Outcome"],
        rows=_error_rows(manifest, record.layout),
        outcomes=_outcomes(manifest),
        settings=[(key.replace("_", " "), _spell_setting(value)) for key, value in manifest.settings.items()],
    )


def _error_rows(manifest: Manifest, layout: ModelLayout) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for found in manifest.sites:
        site = layout.site_by_name[found.site]
        block = ("–", "-1") if site.block_index is None else (str(site.block_index), str(site.block_index))
        rows.append(
            [
                (found.site, ""),
                block,
                (row_label(site), ""),
                (found.format, ""),
                _number_cell(found.relative_weight_error),
                _number_cell(found.relative_output_error),
                _number_cell(found.damping),
                (found.outcome.value.replace("_", " "), ""),
            ]
        )
    return rows


def _number_cell(value: float | None) -> Cell:
    return ("–", "-1") if value is None else (spell_number(value), f"{value:.6g}")


def _outcomes(manifest: Manifest) -> list[tuple[str, str, int, str]]:
    """(name, sentence, count, first sites) of every outcome that is not nominal and occurs."""
    found: list[tuple[str, str, int, str]] = []
    for outcome in SiteOutcome:
        sites = [record.site for record in manifest.sites if record.outcome is outcome]
        if sites and outcome is not SiteOutcome.NOMINAL:
            more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
            found.append((outcome.value.replace("_", " "), outcome.sentence, len(sites), ", ".join(sites[:3]) + more))
    return found


def measurement_rows(evaluation: EvaluationReport) -> list[list[Cell]]:
    """Every measurement, unrounded in the sort keys."""
    return [
        [
            (found.name, ""),
            (found.subject, ""),
            (
                spell_plain(found) if found.stderr is None else spell_measured(found.value, found.stderr),
                f"{found.value!r}",
            ),
            (found.unit, ""),
            (f"{found.n:,}" if found.n else "exact", str(found.n)),
            (found.note, ""),
        ]
        for found in evaluation.measurements
    ]


def plan_rows(record: RunRecord) -> list[list[Cell]]:
    """Every site of the written plan with shape, format and bytes."""
    plan, layout = record.written_plan, record.layout
    if plan is None:
        return []
    sizes = site_bytes(plan, layout)
    rows: list[list[Cell]] = []
    for site in layout.sites:
        fmt = plan.quant_formats.get(site.name, layout.keep_format)
        size_bytes = sizes[site.name]
        bits = fmt.bits_per_weight(site.out_features, site.in_features)
        rows.append(
            [
                (site.name, ""),
                (row_label(site), ""),
                (f"{site.out_features:,} × {site.in_features:,}", str(site.weight_count)),
                (fmt.name, ""),
                (f"{bits:.3f}", f"{bits:.6g}"),
                (f"{size_bytes:,}", str(size_bytes)),
            ]
        )
    return rows
