"""A joint plan: its table for the terminal, and its page."""

from collections.abc import Sequence
from pathlib import Path

from cptquant.core.artifact import write_whole
from cptquant.core.joint import JointPlan, JointPoint, Measured
from cptquant.reports.figures.joint import draw_candidates
from cptquant.reports.figures.law import spell_large
from cptquant.reports.law import spell_interval
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import spell_decimal_bytes, spell_measured, spell_number, spell_seconds
from cptquant.reports.tables import TextTable, render_text

COLUMNS = ("", "Size", "Format", "Share", "Tokens", "File", "Training", "Domain loss", "General loss", "General")


def joint_table(plan: JointPlan) -> str:
    """The recommended point, its neighbours, and what binds."""
    lines = [
        f"Share {spell_interval(plan.share_range, 3)}, tokens {_range(plan)}; size and bits are the same in "
        f"{100 * plan.agreement:.0f} % of the laws' draws. Losses with quantizing, 90 % intervals of a new run.",
        f"Law of adapting: {plan.law}. What bits cost: {plan.damage}.",
        *(f"{status.value.replace('_', ' ')}: {status.sentence}" for status in plan.statuses),
        *plan.notes,
    ]
    rows = [list(_row(point)) for point in (plan.best, *plan.neighbours)]
    tables = [TextTable(f"Plan for {plan.domain}", COLUMNS, rows, left=(0, 1, 2), lines=tuple(lines))]
    if plan.measured:
        tables.append(TextTable("Carried out", MEASURED, _measured(plan), left=(0,)))
    return render_text(*tables)


MEASURED = ("", "Tokens", "File", "Domain: predicted", "measured", "General: predicted", "measured", "Inside")


def _row(point: JointPoint) -> tuple[str, ...]:
    return (
        point.label + ("" if point.allowed else " (not allowed)"), point.size, point.format, f"{point.ratio:.3f}",
        spell_large(point.tokens), spell_decimal_bytes(point.size_bytes), spell_seconds(point.seconds),
        spell_interval(point.domain_nll), spell_interval(point.general_nll), f"{100 * point.general_increase:+.1f} %",
    )  # fmt: skip


def _range(plan: JointPlan) -> str:
    found = plan.tokens_range
    return f"{spell_large(found.value)} ({spell_large(found.low)} to {spell_large(found.high)})"


def _measured(plan: JointPlan) -> list[list[str]]:
    points = {point.label: point for point in (plan.best, *plan.neighbours)}
    return [list(_measured_row(points[found.label], found)) for found in plan.measured if found.label in points]


def _measured_row(point: JointPoint, found: Measured) -> Sequence[str]:
    inside = [
        prediction.low <= value <= prediction.high
        for prediction, value in ((point.domain_nll, found.domain_nll), (point.general_nll, found.general_nll))
    ]
    return (
        found.label, spell_large(found.tokens), spell_decimal_bytes(found.size_bytes),
        spell_interval(point.domain_nll), spell_measured(found.domain_nll, found.domain_stderr),
        spell_interval(point.general_nll), spell_measured(found.general_nll, found.general_stderr),
        "both" if all(inside) else "domain" if inside[0] else "general" if inside[1] else "neither",
    )  # fmt: skip


def write_joint_report(path: Path, plan: JointPlan) -> None:
    """Write the page.

    Raises:
        OutputError: the folder cannot be written.
    """
    context = {
        "title": f"Plan for {plan.domain}: size {plan.best.size}, {plan.best.format}, share {plan.best.ratio:.2f}, "
        f"{spell_large(plan.best.tokens)} tokens",
        "plan": plan,
        "columns": COLUMNS,
        "rows": [_row(point) for point in (plan.best, *plan.neighbours)],
        "candidates": [_row(point) for point in plan.candidates],
        "measured_columns": MEASURED,
        "measured": _measured(plan),
        "statuses": [(status.value.replace("_", " "), status.sentence) for status in plan.statuses],
        "share": spell_interval(plan.share_range, 3),
        "tokens": _range(plan),
        "agreement": f"{100 * plan.agreement:.0f} %",
        "drawing": draw_candidates(plan),
        "damages": [
            (
                law.text, f"{law.rows} quantized models of {law.runs} runs",
                ", ".join(f"{bits}: {spell_number(c)}" for bits, c in law.intercepts.items()),
                spell_number(law.size_power), spell_number(law.tokens_power), spell_number(law.share_slope),
                spell_number(law.rise_per_kl), law.decided,
            )
            for law in plan.damages
        ],
        "versions": sorted(plan.provenance.versions.items()),
    }  # fmt: skip
    write_whole(path, load_template("joint.html.jinja").render(context).encode())
