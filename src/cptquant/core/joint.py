"""Size, mixture, tokens and bits chosen together (joint_plan.json), and the law of what bits cost in a sweep."""

from enum import StrEnum
from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.laws import Interval

FLOAT_BITS = 16
"""Spelling of "not quantized" among the bits."""


class DamageLaw(Frozen):
    """What quantizing to b bits costs on one text, fitted to the quantized models of a sweep.

        ln KL = c_b + a ln(N/1e6) [+ d ln(T/1e6)] [+ e r]        rise of the NLL = rho KL

    T are all tokens the model was trained on, those of its base model included where they are known. The terms in
    brackets are in only where they predict left-out runs better; 0 otherwise.

    Attributes:
        text: "general" or the domain's name. intercepts: bits -> c_b. kl_scatter: standard deviation of ln KL that is
            left between runs. rise_scatter: of the rise, relative to the KL.
        draws: of (c_b..., a, d, e, rho), Bayesian bootstrap over runs, intercepts in the order of `intercepts`.
        rows, runs: fitted to. decided: for each optional term, why it is in or out.
    """

    text: str
    intercepts: dict[int, float]
    size_power: float
    tokens_power: float
    share_slope: float
    rise_per_kl: float
    kl_scatter: float
    rise_scatter: float
    draws: tuple[tuple[float, ...], ...]
    rows: int
    runs: int
    decided: tuple[str, ...]


class JointStatus(StrEnum):
    """Why the recommended point is where it is; a point can have several."""

    SIZE_LIMIT = "size_limit"
    COMPUTE_LIMIT = "compute_limit"
    TEXT_LIMIT = "text_limit"
    GENERAL_LIMIT = "general_limit"
    EDGE_OF_SHARES = "edge_of_shares"
    BEYOND_TOKENS = "beyond_tokens"
    INFEASIBLE = "infeasible"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            JointStatus.SIZE_LIMIT: "more bits or a larger size would be better and do not fit --max-size",
            JointStatus.COMPUTE_LIMIT: "more tokens would be better and take longer than --compute",
            JointStatus.TEXT_LIMIT: "more tokens would be better and repeat a text more than --max-epochs times",
            JointStatus.GENERAL_LIMIT: "the general loss reaches its limit here; without it more domain text is better",
            JointStatus.EDGE_OF_SHARES: "the best share is an end of the sweep's shares",
            JointStatus.BEYOND_TOKENS: "more tokens than any run of the sweep had: an extrapolation of the law",
            JointStatus.INFEASIBLE: (
                "no point keeps the general loss within its limit; the one that exceeds it least is given"
            ),
        }[self]


class JointPoint(Frozen):
    """One way of adapting and compressing.

    Attributes:
        label: what it is, or how it differs from the recommended point. bits: of the codes; 16 is not quantized.
        parameters: N. tokens: D. ratio: r. size_bytes: of all tensors written. seconds, flops: of the training.
        domain_nll, general_nll: predicted, nats per token, in 90 % intervals of a new run; quantizing included.
        domain_rise, general_rise: the part of them that quantizing costs.
        general_increase: of the general loss over the base model's, relative. allowed: within every limit.
    """

    label: str
    size: str
    parameters: int
    bits: int
    format: str
    ratio: float
    tokens: float
    size_bytes: int
    seconds: float
    flops: float
    domain_nll: Interval
    general_nll: Interval
    domain_rise: Interval
    general_rise: Interval
    general_increase: float
    allowed: bool


class Measured(Frozen):
    """A point that was carried out: losses of what was written, on the sweep's own validation windows.

    Attributes:
        float_domain_nll, float_general_nll: after adapting, before quantizing. stderrs: over documents, for a paired
            look at the numbers' own accuracy; the scatter between runs is not in them.
    """

    label: str
    folder: str
    tokens: int
    size_bytes: int
    domain_nll: float
    domain_stderr: float | None
    general_nll: float
    general_stderr: float | None
    float_domain_nll: float
    float_general_nll: float
    seconds: float


class JointPlan(Artifact):
    """joint_plan.json.

    Attributes:
        sweep: its folder. domain: its name there. limits: as asked for, in words.
        best: recommended. neighbours: one change each. candidates: the best point of every size and bits.
        statuses: why `best` is where it is. share_range, tokens_range: 90 % over draws of both laws.
        agreement: share of the draws in which size and bits are the same as in `best`.
        law, damage: which laws, in words. notes: what a person should know. measured: points that were carried out.
    """

    SCHEMA: ClassVar[str] = "cptquant.joint_plan"
    MADE_BY: ClassVar[str] = "cptquant plan SWEEP --max-size SIZE --compute TIME --output PLAN"

    sweep: str
    domain: str
    target: str
    limits: dict[str, str]
    best: JointPoint
    neighbours: tuple[JointPoint, ...]
    candidates: tuple[JointPoint, ...]
    statuses: tuple[JointStatus, ...]
    share_range: Interval
    tokens_range: Interval
    agreement: float
    law: str
    damage: str
    damages: tuple[DamageLaw, ...] = ()
    notes: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()
