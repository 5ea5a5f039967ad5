"""Critical mixture ratio (Gu et al. 2024, arXiv 2407.17467).

At fixed size and tokens the paper fits the domain loss as L(R) = a R^s + b and finds that its critical ratio grows with
training as R_CMR(T) = a4 T^s4 + b3. The sign of s is not settled by the data, and a jumps where s crosses 0; we fit the
same curve in the coordinates

    L(R) = b + a (1 - R^s)/s,    a > 0, s of any sign        (b: loss at R = 1; at s = 0 it is b - a ln R)

so that the paper's coefficients are a_paper = -a/s and b_paper = b + a/s.
"""

from collections.abc import Sequence

import numpy as np

from cptquant.laws.forms import Array, Form, Parameter, Points, Term, Theta, constant

TOKENS_PER_STEP = 0.2e9
"""Unit of T in the published coefficients of R_CMR(T)."""


def _terms(theta: Theta, points: Points) -> Sequence[Term]:
    s = theta["s"]
    s = np.where(np.abs(s) < 1e-9, 1e-9, s)
    ln_r = points.ln_share
    lift = np.maximum(-np.expm1(s * ln_r) / s, 1e-300)  # (1 - R^s)/s
    slope = (-np.exp(s * ln_r) * ln_r - lift) / s
    gradients: dict[str, Array | float] = {"a": 1.0, "s": np.where(lift > 1e-300, slope / lift, 0.0)}
    return [constant(theta, "b"), Term(theta.log("a") + np.log(lift), gradients)]


CRITICAL_RATIO = Form(
    name="cmr",
    title="Critical mixture ratio law",
    equation="L = b + a (1 - R^s)/s",
    domain="0 < R <= 1 at one size and one number of tokens",
    source="arXiv 2407.17467, in coordinates of ours",
    parameters=(
        Parameter("b", 1e-3, 100.0, (0.5, 0.99), relative=True, meaning="loss at share 1"),
        Parameter("a", 1e-6, 100.0, (0.01, 1.0), "r", meaning="slope in ln R at share 1"),
        Parameter("s", -3.0, 3.0, (-1.0, 1.0), "r", signed=True, meaning="bend of the curve in ln R"),
    ),
    needs=("r",),
    terms=_terms,
)


def critical_ratio(
    tokens: float,  # training tokens
    a4: float,
    s4: float,
    b3: float,
) -> float:
    """Largest domain share that keeps the general loss within tolerance: R_CMR(T) = a4 T^s4 + b3, T in 0.2B tokens."""
    return a4 * (tokens / TOKENS_PER_STEP) ** s4 + b3
