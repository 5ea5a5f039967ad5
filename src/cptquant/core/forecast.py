"""What quantizing a model is expected to cost: values with intervals, and the features behind them."""

from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen

Method = Literal["rtn", "gptq", "gptq + own text", "block-ap + own text"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "gptq + own text", "block-ap + own text")
"""What the PTQ law tells apart, spelled as `RunSettings.carried_out_with` spells it."""
FITTED_OWN_TEXT = 256
"""Own sequences behind those methods (runs/ptq_grid.py); a run with fewer is none of these."""


class PlanFeatures(Frozen):
    """Features of one plan under one method: what a PTQ law reads, one row of its table of observations.

    Attributes:
        method: one of `METHODS`. parameters, tokens_seen, nll_nats: of the original; tokens_seen None if not known.
        bits_per_weight: of the blocks' linear sites, scales included. code_bits: mean over their weights.
        group_columns: mean over their weights of the columns that share a scale.
        sqnr_db: mean over weights of -10 log10 of the relative weight error.
        output_error: mean over weights of the relative output error that the method is expected to leave.
        taylor_kl_nats: sum over sites of the second-order KL, times the method's error ratio.
        method_ratio: that sum over the same sum for rounding to nearest; 1 for rounding to nearest itself.
        random_curvature: KL along random directions over the squared radius, at the smallest radius.
        random_growth: d ln KL / d ln radius^2 between the smallest and the largest radius; 1 for a parabola.
        half_kl_nats, slope, curvature: along the rounding direction, without its end point; None if not measured.
        rtn_kl_nats, rtn_rise_nats: at its end point: the round-to-nearest loss; None if not measured.
    """

    method: str
    parameters: float
    tokens_seen: float | None
    nll_nats: float
    bits_per_weight: float
    code_bits: float
    group_columns: float
    sqnr_db: float
    output_error: float
    taylor_kl_nats: float
    method_ratio: float
    random_curvature: float
    random_growth: float
    half_kl_nats: float | None = None
    slope: float | None = None
    curvature: float | None = None
    rtn_kl_nats: float | None = None
    rtn_rise_nats: float | None = None


class Interval(Frozen):
    """A prediction with its 90 % interval."""

    value: float
    low: float
    high: float


class PtqPrediction(Frozen):
    """What one plan is expected to cost, per token, on text like that the features were measured on.

    Attributes:
        kl_nats: KL(original ‖ quantized). rise_nats: of the NLL. nll_nats, perplexity: of the quantized model on the
            text of the features; their intervals are the rise's alone, since the original's NLL is known there. On
            another text the original's NLL is another.
        outside: terms of the law that lie outside the range it was fitted on; the intervals do not cover that.
    """

    kl_nats: Interval
    rise_nats: Interval
    nll_nats: Interval
    perplexity: Interval
    outside: tuple[str, ...] = ()


class ForecastRow(Frozen):
    """One plan under one method.

    Attributes:
        plan: format of a uniform plan, or the name of another (`budget 3.5bpw`, `quantized`, `uniform`).
        size_bytes: of all tensors written. features: what the law read.
    """

    plan: str
    method: str
    size_bytes: int
    bits_per_weight: float
    prediction: PtqPrediction
    features: PlanFeatures


class PtqForecast(Artifact):
    """Result of `predict` (forecast.json).

    Attributes:
        model, architecture, parameters: of the original. original_nll_nats: on the text the features were measured on.
        law: where the law came from, and its form. text: description of the text.
    """

    SCHEMA: ClassVar[str] = "cptquant.forecast"
    MADE_BY: ClassVar[str] = "cptquant predict MODEL"

    model: str
    architecture: str
    parameters: int
    original_nll_nats: float
    law: str
    text: str
    rows: tuple[ForecastRow, ...]

    def find(self, plan: str, method: str | None = None) -> ForecastRow | None:
        """The row of a plan (and method, if several were predicted), or None."""
        for row in self.rows:
            if row.plan == plan and method in (None, row.method):
                return row
        return None
