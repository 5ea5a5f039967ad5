"""Tables of `explain`, `what-if` and `diff`."""

from cptquant.core.explanation import NextStep, PlanComparison, PlanExplanation, PlanSummary, SiteExplanation
from cptquant.core.forecast import Interval
from cptquant.reports.frontier import spell_band
from cptquant.reports.quantities import (
    METHOD_NAMES,
    spell_decimal_bytes,
    spell_measured,
    spell_name,
    spell_number,
    spell_unit,
)
from cptquant.reports.tables import TextTable, render_text

_LISTED = 40
"""Changed sites spelled out; `--json` has all of them."""


def _spell_predicted(interval: Interval | None) -> str:
    return "–" if interval is None else f"{spell_number(interval.value)} ({spell_band(interval)})"


def explanation_rows(explanation: PlanExplanation) -> TextTable:
    """One row a site or tied sites: what it has, its neighbours' gains per byte, and what decided."""
    rows: list[list[str]] = []
    for group in explanation.groups:
        chosen = group.chosen
        larger = [offer for offer in group.offers if offer.size_bytes > chosen.size_bytes]
        smaller = [offer for offer in group.offers if offer.size_bytes < chosen.size_bytes]
        up = max((offer.gain_per_byte or 0.0 for offer in larger), default=None)
        down = min((offer.gain_per_byte or 0.0 for offer in smaller), default=None)
        rows.append(
            [
                " + ".join(group.sites),
                " + ".join(dict.fromkeys(chosen.formats)),
                f"{chosen.size_bytes:,}",
                spell_number(chosen.damage),
                "–" if up is None else spell_number(up * 1000),
                "–" if down is None else spell_number(down * 1000),
                group.verdict.value.replace("_", " "),
            ]
        )
    columns = ("Site", "Format", "Bytes", "Damage", "kB more gains", "kB less costs", "Decided by")
    return TextTable(_title(explanation), columns, rows, left=(0, 1, 6), lines=tuple(_explanation_lines(explanation)))


def site_offers(explanation: PlanExplanation, group: SiteExplanation) -> TextTable:
    """Every format of one site, from few bytes to many."""
    rows = [
        [
            ("→ " if offer.chosen else "  ") + " + ".join(dict.fromkeys(offer.formats)),
            f"{offer.size_bytes:,}",
            spell_number(offer.damage),
            "–" if offer.gain_per_byte is None else spell_number(offer.gain_per_byte * 1000),
            "yes" if offer.at_price else "",
        ]
        for offer in group.offers
    ]
    lines = [f"Decided by: {group.verdict.sentence}."]
    if group.shared:
        lines.append(f"Chosen together: {', '.join(group.sites)} ({group.shared}).")
    for found in group.restrictions:
        instead = f"{found.held} in its place" if found.held else "left out"
        lines.append(f"{found.requested} at {found.site}: {instead}, since {found.reason}.")
    columns = ("Format", "Bytes", "Damage", "Damage per kB of change", "Best at the price")
    return TextTable(" + ".join(group.sites), columns, rows, lines=tuple(lines))


def _title(explanation: PlanExplanation) -> str:
    method = METHOD_NAMES.get(explanation.sensitivity_method, explanation.sensitivity_method)
    return (
        f"{explanation.budget} under --target {explanation.target}, --allocator {explanation.allocator}; damage "
        f"by {method} in {spell_unit(explanation.damage_unit)}"
    )


def _explanation_lines(explanation: PlanExplanation) -> list[str]:
    counted = "whole file" if explanation.scope == "file" else "linear sites of the blocks"
    slack = explanation.slack_bytes
    lines = [
        f"{explanation.counted_bytes:,} of {explanation.limit_bytes:,} bytes used ({counted}), "
        + (f"{slack:,} left." if slack >= 0 else f"{-slack:,} too many: the plan exceeds its limit."),
    ]
    damage = f"damage {spell_number(explanation.damage, 4)}"
    if explanation.price_per_byte is None or explanation.least_damage is None:
        lines.append(f"No plan meets the limit, so a byte has no price; {damage}.")
    else:
        least = spell_number(explanation.least_damage, 4)
        price = spell_number(explanation.price_per_byte * 1000)
        lines.append(f"Price: {price} damage a kB; {damage}, least possible under this limit {least}.")
    if explanation.predicted is not None:
        lines.append(f"Predicted loss {_spell_predicted(explanation.predicted)}, 90 % band.")
    lines.append(_spell_next(explanation.next_step))
    return [*lines, *(f"{note[0].upper()}{note[1:]}." for note in explanation.notes)]


