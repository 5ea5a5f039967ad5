"""Data-limited repetition (Muennighoff et al. 2023, arXiv 2305.16264, eq. 5 and 6, the data half).

    L(N, D, U) = E + A/N^alpha + B/D'^beta,    D' = U + U R* (1 - exp(-(D/U - 1)/R*))

U: distinct tokens; R*: after how many repetitions a token has lost most of its worth (the paper: about 15). The paper
also discounts excess parameters; that half is left out because U-limited grids rarely identify it.
"""

from collections.abc import Sequence

import numpy as np

from cptquant.core.errors import DataError
from cptquant.laws.chinchilla import CHINCHILLA
from cptquant.laws.forms import Array, Form, Parameter, Points, Term, Theta, constant, power


def _terms(theta: Theta, points: Points) -> Sequence[Term]:
    if points.unique_billions is None:
        raise DataError("law `repetition` needs a column U (distinct tokens); add it, or choose --forms chinchilla")
    unique, worth, beta = points.unique_billions, theta["R"], theta["beta"]
    repeats = np.maximum(points.tokens_billions / unique - 1, 0.0)
    left = np.exp(-repeats / worth)
    effective = np.minimum(unique, points.tokens_billions) + unique * worth * (1 - left)
    ln_effective = np.log(effective)
    d_worth = unique * (1 - left) - unique * left * repeats / worth
    gradients: dict[str, Array | float] = {
        "B": 1.0,
        "beta": -beta * ln_effective,
        "R": -beta * d_worth * worth / effective,
    }
    data = Term(theta.log("B") - beta * ln_effective, gradients)
    return [constant(theta), power(theta, "A", "alpha", points.ln_size), data]


REPETITION = Form(
    name="repetition",
    title="Data-limited repetition",
    equation="L = E + A/N^alpha + B/D'^beta, D' = U + U R (1 - exp(-(D/U-1)/R))",
    domain="N > 0, D > 0, U > 0; D below U counts as not repeated",
    source="arXiv 2305.16264, eq. 5 and 6 without the discount of parameters",
    parameters=(*CHINCHILLA.parameters, Parameter("R", 0.1, 1e3, (1.0, 50.0), "U", meaning="worth of repetition")),
    needs=("N", "D", "U"),
    terms=_terms,
)
