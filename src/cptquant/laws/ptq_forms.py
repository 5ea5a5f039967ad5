"""Forms of the PTQ law: which terms stand in it, and the regression that finds their factors.

    ln KL = ln k_m + sum_t c_t x_t                   m: method; x_t: the terms of a form
    rise of the NLL = r_m KL + s_m slope             slope: of the NLL along the rounding direction, if measured

The first line is k N^-a D^b E^c for KL, with an intercept per method (arXiv 2411.17691 has the same shape in bits). The
second is a Taylor expansion: on the model's own predictions the rise is the KL divergence; on real text there is a
first-order part besides, which does not vanish where the text's gradient does not.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

from cptquant.core.artifact import Frozen
from cptquant.core.errors import DataError
from cptquant.core.forecast import PlanFeatures
from cptquant.laws.ptq_table import PtqObservation

Floats = NDArray[np.float64]

LEAST_KL_NATS = 1e-6
"""Below it the rounding of float32 forward passes is what is seen; such rows teach nothing and are left out."""
_TINY = 1e-12
_SECOND_ORDER_LIMIT_NATS = 1.0
"""Above it the second order says only that the damage is large; the bend of the law stops there."""
_RIDGE = 1e-3
"""Of standardised terms, per row: enough to settle collinear terms, too little to bend a clear one."""
_RISE_MODEL_ERROR = 0.1
"""Relative error granted to r_m KL beside the standard error of a measured rise, when rows are weighed."""

TERMS: dict[str, Callable[[PlanFeatures], float | None]] = {
    "ln_parameters": lambda f: math.log(f.parameters),
    "ln_tokens_seen": lambda f: None if f.tokens_seen is None else math.log(f.tokens_seen),
    "nll": lambda f: f.nll_nats,
    "ln_output_error": lambda f: math.log(max(f.output_error, _TINY)),
    "sqnr_db": lambda f: f.sqnr_db,
    "ln_random_curvature": lambda f: math.log(f.random_curvature),
    "random_growth": lambda f: f.random_growth,
    "ln_taylor_kl": lambda f: math.log(max(f.taylor_kl_nats, _TINY)),
    "taylor_kl": lambda f: min(f.taylor_kl_nats, _SECOND_ORDER_LIMIT_NATS),
    "ln_half_over_taylor": lambda f: _log_over_taylor(f, f.half_kl_nats, 4.0),
    "ln_full_over_taylor": lambda f: _log_over_taylor(f, f.rtn_kl_nats, 1.0),
}
"""Name of a term -> its value; None where the feature was not measured."""

FORMS: dict[str, tuple[str, ...]] = {
    "error": ("ln_parameters", "ln_tokens_seen", "ln_output_error"),
    "curvature": ("ln_random_curvature", "random_growth", "ln_output_error"),
    "taylor": ("ln_taylor_kl", "taylor_kl"),
    "landscape": ("ln_taylor_kl", "taylor_kl", "ln_half_over_taylor"),
    "full": ("ln_taylor_kl", "taylor_kl", "ln_full_over_taylor"),
}
"""`error` is k N^-a D^b E^c. `curvature` puts the measured curvature along random directions in the place of N and D.
`taylor` has the second-order KL of the very change, which holds all of these. `landscape` corrects it by the loss half
way to the rounded model, `full` by the round-to-nearest loss itself: `landscape` against `full` ablates that loss.
"""


def _log_over_taylor(features: PlanFeatures, kl_nats: float | None, factor: float) -> float | None:
    """ln of a KL measured along the rounding direction over what the second order expects there."""
    if kl_nats is None:
        return None
    expected = features.taylor_kl_nats / max(features.method_ratio, _TINY)
    return math.log(max(factor * kl_nats, _TINY) / max(expected, _TINY))


def term_values(form: str, features: PlanFeatures) -> list[float]:
    """Values of the form's terms, in order.

    Raises:
        DataError: a feature was not measured.
    """
    values: list[float] = []
    for name in FORMS[form]:
        value = TERMS[name](features)
        if value is None:
            raise DataError(
                f"the form {form!r} of the PTQ law needs {name}, which was not measured; forms without it: "
                f"{', '.join(other for other in FORMS if name not in FORMS[other])}"
            )
        values.append(value)
    return values


def absent_forms(fitted: Collection[str]) -> list[str]:
    """A sentence for each form that a table could not be fitted by, because rows lack a feature."""
    columns = {"ln_tokens_seen": "tokens_seen", "ln_half_over_taylor": "half_kl_nats"}
    return [
        f"form {form} was not fitted: its columns ({', '.join(columns[term] for term in terms if term in columns)}) "
        "are empty in some rows"
        for form, terms in FORMS.items()
        if form not in fitted
    ]


class RiseLine(Frozen):
    """Rise of the NLL = per_kl * KL + per_slope * slope, for one method."""

    per_kl: FiniteFloat
    per_slope: FiniteFloat


class PtqCoefficients(Frozen):
    """One fitted form.

    Attributes:
        intercepts: method -> ln k. coefficients: term -> factor. rise: method -> line.
        low, high: term -> smallest and largest value in the fit; a prediction outside is an extrapolation.
    """

    form: str
    intercepts: dict[str, FiniteFloat]
    coefficients: dict[str, FiniteFloat]
    rise: dict[str, RiseLine]
    low: dict[str, FiniteFloat]
    high: dict[str, FiniteFloat]

    def lacking(self) -> str:
        """The first entry without which no plan can be predicted, e.g. `nll in low`; empty where nothing lacks."""
        for name in FORMS[self.form]:
            for where, held in (("coefficients", self.coefficients), ("low", self.low), ("high", self.high)):
                if name not in held:
                    return f"{name} in {where}"
        absent = [method for method in self.intercepts if method not in self.rise]
        return f"{absent[0]} in rise" if absent else ""

    def kl_nats(self, features: PlanFeatures) -> float:
        """Point prediction of KL(original ‖ quantized), nats per token; 0 for a plan that changes nothing.

        Raises:
            DataError: a feature is missing, or the method was not in the table.
        """
        if features.method not in self.intercepts:
            raise DataError(
                f"the PTQ law was fitted on {', '.join(sorted(self.intercepts))}, not on {features.method!r}; fit it "
                "on a table that holds that method"
            )
        if features.taylor_kl_nats == 0:
            return 0.0
        values = term_values(self.form, features)
        return math.exp(
            self.intercepts[features.method]
            + math.fsum(self.coefficients[name] * value for name, value in zip(FORMS[self.form], values, strict=True))
        )

    def rise_nats(self, features: PlanFeatures) -> float:
        """Point prediction of the rise of the NLL, nats per token."""
        line = self.rise[features.method]
        return line.per_kl * self.kl_nats(features) + line.per_slope * scaled_slope(features)

    def outside(self, features: PlanFeatures) -> tuple[str, ...]:
        """Terms that lie outside the range of the fit by more than a tenth of it."""
        found: list[str] = []
        for name, value in zip(FORMS[self.form], term_values(self.form, features), strict=True):
            margin = 0.1 * (self.high[name] - self.low[name]) + 1e-9
            if not self.low[name] - margin <= value <= self.high[name] + margin:
                found.append(name)
        return tuple(found)


def scaled_slope(features: PlanFeatures) -> float:
    """Slope of the NLL along the rounding direction; of GPTQ's shorter way its share. 0 if it was not measured."""
    return 0.0 if features.slope is None else features.slope * math.sqrt(features.method_ratio)


