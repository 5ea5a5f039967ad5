"""The first thing a person reads: what was asked, what came out, and what else the bytes could have bought."""

from collections.abc import Sequence
from dataclasses import dataclass

from cptquant.core.evaluation import EvaluationReport, Measurement
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.reports.quantities import (
    spell_bytes,
    spell_decimal_bytes,
    spell_exact_bytes,
    spell_measured,
    spell_measurement,
    spell_name,
    spell_number,
    spell_share,
    spell_unit,
)

SUBJECT_LABELS = {
    "original": "Original",
    "quantized": "Quantized",
    "parent": "Parent run",
    "uniform": "Uniform bits",
    "preset": "Types of llama.cpp's preset",
    "unrefined": "Plan before swaps",
    "random": "Random bits",
}
"""Subjects of an evaluation for people, in reading order."""

BASELINES = ("parent", "uniform", "preset", "unrefined", "random")
"""Subjects that the plan is compared with."""

DISTANCES = ("kl_nats_per_token", "kl_nats_per_example", "embedding_cosine_distance")
"""Measurements that say how far a model is from the original, whichever its task has."""

QUALITIES = ("perplexity", "accuracy", "embedding_cosine")
"""Measurements of what a model is good for, whichever its task has."""


INCREASES = ("nll_increase_nats_per_token", "nll_increase_nats_per_example")
"""Paired differences to the original on the same text."""


def find_measurement(evaluation: EvaluationReport | None, names: Sequence[str], subject: str) -> Measurement | None:
    """The first of these measurements that the evaluation has for the subject."""
    if evaluation is None:
        return None
    return next((found for name in names if (found := evaluation.find(name, subject)) is not None), None)


def spell_value(measurement: Measurement | None, *, brief: bool = False) -> str:
    """A measurement in one cell; a dash if there is none."""
    if measurement is None:
        return "–"
    return spell_measurement(measurement.name, measurement.value, measurement.stderr, brief=brief)


@dataclass(frozen=True)
class Card:
    """A large figure with its name above and what it is to be read against below.

    Attributes:
        error: shown smaller beside the value: its standard error, or the size in the other unit.
        exact: unrounded, for hovering.
    """

    name: str
    value: str
    error: str
    details: tuple[str, ...]
    exact: str = ""


@dataclass(frozen=True)
class VariantRow:
    """One line of the comparison: a subject with its cells."""

    subject: str
    label: str
    cells: tuple[str, ...]
    is_written: bool = False


def headline_cards(layout: ModelLayout, plan: Plan | None, evaluation: EvaluationReport | None) -> list[Card]:
    """Size, bits per weight, quality before and after, distance to the original: those that are known."""
    cards: list[Card] = []
    if plan is not None:
        cards += [_size_card(layout, plan, evaluation), _bits_card(plan)]
    quality = _quality_card(evaluation)
    distance = _distance_card(evaluation)
    return [*cards, *(card for card in (quality, distance) if card is not None)]


def _size_card(layout: ModelLayout, plan: Plan, evaluation: EvaluationReport | None) -> Card:
    against: list[str] = []
    for width, name, size_bytes in ((16, "float16", layout.bytes_at_16_bit), (32, "float32", layout.bytes_at_32_bit)):
        ratio = find_measurement(evaluation, (f"compression_vs_{name}",), "quantized")
        share = (
            f"{spell_number(ratio.value)}× smaller than" if ratio else f"{spell_share(plan.size_bytes, size_bytes)} of"
        )
        against.append(f"{share} FP{width} ({spell_decimal_bytes(size_bytes)})")
    decimal, _, binary = spell_bytes(plan.size_bytes).partition(" (")
    return Card("Size", decimal, binary.removesuffix(")"), tuple(against), spell_exact_bytes(plan.size_bytes))


def _bits_card(plan: Plan) -> Card:
    return Card(
        "Bits per weight",
        f"{plan.bits_per_weight:.3f}",
        "",
        ("scales, embeddings and norms included", f"{plan.bits_per_weight_sites:.3f} in the blocks' linear sites"),
    )


def _quality_card(evaluation: EvaluationReport | None) -> Card | None:
    after = find_measurement(evaluation, QUALITIES, "quantized")
    if evaluation is None or after is None:
        return None
    before = evaluation.find(after.name, "original")
    details = [f"original {spell_value(before)}"] if before else []
    paired = spell_increase(evaluation)
    if paired:
        details.append(paired)
    details.append(f"n = {after.n:,}")
    return Card(spell_name(after.name), *_split_error(after), tuple(details), f"{after.value!r}")


def _distance_card(evaluation: EvaluationReport | None) -> Card | None:
    found = find_measurement(evaluation, DISTANCES, "quantized")
    if evaluation is None or found is None:
        return None
    others = [
        f"{_lower(SUBJECT_LABELS[subject])} {spell_value(other)}"
        for subject in BASELINES
        if (other := evaluation.find(found.name, subject)) is not None
    ]
    unit = spell_unit(found.name) if found.name.startswith("kl_") else ""
    counted = f"{unit}, n = {found.n:,}" if unit else f"n = {found.n:,}"
    return Card(spell_name(found.name), *_split_error(found), (*others, counted), f"{found.value!r}")


