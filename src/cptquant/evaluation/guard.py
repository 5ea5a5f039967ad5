"""The guard: a plan is written only if nothing else under its limit is better on held-out text."""

from collections.abc import Mapping, Sequence

from cptquant.core.evaluation import DAMAGE_NAMES, Measurement
from cptquant.core.layout import Task


def choose(
    measurements: Sequence[Measurement], task: Task, rivals: Mapping[str, str], *, by: str | None = None
) -> tuple[str, str]:
    """Choose between "quantized" (the plan) and its rivals by their distance to the original.

    Args:
        measurements: of all of them, on text that is neither calibrated on nor reported on.
        task: decides which measurement is the distance (`DAMAGE_NAMES`).
        rivals: subject -> what it is, for the sentence, e.g. {"uniform": "uniform bits"}; at least one.
        by: another measurement to choose by, lower is better.

    Returns:
        The subject to write (a rival only if strictly closer to the original; of several the closest) and one sentence
        that says so.
    """
    name = by or DAMAGE_NAMES[task]
    found = {subject: _find(measurements, name, subject) for subject in ("quantized", *rivals)}
    written = min(found, key=lambda subject: found[subject].value)  # of equals the first, hence the plan
    own, no_worse = _WORDS["parent" in rivals]
    verdict = (
        no_worse
        if written == "quantized"
        else f"{rivals[written]} {'are' if written == 'uniform' else 'is'} better, so {rivals[written]} "
        f"{'were' if written == 'uniform' else 'was'} written"
    )
    against = ", ".join(f"{_short(subject, label)} {_spell(found[subject])}" for subject, label in rivals.items())
    plan = found["quantized"]
    return written, f"{name} on validation text: {own} {_spell(plan)}, {against} (n = {plan.n}): {verdict}"


_WORDS = {
    False: ("plan", "the plan is no worse, so the plan was written"),
    True: ("trained", "the trained weights are no worse, so they were written"),
}
"""What "quantized" is called, and said when it is written; where it was trained further, its rival is the parent."""


def _short(subject: str, label: str) -> str:
    if subject == "parent":
        return label
    limit = "under the same limit" if subject == "unrefined" else "at no more bytes"  # swaps may leave bytes over
    return f"{'uniform' if subject == 'uniform' else label} {limit}"


def _find(measurements: Sequence[Measurement], name: str, subject: str) -> Measurement:
    for measurement in measurements:
        if measurement.name == name and measurement.subject == subject:
            return measurement
    raise ValueError(f"{name} of {subject!r} was not measured")


def _spell(measurement: Measurement) -> str:
    stderr = "" if measurement.stderr is None else f" ± {measurement.stderr:.2g}"
    return f"{measurement.value:.4g}{stderr}"
