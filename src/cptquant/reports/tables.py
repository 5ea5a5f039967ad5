"""Tables for the terminal: pure functions from artifacts to rows, and one small renderer through rich."""

from dataclasses import dataclass

from cptquant.core.estimate import RunEstimate
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.reports.composition import portions_by_role
from cptquant.reports.figures.arrangement import format_of_width, reference_code_bits, row_label
from cptquant.reports.headline import (
    INCREASES,
    SUBJECT_LABELS,
    comparison_columns,
    comparison_rows,
    damage_points,
    spell_change,
    spell_distance,
    spell_increase,
)
from cptquant.reports.quantities import (
    METHOD_NAMES,
    TASK_NAMES,
    spell_bytes,
    spell_count,
    spell_measured,
    spell_measurement,
    spell_name,
    spell_number,
    spell_seconds,
    spell_share,
    spell_unit,
)

_MOST_SENSITIVE = 10
_WIDTH = 120  # where the output is no terminal
_HEADINGS = {"weight_bytes": "Size", "bits_per_weight": "Bits/weight"}  # shorter than in the report


@dataclass(frozen=True)
class TextTable:
    """Cells as they are printed.

    Attributes:
        columns: headings. rows: as many cells each. left: columns aligned left; the others hold numbers.
        lines: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    left: tuple[int, ...] = (0,)
    lines: tuple[str, ...] = ()


def render_text(*tables: TextTable, width: int | None = None) -> str:
    """Plain text, `width` columns wide at most (None: the terminal's); no colours, so that it can be piped."""
    # imported here: `cptquant --help` and `--json` print no table
    import io
    import shutil

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    target = io.StringIO()
    console = Console(
        file=target,
        width=width or shutil.get_terminal_size((_WIDTH, 24)).columns,
        color_system=None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for table in tables:
        if table.title:
            console.print(Text(table.title))
        if table.rows:
            grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for index, column in enumerate(table.columns):
                justify = "left" if index in table.left else "right"
                grid.add_column(Text(column), justify=justify, overflow="fold")
            for row in table.rows:
                grid.add_row(*(Text(cell) for cell in row))  # Text: a model's name is never read as markup
            console.print(grid)
            if table.lines:
                console.print()
        for line in table.lines:
            console.print(Text(line), soft_wrap=True)
        console.print()
    return "\n".join(line.rstrip() for line in target.getvalue().rstrip().splitlines()) + "\n"


def result_rows(layout: ModelLayout, plan: Plan, evaluation: EvaluationReport) -> TextTable:
    """The end of `quantize`: sizes, quality and distance of the original, what was written, and the baselines.

    Args:
        plan: of the weights that were written.
    """
    every = comparison_columns(evaluation)
    shown = [index for index, name in enumerate(every) if name not in INCREASES]  # a line below: columns are scarce
    columns = [every[index] for index in shown]
    compared = comparison_rows(evaluation, evaluation.written or "", brief=True)
    rows = [[row.label, *(row.cells[index] for index in shown)] for row in compared]
    kept = sum(plan.quant_formats[site.name].is_float for site in layout.sites if site.name in plan.quant_formats)
    lines = [
        spell_change(layout, plan),
        f"{len(layout.sites) - kept} of {len(layout.sites)} sites quantized, {kept} kept in 16 bits.",
    ]
    distance, pairs = damage_points(evaluation, ("quantized",))
    if pairs:
        lines.append(f"{spell_distance(distance)}: n = {pairs[0][1].n:,}; values are ± one standard error.")
    increase = spell_increase(evaluation)
    if increase:
        lines.append(f"{increase} with the original on the same text.")
    if evaluation.guard:
        lines.append(f"Guard: {evaluation.guard}.")
    headings = ("", *(_HEADINGS.get(name, spell_name(name)) for name in columns))
    return TextTable(layout.source, headings, rows, lines=tuple(lines))


def result_table(layout: ModelLayout, plan: Plan, evaluation: EvaluationReport) -> str:
    """`result_rows` as text."""
    return render_text(result_rows(layout, plan, evaluation))


def layout_rows(layout: ModelLayout) -> TextTable:
    """`inspect`: one row per role and shape, with its part of the model."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for site in layout.sites:
        groups.setdefault((row_label(site), site.out_features, site.in_features), []).append(site.weight_count)
    rows = [
        [role, str(len(counts)), f"{out_features:,} × {in_features:,}", spell_count(sum(counts)),
         spell_share(sum(counts), layout.parameters)]
        for (role, out_features, in_features), counts in groups.items()
    ]  # fmt: skip
    lines = [
        f"{layout.architecture}, {TASK_NAMES.get(layout.task, layout.task)}: {layout.block_count} blocks of width "
        f"{layout.hidden_size:,}, {layout.parameters:,} parameters.",
        f"{spell_bytes(layout.source_bytes)} of {layout.source_dtype} weights; {spell_bytes(layout.kept_bytes)} of "
        "norms, biases and positions are always kept in 16 bits.",
    ]
    if layout.shared_head is not None:
        lines.append("Embedding and head are one tensor, counted once in the parameters.")
    columns = ("Role", "Sites", "Shape", "Weights", "Of all parameters")
    return TextTable(layout.source, columns, rows, lines=tuple(lines))


def layout_table(layout: ModelLayout) -> str:
    """`layout_rows` as text."""
    return render_text(layout_rows(layout))


def block_rows(table: SensitivityTable) -> TextTable:
    """`measure`: the most sensitive blocks."""
    ranked = sorted(table.block_scores, key=lambda score: -score.value)[:_MOST_SENSITIVE]
    rows = [[str(score.block_index), spell_measured(score.value, score.stderr), f"{score.n:,}"] for score in ranked]
    title = f"{METHOD_NAMES.get(table.method, table.method)}: most sensitive of {len(table.block_scores)} blocks"
    return TextTable(title, ("Block", "Score", "n"), rows)


def site_rows(table: SensitivityTable, layout: ModelLayout) -> TextTable:
    """`measure`: the most sensitive sites at one width, the nearest to 4 bits that all sites in the blocks have."""
    code_bits = reference_code_bits(table, layout.block_sites)
    if code_bits is None:
        return TextTable("", ("Site", "Format", "Damage", "n"), [])
    found = [
        (table.damages[site.name][name], site.name, name)
        for site in layout.sites
        if (name := format_of_width(table, site, code_bits)) is not None
    ]
    ranked = sorted(found, key=lambda entry: -entry[0].value)[:_MOST_SENSITIVE]
    rows = [[site, name, spell_measured(damage.value, damage.stderr), f"{damage.n:,}"] for damage, site, name in ranked]
    title = f"Most sensitive of {len(found)} sites at {code_bits} bits, damage in {spell_unit(table.unit)}"
    return TextTable(title, ("Site", "Format", "Damage", "n"), rows, left=(0, 1))


def sensitivity_table(table: SensitivityTable, layout: ModelLayout) -> str:
    """`block_rows` and `site_rows` as text."""
    return render_text(block_rows(table), site_rows(table, layout))


def plan_rows(plan: Plan, layout: ModelLayout) -> TextTable:
    """`allocate`: formats and bytes by role."""
    rows = [
        [
            portion.name,
            str(portion.site_count or "–"),
            ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in portion.formats) or "16 bits",
            f"{portion.size_bytes:,}",
            spell_share(portion.size_bytes, plan.size_bytes),
        ]
        for portion in portions_by_role(plan, layout)
    ]
    scope = "whole file" if plan.budget_scope == "file" else "linear sites of the blocks"
    lines = [
        f"{spell_bytes(plan.size_bytes)}, {plan.bits_per_weight:.3f} bits per weight "
        f"({plan.bits_per_weight_sites:.3f} in the blocks' linear sites).",
        f"Budget {plan.budget}: {spell_bytes(plan.limit_bytes)} of the {scope}.",
        f"{plan.allocator}: {plan.status.sentence}{_spell_gap(plan)}.",
    ]
    if plan.predicted_damage is not None:
        unit = spell_unit(plan.damage_unit or "")
        lines.append(f"Predicted damage: {spell_number(plan.predicted_damage)} {unit}".rstrip() + ".")
    return TextTable(
        layout.source, ("Role", "Sites", "Formats", "Bytes", "Share"), rows, left=(0, 2), lines=(*lines, *plan.notes)
    )


def _spell_gap(plan: Plan) -> str:
    return f" (gap {spell_number(100 * plan.optimality_gap)} %)" if plan.optimality_gap else ""


def plan_table(plan: Plan, layout: ModelLayout) -> str:
    """`plan_rows` as text."""
    return render_text(plan_rows(plan, layout))


def evaluation_rows(evaluation: EvaluationReport) -> TextTable:
    """`evaluate`: a row per measurement, a column per subject."""
    present = {found.subject for found in evaluation.measurements}
    subjects = [subject for subject in SUBJECT_LABELS if subject in present]
    rows: list[list[str]] = []
    for name in dict.fromkeys(found.name for found in evaluation.measurements):
        found = {subject: evaluation.find(name, subject) for subject in subjects}
        known = [measurement for measurement in found.values() if measurement is not None]
        cells = [
            spell_measurement(name, m.value, m.stderr, brief=True) if m is not None else "–" for m in found.values()
        ]
        rows.append([spell_name(name), *cells, f"{known[0].n:,}" if known[0].n else "exact"])
    lines = (f"Guard: {evaluation.guard}.",) if evaluation.guard else ()
    return TextTable("", ("", *(SUBJECT_LABELS[subject] for subject in subjects), "n"), rows, lines=lines)


def evaluation_table(evaluation: EvaluationReport) -> str:
    """`evaluation_rows` as text."""
    return render_text(evaluation_rows(evaluation))


def estimate_rows(estimate: RunEstimate) -> tuple[TextTable, TextTable]:
    """`quantize --dry-run`: reachable sizes, and time by stage."""
    sizes = [[name, spell_bytes(size_bytes)] for name, size_bytes in estimate.uniform_bytes.items()]
    reach = TextTable(
        f"{estimate.model}: {spell_count(estimate.parameters)} parameters, {spell_bytes(estimate.source_bytes)}",
        ("Uniform bits", "Whole file"),
        sizes,
        lines=(
            f"Budget {estimate.budget} allows {spell_bytes(estimate.limit_bytes)}; reachable: "
            f"{spell_bytes(estimate.smallest_bytes)} to {spell_bytes(estimate.largest_bytes)}.",
        ),
    )
    stages = [[name, spell_seconds(seconds)] for name, seconds in estimate.stage_seconds.items()]
    time = TextTable(
        "",
        ("Stage", "Expected time"),
        [*stages, ["all", spell_seconds(estimate.wall_seconds)]],
        lines=(
            f"Memory: up to {spell_bytes(estimate.peak_memory_bytes)}. Disk: {spell_bytes(estimate.disk_bytes)}.",
            f"From {spell_number(estimate.flops_per_second / 1e9)} GFLOP/s measured on this machine.",
        ),
    )
    return reach, time


def estimate_table(estimate: RunEstimate) -> str:
    """`estimate_rows` as text."""
    return render_text(*estimate_rows(estimate))
