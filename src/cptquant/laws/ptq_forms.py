"""Forms of the PTQ law: which terms stand in it, and the regression that finds their factors.

    ln KL = ln k_m + sum_t c_t x_t                   m: method; x_t: the terms of a form
    rise of the NLL = r_m KL + s_m slope             slope: of the NLL along the rounding direction, if measured

The first line is k N^-a D^b E^c for KL, with an intercept per method (arXiv 2411.17691 has the same shape in bits). The
second is a Taylor expansion: on the model's own predictions the rise is the KL divergence; on real text there is a
first-order part besides, which does not vanish where the text's gradient does not.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

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


class RiseLine(Frozen):
    """Rise of the NLL = per_kl * KL + per_slope * slope, for one method."""

    per_kl: float
    per_slope: float


class PtqCoefficients(Frozen):
    """One fitted form.

    Attributes:
        intercepts: method -> ln k. coefficients: term -> factor. rise: method -> line.
        low, high: term -> smallest and largest value in the fit; a prediction outside is an extrapolation.
    """

    form: str
    intercepts: dict[str, float]
    coefficients: dict[str, float]
    rise: dict[str, RiseLine]
    low: dict[str, float]
    high: dict[str, float]

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


def fit_coefficients(observations: Sequence[PtqObservation], form: str) -> PtqCoefficients:
    """Ridge regression of ln KL on a form's terms, then a weighted line for the rise, per method.

    Rows of one family count together as much as those of another, however many there are.

    Raises:
        DataError: a feature of the form is missing in a row.
    """
    rows = [row for row in observations if row.kl_nats >= LEAST_KL_NATS]
    methods = sorted({row.features.method for row in rows})
    terms = np.array([term_values(form, row.features) for row in rows])
    dummies = np.array([[float(row.features.method == method) for method in methods] for row in rows])
    target = np.log([row.kl_nats for row in rows])
    families = [row.family for row in rows]
    weights = np.sqrt([1.0 / families.count(family) for family in families])
    centre, spread = terms.mean(axis=0), terms.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    design = np.hstack([(terms - centre) / spread, dummies]) * weights[:, None]
    penalty = np.zeros((terms.shape[1], design.shape[1]))
    penalty[:, : terms.shape[1]] = np.eye(terms.shape[1]) * math.sqrt(_RIDGE * float((weights**2).sum()))
    solution = np.linalg.lstsq(
        np.vstack([design, penalty]), np.concatenate([target * weights, np.zeros(len(penalty))]), rcond=None
    )[0]
    factors = solution[: terms.shape[1]] / spread
    shift = float(centre @ factors)
    names = FORMS[form]
    intercepts = {m: float(value) - shift for m, value in zip(methods, solution[terms.shape[1] :], strict=True)}
    unfinished = PtqCoefficients(
        form=form,
        intercepts=intercepts,
        coefficients=dict(zip(names, map(float, factors), strict=True)),
        rise={},
        low=dict(zip(names, map(float, terms.min(axis=0)), strict=True)),
        high=dict(zip(names, map(float, terms.max(axis=0)), strict=True)),
    )
    return unfinished.model_copy(update={"rise": {m: _fit_rise(rows, m, unfinished) for m in methods}})


def _fit_rise(rows: Sequence[PtqObservation], method: str, law: PtqCoefficients) -> RiseLine:
    mine = [row for row in rows if row.features.method == method]
    predicted = np.array([law.kl_nats(row.features) for row in mine])
    slopes = np.array([scaled_slope(row.features) for row in mine])
    rises, errors = np.array([row.rise_nats for row in mine]), np.array([row.rise_stderr_nats for row in mine])
    weights = 1 / np.sqrt(errors**2 + (_RISE_MODEL_ERROR * predicted) ** 2)
    design = np.stack([predicted, slopes], axis=1) * weights[:, None]
    solution = np.linalg.lstsq(design, rises * weights, rcond=None)[0]
    return RiseLine(per_kl=float(solution[0]), per_slope=float(solution[1]))