@dataclass(frozen=True)
class Design:
    """A table in the terms of one form, so that a law can be fitted on any part of it without reading it again.

    Attributes:
        terms: (n, terms). methods: names; method: (n,) index into them. family: (n,) index of the family.
        kl, rise, rise_stderr, slope: (n,) nats per token; slope as `scaled_slope`.
    """

    form: str
    terms: Floats
    methods: tuple[str, ...]
    method: NDArray[np.int64]
    family: NDArray[np.int64]
    kl: Floats
    rise: Floats
    rise_stderr: Floats
    slope: Floats

    @classmethod
    def build(cls, observations: Sequence[PtqObservation], form: str) -> "Design":
        """Read the rows.

        Raises:
            DataError: a feature of the form is missing in a row.
        """
        methods = sorted({row.features.method for row in observations})
        families = list(dict.fromkeys(row.family for row in observations))
        return cls(
            form=form,
            terms=np.array([term_values(form, row.features) for row in observations]),
            methods=tuple(methods),
            method=np.array([methods.index(row.features.method) for row in observations]),
            family=np.array([families.index(row.family) for row in observations]),
            kl=np.array([row.kl_nats for row in observations]),
            rise=np.array([row.rise_nats for row in observations]),
            rise_stderr=np.array([row.rise_stderr_nats for row in observations]),
            slope=np.array([scaled_slope(row.features) for row in observations]),
        )

    @property
    def families(self) -> int:
        """How many."""
        return int(self.family.max()) + 1

    def fit(self, used: NDArray[np.bool_]) -> "Solution":
        """Ridge regression of ln KL on the terms, then a weighted line for the rise, per method.

        Rows of one family count together as much as those of another, however many there are.
        """
        terms, family = self.terms[used], self.family[used]
        weights = np.sqrt(1.0 / np.bincount(family)[family])
        centre, spread = terms.mean(axis=0), terms.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        count = terms.shape[1]
        dummies = np.eye(len(self.methods))[self.method[used]]
        design = np.hstack([(terms - centre) / spread, dummies]) * weights[:, None]
        penalty = np.zeros((count, design.shape[1]))
        penalty[:, :count] = np.eye(count) * math.sqrt(_RIDGE * float((weights**2).sum()))
        target = np.concatenate([np.log(self.kl[used]) * weights, np.zeros(count)])
        found = np.linalg.lstsq(np.vstack([design, penalty]), target, rcond=None)[0]
        factors = found[:count] / spread
        intercepts = np.asarray(found[count:] - float(centre @ factors), dtype=np.float64)
        predicted = np.exp(self.terms @ factors + intercepts[self.method])
        lines = [self._fit_rise(used & (self.method == index), predicted) for index in range(len(self.methods))]
        return Solution(factors, intercepts, np.array(lines))

    def _fit_rise(self, used: NDArray[np.bool_], predicted: Floats) -> tuple[float, float]:
        if not used.any():
            return 1.0, 0.0
        weights = 1 / np.sqrt(self.rise_stderr[used] ** 2 + (_RISE_MODEL_ERROR * predicted[used]) ** 2)
        design = np.stack([predicted[used], self.slope[used]], axis=1) * weights[:, None]
        line = np.linalg.lstsq(design, self.rise[used] * weights, rcond=None)[0]
        return float(line[0]), float(line[1])

    def predict(self, solution: "Solution") -> tuple[Floats, Floats]:
        """KL and rise of every row, (n,) each."""
        kl = np.exp(self.terms @ solution.factors + solution.intercepts[self.method])
        lines = solution.lines[self.method]
        return kl, lines[:, 0] * kl + lines[:, 1] * self.slope


@dataclass(frozen=True)
class Solution:
    """Numbers of one fit: factors (terms,), intercepts (methods,), lines (methods, 2) of the rise."""

    factors: Floats
    intercepts: Floats
    lines: Floats


def fit_coefficients(observations: Sequence[PtqObservation], form: str) -> PtqCoefficients:
    """Fit a form on all rows; see `Design.fit`.

    Raises:
        DataError: a feature of the form is missing in a row.
    """
    design = Design.build(observations, form)
    solution = design.fit(np.ones(len(observations), dtype=np.bool_))
    names = FORMS[form]

    def by_term(values: Floats) -> dict[str, float]:
        return dict(zip(names, map(float, values), strict=True))

    return PtqCoefficients(
        form=form,
        intercepts=dict(zip(design.methods, map(float, solution.intercepts), strict=True)),
        coefficients=by_term(solution.factors),
        rise={
            method: RiseLine(per_kl=float(line[0]), per_slope=float(line[1]))
            for method, line in zip(design.methods, solution.lines, strict=True)
        },
        low=by_term(design.terms.min(axis=0)),
        high=by_term(design.terms.max(axis=0)),
    )
