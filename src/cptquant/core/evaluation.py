"""Measurements with their sample size and error."""

from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.layout import Task

DAMAGE_NAMES: dict[Task, str] = {
    "causal_lm": "kl_nats_per_token",
    "masked_lm": "kl_nats_per_token",
    "sequence_classification": "kl_nats_per_example",
    "encoder": "embedding_cosine_distance",
}
"""For each task the measurement that says how far a model is from the original; 0 is equal, lower is better."""

Subject = Literal["original", "quantized", "parent", "uniform", "preset", "unrefined", "random"]


class Measurement(Frozen):
    """One number about one model.

    Attributes:
        name: e.g. `nll_nats_per_token`, `perplexity`, `kl_nats_per_token`, `top1_agreement`, `accuracy`,
            `embedding_cosine`, `weight_bytes`, `parameters`, `compression_vs_float16`.
        subject: which model. For divergences, the model compared with the original.
        n: number of independent units behind the value (tokens, examples, sentences); 0 for exact counts.
        stderr: standard error of the value, None for exact counts.
        note: how it was counted, where that matters.
    """

    name: str
    subject: str
    value: float
    unit: str
    n: int = 0
    stderr: float | None = None
    note: str = ""


class EvaluationReport(Artifact):
    """Result of `evaluate` (evaluation.json).

    Attributes:
        measurements: all of them, in reading order.
        settings: window length, number of windows, text digest, ... : what must agree for two reports to compare.
        written: which subject's weights are in checkpoint/: "quantized", or what the guard chose instead ("uniform",
            "preset", "unrefined", "parent": what a recovery started from).
        guard: one sentence on how the plan compares with the others at no more bytes.
        unlearned: baselines that stayed as GPTQ left them, where the run's quantizer learns.
    """

    SCHEMA: ClassVar[str] = "cptquant.evaluation"
    MADE_BY: ClassVar[str] = "cptquant quantize RUN"

    measurements: tuple[Measurement, ...]
    settings: dict[str, str | int | float | bool | None] = {}
    written: str | None = None
    guard: str = ""
    unlearned: tuple[str, ...] = ()

    def carried_out(self, plan: str) -> bool:
        """Whether what was measured under a plan's name is that plan, quantized as the run quantizes.

        Not where the guard wrote another in its place, or a baseline was given up before learning.
        """
        return plan not in self.unlearned and (plan != "quantized" or self.written in (None, "quantized"))

    def find(self, name: str, subject: str) -> Measurement | None:
        """The measurement of that name and subject, or None."""
        for measurement in self.measurements:
            if measurement.name == name and measurement.subject == subject:
                return measurement
        return None
