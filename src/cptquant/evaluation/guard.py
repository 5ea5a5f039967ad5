"""The guard: a plan is written only if it is no worse than uniform bits at no more bytes, on held-out text."""

from collections.abc import Sequence

from cptquant.core.evaluation import DAMAGE_NAMES, Measurement
from cptquant.core.layout import Task


def choose(measurements: Sequence[Measurement], task: Task) -> tuple[str, str]:
    """Choose between "quantized" (the plan) and "uniform" by their distance to the original.

    Args:
        measurements: of both, on text that is neither calibrated on nor reported on.
        task: decides which measurement is the distance (`DAMAGE_NAMES`).

    Returns:
        The subject to write ("uniform" only if strictly closer to the original) and one sentence that says so.
    """
    name = DAMAGE_NAMES[task]
    plan, uniform = (_find(measurements, name, subject) for subject in ("quantized", "uniform"))
    written = "uniform" if uniform.value < plan.value else "quantized"
    verdict = (
        "uniform bits are better, so uniform bits were written"
        if written == "uniform"
        else "the plan is no worse, so the plan was written"
    )
    return written, (
        f"{name} on validation text: plan {_spell(plan)}, uniform at no more bytes {_spell(uniform)} "
        f"(n = {plan.n}): {verdict}"
    )


def _find(measurements: Sequence[Measurement], name: str, subject: str) -> Measurement:
    for measurement in measurements:
        if measurement.name == name and measurement.subject == subject:
            return measurement
    raise ValueError(f"{name} of {subject!r} was not measured")


def _spell(measurement: Measurement) -> str:
    stderr = "" if measurement.stderr is None else f" ± {measurement.stderr:.2g}"
    return f"{measurement.value:.4g}{stderr}"
