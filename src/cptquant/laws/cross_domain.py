"""Cross-domain D-CPT Law: one law for all domains through a domain coefficient K (arXiv 2406.01375, section 5).

    L(N, D, r, K) = E + A/N^alpha + B r^eta/D^beta + C/(r + eps)^gamma + F/K^mu

    K1 = 1/k1        K2 = w2 k2        K3 = 1/k1 + w2 k2        K4 = 1/k1 + w2 k2 + w3 k3

k1: validation loss of the domain before training; k2: its relative decline over the first ~1% of the steps,
(L(0) - L(t1))/L(0); k3: how much that decline slows, (L(t1/2) - L(t1))/(L(0) - L(t1)). k3 is ours: the paper's was not
to be found. w1 is 1 because it would be redundant with F; so is w2 in K2, which is left out there.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cptquant.core.errors import DataError
from cptquant.laws.dcpt import L3, l3_terms
from cptquant.laws.forms import Array, Form, Parameter, Points, Term, Theta

Coefficient = Callable[[Theta, Array], tuple[Array, dict[str, Array]]]

_F = Parameter("F", 1e-6, 1e3, (0.05, 2.0), "K", removable=True, meaning="weight of the domain's difficulty")
_MU = Parameter("mu", 0.01, 8.0, (0.2, 2.0), "K", meaning="how fast an easier domain lowers the loss")
_W2 = Parameter("w2", 1e-3, 1e3, (0.1, 10.0), "K", meaning="worth of the early decline in K")
_W3 = Parameter("w3", 1e-3, 1e3, (0.05, 5.0), "K", meaning="worth of its slowing in K")


def _k1(_theta: Theta, features: Array) -> tuple[Array, dict[str, Array]]:
    return 1 / features[:, 0] + np.zeros((len(_theta.vectors), 1)), {}


def _k2(_theta: Theta, features: Array) -> tuple[Array, dict[str, Array]]:
    return features[:, 1] + np.zeros((len(_theta.vectors), 1)), {}


def _k3(theta: Theta, features: Array) -> tuple[Array, dict[str, Array]]:
    declined = theta["w2"] * features[:, 1]
    return 1 / features[:, 0] + declined, {"w2": declined}


def _k4(theta: Theta, features: Array) -> tuple[Array, dict[str, Array]]:
    coefficient, slopes = _k3(theta, features)
    slowed = theta["w3"] * features[:, 2]
    return coefficient + slowed, {**slopes, "w3": slowed}


def _terms_with(coefficient_of: Coefficient) -> Callable[[Theta, Points], Sequence[Term]]:
    def terms(theta: Theta, points: Points) -> Sequence[Term]:
        if points.features is None:
            raise DataError("the cross-domain law needs --features early.csv (domain, initial_nll, early_nll)")
        coefficient, slopes = coefficient_of(theta, points.features)
        mu, ln_k = theta["mu"], np.log(coefficient)
        gradients: dict[str, Array | float] = {"F": 1.0, "mu": -mu * ln_k}
        gradients |= {name: -mu * slope / coefficient for name, slope in slopes.items()}
        return [*l3_terms(theta, points), Term(theta.log("F") - mu * ln_k, gradients)]

    return terms


def _form(name: str, equation: str, extra: tuple[Parameter, ...], coefficient: Coefficient) -> Form:
    return Form(
        name=name,
        title=f"Cross-domain D-CPT, {name.upper()}",
        equation=f"{L3.equation} + F/K^mu, {equation}",
        domain=f"{L3.domain}; domains like those it was fitted on",
        source="arXiv 2406.01375, section 5",
        parameters=(*L3.parameters, _F, _MU, *extra),
        needs=("N", "D", "r", "K"),
        terms=_terms_with(coefficient),
    )


_COEFFICIENTS: dict[str, Coefficient] = {"k1": _k1, "k2": _k2, "k3": _k3, "k4": _k4}

VARIANTS: dict[str, Form] = {
    "k1": _form("k1", "K = 1/k1", (), _k1),
    "k2": _form("k2", "K = k2", (), _k2),
    "k3": _form("k3", "K = 1/k1 + w2 k2", (_W2,), _k3),
    "k4": _form("k4", "K = 1/k1 + w2 k2 + w3 k3", (_W2, _W3), _k4),
}


def domain_coefficient(form: Form, theta: Array, features: Array) -> Array:
    """K of each domain, (S, domains), from features (domains, 3)."""
    return _COEFFICIENTS[form.name](Theta(form, theta), features)[0]
