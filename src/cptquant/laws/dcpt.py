"""D-CPT Law: loss of continual pre-training from size, tokens and mixture ratio (Que et al. 2024, arXiv 2406.01375).

    L3 = E + A/N^alpha + B r^eta/D^beta + C/(r + eps)^gamma          (the form the paper chooses)

r is the share of the corpus whose loss is predicted: r_d for the domain loss, 1 - r_d for the general one. The rivals
L1, L2, L4, L5 are those of the paper's comparison; their forms are known second-hand (see docs/laws.md).

Two extensions of ours represent a general loss that *rises* with D at a small general ratio, which L3 cannot
(dL3/dD <= 0 for every r):

    inflection  E + A/N^alpha + B (r^eta - ri^eta)/D^beta + C/(r + eps)^gamma      rises with D where r < ri
    forgetting  L3 + F (1 - r)^kappa (1 - (1 + D/D0)^-beta)                        saturating loss of what was known

Both contain L3 (ri -> 0, F -> 0).
"""

from collections.abc import Sequence

import numpy as np

from cptquant.laws.forms import (
    DATA_AMPLITUDE,
    DATA_EXPONENT,
    INTERCEPT,
    SIZE_AMPLITUDE,
    SIZE_EXPONENT,
    Array,
    Form,
    Parameter,
    Points,
    Term,
    Theta,
    constant,
    power,
)

_BASE = (INTERCEPT, SIZE_AMPLITUDE, SIZE_EXPONENT, DATA_AMPLITUDE, DATA_EXPONENT)
_ETA = Parameter("eta", 0.01, 10.0, (0.2, 3.0), "r", meaning="how the corpus's share makes tokens useful")
_C = Parameter("C", 1e-6, 100.0, (0.01, 1.0), "r", removable=True, meaning="weight of a small share")
_GAMMA = Parameter("gamma", 0.01, 8.0, (0.1, 1.0), "r", meaning="how fast the share helps")
_EPS = Parameter("eps", 1e-4, 1.0, (0.005, 0.3), "r", meaning="keeps the law finite at share 0")
_DOMAIN = "N > 0, D > 0, 0 <= r <= 1; points at equal state of the learning-rate schedule; no repeated data"
_SOURCE = "arXiv 2406.01375"
_MIXTURE = ("N", "D", "r")


def share_term(theta: Theta, points: Points) -> Term:
    """C/(r + eps)^gamma."""
    eps, gamma = theta["eps"], theta["gamma"]
    shifted = points.share + eps
    ln_shifted = np.log(shifted)
    gradients: dict[str, Array | float] = {"C": 1.0, "gamma": -gamma * ln_shifted, "eps": -gamma * eps / shifted}
    return Term(theta.log("C") - gamma * ln_shifted, gradients)


def data_term(theta: Theta, points: Points) -> Term:
    """B r^eta/D^beta."""
    useful, spent = theta["eta"] * points.ln_share, theta["beta"] * points.ln_tokens
    return Term(theta.log("B") + useful - spent, {"B": 1.0, "eta": useful, "beta": -spent})


def _l1(theta: Theta, points: Points) -> Sequence[Term]:
    size, data = power(theta, "A", "alpha", points.ln_size), power(theta, "B", "beta", points.ln_tokens)
    return [constant(theta), size, data, share_term(theta, points)]


def _l2(theta: Theta, points: Points) -> Sequence[Term]:
    data, share = power(theta, "B", "beta", points.ln_tokens), share_term(theta, points)
    inner = np.logaddexp(data.log_value, share.log_value)
    eta = theta["eta"]
    gradients: dict[str, Array | float] = {"eta": eta * inner}
    for term in (data, share):
        weight = eta * np.exp(term.log_value - inner)
        gradients |= {name: weight * slope for name, slope in term.gradients.items()}
    return [constant(theta), power(theta, "A", "alpha", points.ln_size), Term(eta * inner, gradients)]


def l3_terms(theta: Theta, points: Points) -> Sequence[Term]:
    """The four terms of L3."""
    size = power(theta, "A", "alpha", points.ln_size)
    return [constant(theta), size, data_term(theta, points), share_term(theta, points)]


def _l4(theta: Theta, points: Points) -> Sequence[Term]:
    data = power(theta, "B", "beta", points.ln_tokens)
    useful = Term(data.log_value + points.share * theta.log("b"), {**data.gradients, "b": points.share})
    share = Term(theta.log("C") + points.share * theta.log("c"), {"C": 1.0, "c": points.share})
    return [constant(theta), power(theta, "A", "alpha", points.ln_size), useful, share]