def _split_error(measurement: Measurement) -> tuple[str, str]:
    """The value, and what belongs beside it in smaller type; one text where both share a power of ten."""
    text = spell_value(measurement)
    value, sign, error = text.partition(" ± ")
    return (value, f"± {error}") if sign and not text.startswith("(") else (text, "")


def spell_increase(evaluation: EvaluationReport) -> str:
    """The paired increase of NLL over the original, whose error is far below that of either perplexity."""
    found = find_measurement(evaluation, INCREASES, "quantized")
    if found is None:
        return ""
    sign = "+" if found.value >= 0 else ""
    return f"NLL {sign}{spell_value(found)} {spell_unit(found.name)}, paired"


def comparison_columns(evaluation: EvaluationReport) -> list[str]:
    """Measurement names worth a column of the comparison, in reading order."""
    wanted = ("weight_bytes", "bits_per_weight", *QUALITIES, *INCREASES, *DISTANCES, "top1_agreement")
    present = {measurement.name for measurement in evaluation.measurements}
    return [name for name in wanted if name in present]


def comparison_rows(evaluation: EvaluationReport, written: str, *, brief: bool = False) -> list[VariantRow]:
    """One row per subject that was measured; `written` marks what stands in checkpoint/."""
    columns = comparison_columns(evaluation)
    subjects = {measurement.subject for measurement in evaluation.measurements}
    instead = f" ({_lower(SUBJECT_LABELS[written])})" if written in BASELINES else ""
    return [
        VariantRow(
            subject,
            f"{label}{instead}" if subject == "quantized" else label,
            tuple(_cell(evaluation.find(name, subject), name, subject, brief) for name in columns),
            is_written=subject == "quantized" and written in ("quantized", *BASELINES),
        )
        for subject, label in SUBJECT_LABELS.items()
        if subject in subjects
    ]


def _cell(measurement: Measurement | None, name: str, subject: str, brief: bool) -> str:
    if measurement is None and subject == "original" and name in (*INCREASES, *DISTANCES, "top1_agreement"):
        return "reference"
    return spell_value(measurement, brief=brief)


def spell_baselines(evaluation: EvaluationReport, plan: Plan | None) -> str:
    """Whether the baselines really took no more bytes than the plan."""
    found = [
        (SUBJECT_LABELS[subject], size.value)
        for subject in BASELINES
        if (size := evaluation.find("weight_bytes", subject)) is not None
    ]
    if plan is None or not found:
        return ""
    larger = [label for label, size_bytes in found if size_bytes > plan.size_bytes]
    if larger:
        return f"{_join(larger)} took more bytes than the plan: the comparison favours them."
    return f"{_join([label for label, _ in found])} took no more bytes than the plan."


def _join(labels: Sequence[str]) -> str:
    return " and ".join([labels[0], *(_lower(label) for label in labels[1:])])


def _lower(label: str) -> str:
    return f"{label[0].lower()}{label[1:]}"


def spell_change(layout: ModelLayout, plan: Plan, asked: Plan | None = None) -> str:
    """One sentence: what went in, what came out, and what the budget allowed.

    Args:
        plan: of what was written. asked: the allocator's plan, where the guard wrote another one; its budget is what
            the person asked for.
    """
    budget = asked or plan
    scope = " for the blocks' linear sites" if budget.budget_scope == "sites" else ""
    return (
        f"{spell_bytes(layout.source_bytes)} of {layout.source_dtype} weights became {spell_bytes(plan.size_bytes)}, "
        f"{spell_share(plan.size_bytes, layout.source_bytes)} of the original. "
        f"The budget, {budget.budget}, allowed {spell_bytes(budget.limit_bytes)}{scope}."
    )


def damage_points(evaluation: EvaluationReport, subjects: Sequence[str]) -> tuple[str, list[tuple[str, Measurement]]]:
    """The distance measurement of these subjects: its name and (subject, measurement) pairs; empty if unmeasured."""
    for name in DISTANCES:
        pairs = [(subject, found) for subject in subjects if (found := evaluation.find(name, subject)) is not None]
        if pairs:
            return name, pairs
    return "", []


def spell_distance(name: str) -> str:
    """Axis title of a distance."""
    unit = spell_unit(name) if name.startswith("kl_") else ""
    return f"{spell_name(name)}{f', {unit}' if unit else ''}"


def spell_plain(measurement: Measurement) -> str:
    """Value with its error, never humanised: for full tables."""
    if measurement.stderr is None and float(measurement.value).is_integer():
        return f"{measurement.value:,.0f}"
    return spell_measured(measurement.value, measurement.stderr)