def _spell_next(step: NextStep | None) -> str:
    if step is None:
        return "Further bytes buy nothing: every site has its best format."
    before, after = (" + ".join(dict.fromkeys(names)) for names in (step.before, step.after))
    return (
        f"The next {step.more_bytes:,} bytes would buy {spell_number(step.gain)}: {' + '.join(step.sites)} "
        f"from {before} to {after}, {spell_number(step.gain_per_byte * 1000)} a kB."
    )


def explanation_table(explanation: PlanExplanation, *, offers: bool = False) -> str:
    """`explanation_rows`; with `offers` every format of every group that is shown."""
    tables = [explanation_rows(explanation)]
    if offers:
        tables += [site_offers(explanation, group) for group in explanation.groups]
    return render_text(*tables)


def comparison_rows(comparison: PlanComparison) -> tuple[TextTable, TextTable]:
    """Both plans in a table, and the sites that differ in another."""
    before, after = comparison.before, comparison.after
    rows = [
        [name, first, second]
        for name, first, second in zip(_ROW_NAMES, _summary(before), _summary(after), strict=True)
        if (first, second) != ("–", "–")
    ]
    both = TextTable("", ("", before.label, after.label), rows, lines=tuple(_comparison_lines(comparison)))
    changes = [
        [change.site, change.before, change.after, _spell_difference(change.bytes_before, change.bytes_after)]
        for change in comparison.changes[:_LISTED]
    ]
    hidden = len(comparison.changes) - len(changes)
    lines = (f"And {hidden} more; --json lists all.",) if hidden else ()
    title = f"{len(comparison.changes)} sites differ" if comparison.changes else "No site differs."
    return both, TextTable(title, ("Site", "Before", "After", "Bytes"), changes, left=(0, 1, 2), lines=lines)


_ROW_NAMES = (
    "Budget", "Target", "Size", "Bits/weight", "Bits/weight, blocks' linear", "Damage", "Predicted loss (90 % band)",
    "Measured", "n",
)  # fmt: skip


def _summary(plan: PlanSummary) -> list[str]:
    return [
        plan.budget,
        plan.target,
        spell_decimal_bytes(plan.size_bytes),
        f"{plan.bits_per_weight:.3f}",
        f"{plan.bits_per_weight_sites:.3f}",
        "–" if plan.damage is None else spell_number(plan.damage, 4),
        _spell_predicted(plan.predicted),
        "–" if plan.measured is None else spell_measured(plan.measured, plan.measured_stderr),
        "–" if plan.measured_n is None else f"{plan.measured_n:,}",
    ]


def _comparison_lines(comparison: PlanComparison) -> list[str]:
    change = comparison.after.size_bytes - comparison.before.size_bytes
    lines = [f"{change:+,} bytes in the file. Loss: {spell_name(comparison.measure)}."]
    if comparison.ratio is not None:
        ratio = comparison.ratio
        lines.append(f"Predicted loss after over before: {spell_number(ratio.value)} ({spell_band(ratio)}, 90 % band).")
    elif comparison.before.predicted is None and comparison.after.predicted is None:
        lines.append("No predicted loss: nothing calibrates these damages; cptquant frontier measures what is needed.")
    return [*lines, *(f"{note[0].upper()}{note[1:]}." for note in comparison.notes)]


def _spell_difference(before: int | None, after: int | None) -> str:
    return "shared" if before is None or after is None else f"{after - before:+,}"


def comparison_table(comparison: PlanComparison) -> str:
    """`comparison_rows` as text."""
    return render_text(*comparison_rows(comparison))
