"""Chinchilla: loss from size and tokens (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2).

L(N, D) = E + A/N^alpha + B/D^beta,    N and D in billions
"""

from collections.abc import Sequence

from cptquant.laws.forms import (
    DATA_AMPLITUDE,
    DATA_EXPONENT,
    INTERCEPT,
    SIZE_AMPLITUDE,
    SIZE_EXPONENT,
    Form,
    Points,
    Term,
    Theta,
    constant,
    power,
)


def _terms(theta: Theta, points: Points) -> Sequence[Term]:
    return [
        constant(theta),
        power(theta, "A", "alpha", points.ln_size),
        power(theta, "B", "beta", points.ln_tokens),
    ]


CHINCHILLA = Form(
    name="chinchilla",
    title="Chinchilla",
    equation="L = E + A/N^alpha + B/D^beta",
    domain="N > 0, D > 0; one data distribution, every run trained to the end of its own schedule",
    source="arXiv 2203.15556, eq. 2; fitting procedure of arXiv 2404.10102",
    parameters=(INTERCEPT, SIZE_AMPLITUDE, SIZE_EXPONENT, DATA_AMPLITUDE, DATA_EXPONENT),
    needs=("N", "D"),
    terms=_terms,
)