def _l5(theta: Theta, points: Points) -> Sequence[Term]:
    worth, beta = theta["sigma"], theta["beta"]
    mixed = points.share + (1 - points.share) * worth
    ln_effective = points.ln_tokens + np.log(mixed)
    gradients: dict[str, Array | float] = {
        "B": 1.0,
        "beta": -beta * ln_effective,
        "sigma": -beta * (1 - points.share) * worth / mixed,
    }
    data = Term(theta.log("B") - beta * ln_effective, gradients)
    return [constant(theta), power(theta, "A", "alpha", points.ln_size), data]


def _inflection(theta: Theta, points: Points) -> Sequence[Term]:
    eta, ln_inflection, spent = theta["eta"], theta.log("ri"), theta["beta"] * points.ln_tokens
    lost = Term(
        theta.log("B") + eta * ln_inflection - spent,
        {"B": 1.0, "eta": eta * ln_inflection, "ri": eta, "beta": -spent},
        sign=-1.0,
    )
    return [*l3_terms(theta, points), lost]


def _forgetting(theta: Theta, points: Points) -> Sequence[Term]:
    kappa, beta, start = theta["kappa"], theta["beta"], theta["D0"]
    ln_other = np.log(np.maximum(1 - points.share, 1e-100))
    ratio = points.tokens_billions / start
    ln_grown = np.log1p(ratio)
    left = np.exp(-beta * ln_grown)
    gone = -np.expm1(-beta * ln_grown)
    slope = beta * left / gone
    gradients: dict[str, Array | float] = {
        "F": 1.0,
        "kappa": kappa * ln_other,
        "beta": slope * ln_grown,
        "D0": -slope * ratio / (1 + ratio),
    }
    forgotten = Term(theta.log("F") + kappa * ln_other + np.log(gone), gradients)
    return [*l3_terms(theta, points), forgotten]


L1 = Form(
    "l1", "D-CPT L1", "L = E + A/N^alpha + B/D^beta + C/(r+eps)^gamma", _DOMAIN, _SOURCE,
    (*_BASE, _C, _GAMMA, _EPS), _MIXTURE, _l1,
)  # fmt: skip
L2 = Form(
    "l2", "D-CPT L2", "L = E + A/N^alpha + (B/D^beta + C/(r+eps)^gamma)^eta", _DOMAIN, _SOURCE,
    (*_BASE, _C, _GAMMA, _EPS, _ETA), _MIXTURE, _l2,
)  # fmt: skip
L3 = Form(
    "dcpt", "D-CPT L3", "L = E + A/N^alpha + B r^eta/D^beta + C/(r+eps)^gamma", _DOMAIN, _SOURCE,
    (*_BASE, _ETA, _C, _GAMMA, _EPS), _MIXTURE, l3_terms,
)  # fmt: skip
L4 = Form(
    "l4", "D-CPT L4", "L = E + A/N^alpha + B b^r/D^beta + C c^r", _DOMAIN, _SOURCE,
    (
        *_BASE,
        Parameter("b", 1e-4, 1e4, (0.3, 3.0), "r", meaning="how the share changes the worth of tokens"),
        _C,
        Parameter("c", 1e-4, 1e2, (0.1, 1.0), "r", meaning="how fast the share helps"),
    ), _MIXTURE, _l4,
)  # fmt: skip
L5 = Form(
    "l5", "D-CPT L5", "L = E + A/N^alpha + B/(r D + (1-r) sigma D)^beta", _DOMAIN, _SOURCE,
    (*_BASE, Parameter("sigma", 1e-4, 10.0, (0.02, 1.0), "r", meaning="worth of a token of the other corpus")),
    _MIXTURE, _l5,
)  # fmt: skip
INFLECTION = Form(
    "dcpt-inflection", "D-CPT with an inflection ratio",
    "L = E + A/N^alpha + B (r^eta - ri^eta)/D^beta + C/(r+eps)^gamma", _DOMAIN,
    "ours, on L3 of arXiv 2406.01375, which names the inflection ratio and leaves it open",
    (*L3.parameters, Parameter("ri", 1e-4, 1.0, (0.005, 0.5), "r", meaning="below this share more tokens do harm")),
    _MIXTURE, _inflection,
)  # fmt: skip
FORGETTING = Form(
    "dcpt-forgetting", "D-CPT with a forgetting term",
    "L = E + A/N^alpha + B r^eta/D^beta + C/(r+eps)^gamma + F (1-r)^kappa (1 - (1+D/D0)^-beta)", _DOMAIN,
    "ours, on L3 of arXiv 2406.01375",
    (
        *L3.parameters,
        Parameter("F", 1e-6, 100.0, (0.01, 2.0), "r", removable=True, meaning="how much can be forgotten"),
        Parameter("kappa", 0.05, 100.0, (0.5, 20.0), "r", meaning="how fast replay stops forgetting"),
        Parameter("D0", 1e-3, 1e3, (0.05, 5.0), "D", meaning="tokens (billions) after which forgetting bends"),
    ), _MIXTURE, _forgetting,
)  # fmt: skip
