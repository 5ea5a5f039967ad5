"""What `law fit` leaves behind (law.json): parameters, intervals, how far to trust them."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from cptquant.core.artifact import Artifact, Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scattered = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
"""A standard deviation of ln L; above, exp(ln L) has no meaning left."""
Widening = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
"""sqrt(G/(G - p)) is at most 4 for the laws there are."""


class FitStatus(StrEnum):
    """How a fit went; a fit can have several."""

    CONVERGED = "converged"
    STARTS_DISAGREE = "starts_disagree"
    AT_BOUND = "at_bound"
    NOT_IDENTIFIED = "not_identified"
    TOO_FEW_RATIOS = "too_few_ratios"
    TOO_FEW_SIZES = "too_few_sizes"
    TOO_FEW_RUNS = "too_few_runs"
    REQUIREMENTS_VIOLATED = "requirements_violated"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            FitStatus.CONVERGED: "the best starts agree and every parameter is inside its bounds and identified",
            FitStatus.STARTS_DISAGREE: "the best starts end at different objectives: raise --starts",
            FitStatus.AT_BOUND: "a parameter ended on a bound: the data do not hold it, do not read its value",
            FitStatus.NOT_IDENTIFIED: (
                "a parameter can change by a factor of two while the others make up for it: only predictions between "
                "the data's points mean something"
            ),
            FitStatus.TOO_FEW_RATIOS: (
                "fewer than five mixture ratios: the ratio term has more parameters than the data can hold"
            ),
            FitStatus.TOO_FEW_SIZES: "fewer than three model sizes: no statement about other sizes",
            FitStatus.TOO_FEW_RUNS: "hardly more runs than parameters: the intervals are too narrow",
            FitStatus.REQUIREMENTS_VIOLATED: (
                "somewhere on the data's range the law breaks a requirement (more size, tokens or share should not "
                "hurt); see the map"
            ),
        }[self]


class Interval(Frozen):
    """A value with its 90% interval."""

    value: float
    low: float
    high: float


class FittedParameter(Frozen):
    """One parameter of a law, N and D in billions.

    Attributes:
        low, high: 90% bootstrap interval over runs. profile_low, profile_high: range in which the profile stays below
            its 90% limit; None where no end was found within a factor of 20. at_bound: "low", "high" or "".
        identified: the profile ends on both sides within a factor of two. fixed: held by --fix.
    """

    name: str
    value: float
    low: float
    high: float
    profile_low: float | None = None
    profile_high: float | None = None
    at_bound: str = ""
    identified: bool = True
    fixed: bool = False
    meaning: str = ""


class RequirementCheck(Frozen):
    """One requirement on the data's range.

    Attributes:
        name: e.g. `loss falls with r`. violated_share: of the grid's points. tokens, shares: axes of the map;
            violated: rows by tokens, columns by share, at the middle size. first_tokens: smallest D above which no
            point of the map is violated, None if there is none.
    """

    name: str
    violated_share: float
    tokens: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    violated: tuple[tuple[bool, ...], ...] = ()
    first_tokens: float | None = None


class ObservedRange(Frozen):
    """Smallest and largest observed value of a column, in parameters and tokens."""

    low: FiniteFloat
    high: FiniteFloat
    distinct: int


class LossFit(Frozen):
    """The law of one loss.

    Attributes:
        target: column of the data. corpus: "domain" (share is r), "general" (share is 1 - r), or "" (no mixture).
        form: a name in `cptquant.laws.methods.FORMS` (or a variant of the cross-domain law).
        statuses: how it went. objective: mean Huber loss. best_objectives: of the best starts.
        r2: of the loss. mae_nats: mean absolute residual. run_std, row_std: scatter of ln L between and within runs.
        draws: bootstrap parameter vectors (natural values, order of `parameters`). widening: factor by which the
            deviations of anything computed from them are widened.
        base: loss before training by model size, from rows with D = 0.
    """

    target: str
    corpus: Literal["", "domain", "general"]
    form: str
    equation: str
    statuses: tuple[FitStatus, ...]
    parameters: tuple[FittedParameter, ...]
    rows: int
    runs: int
    objective: float
    best_objectives: tuple[float, ...]
    r2: float
    mae_nats: float
    run_std: Scattered
    row_std: Scattered
    draws: tuple[tuple[float, ...], ...]
    widening: Widening
    ranges: dict[str, ObservedRange]
    requirements: tuple[RequirementCheck, ...] = ()
    base: tuple[tuple[Positive, Positive], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.parameters:
            raise ValueError(f"the law of {self.target} has no parameters")
        if len(self.draws) < 2:
            raise ValueError(f"the law of {self.target} has {len(self.draws)} draws, intervals need at least 2")
        wrong = [len(draw) for draw in self.draws if len(draw) != len(self.parameters)]
        if wrong:
            raise ValueError(
                f"a draw of {self.target} has {wrong[0]} numbers, the law has {len(self.parameters)} parameters"
            )
        numbers = [*self.values.values(), *(number for draw in self.draws for number in draw)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"a parameter or a draw of {self.target} is not a finite number")
        return self

    @property
    def values(self) -> dict[str, float]:
        """Parameter values by name."""
        return {parameter.name: parameter.value for parameter in self.parameters}


class LawFit(Artifact):
    """Result of `law fit` (law.json in the folder given by --output).

    Attributes:
        kind: what was asked for (`law fit KIND`). fits: by loss column. settings: how it was fitted.
        features: domain -> (k1, k2, k3) of a cross-domain law. notes: sentences for people.
    """

    SCHEMA: ClassVar[str] = "cptquant.law"
    MADE_BY: ClassVar[str] = "cptquant law fit FORM RUNS.csv --output LAW"

    kind: str
    fits: dict[str, LossFit]
    settings: dict[str, str | int | float | bool | None] = {}
    features: dict[str, tuple[Positive, Positive, NonNegative]] = {}
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not self.fits:
            raise ValueError("the file holds no law of any loss")
        for name, fit in self.fits.items():
            if name not in ("general_nll", "domain_nll", "nll"):
                raise ValueError(f"{name!r} is no loss; expected general_nll, domain_nll or nll")
            if fit.target != name:
                raise ValueError(f"the law of {name} says that its target is {fit.target!r}")
        if self.kind == "cross-domain" and not ("domain_nll" in self.fits and self.features):
            raise ValueError("a cross-domain law needs the fit of domain_nll and the features of its domains")
        return self


class Prediction(Frozen):
    """Predicted losses of one run; a loss the law does not hold is None."""

    general_nll: Interval | None = None
    domain_nll: Interval | None = None


class OptimumStatus(StrEnum):
    """Why an optimum is where it is."""

    INTERIOR = "interior"
    LIMIT_BINDS = "limit_binds"
    EDGE_OF_DATA = "edge_of_data"
    EDGE_OF_SEARCH = "edge_of_search"
    OUTSIDE_DATA = "outside_data"
    INFEASIBLE = "infeasible"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            OptimumStatus.INTERIOR: "the loss has its minimum here, within the data's range",
            OptimumStatus.LIMIT_BINDS: "the general loss reaches its limit here; without it more domain is better",
            OptimumStatus.EDGE_OF_DATA: "the best point lies on the edge of the data's ratios",
            OptimumStatus.EDGE_OF_SEARCH: (
                "the loss still falls at the end of the sizes that were searched (a factor of 1,000 around "
                "N = D / 20): the law has no optimum there"
            ),
            OptimumStatus.OUTSIDE_DATA: "the best point lies outside the data's sizes or tokens: an extrapolation",
            OptimumStatus.INFEASIBLE: "no ratio meets the limit; the ratio with the smallest general loss is given",
        }[self]


class Optimum(Frozen):
    """Answer of `law optimum`; intervals over the bootstrap draws. N in parameters, D in tokens, r domain share."""

    N: Interval
    D: Interval
    r: Interval
    general_nll: Interval | None
    domain_nll: Interval | None
    status: OptimumStatus


@dataclass(frozen=True)
class Curve:
    """One line: x and the law's mean with its 90% interval, and the observed points beside it.

    Attributes:
        label: what is held, e.g. `r = 0.5`. observed: (x, loss) pairs.
    """

    label: str
    x: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    observed: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class CurveSet:
    """Curves over one quantity.

    Attributes:
        quantity: N (parameters), D (tokens) or r (domain share). held: sentence on what is held.
    """

    quantity: str
    held: str
    curves: tuple[Curve, ...]
