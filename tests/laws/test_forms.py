"""Every law against a plain re-implementation of its equation, and its gradient against differences."""

import math

import numpy as np
import pytest

from cptquant.core.errors import UserError
from cptquant.laws.critical_ratio import critical_ratio
from cptquant.laws.cross_domain import VARIANTS, domain_coefficient
from cptquant.laws.forms import Form, Points
from cptquant.laws.methods import FORMS, find_form
from cptquant.laws.problem import Problem

ALL: dict[str, Form] = FORMS | VARIANTS


def points(rng: np.random.Generator, count: int = 40) -> Points:
    share = rng.uniform(0, 1, count)
    share[:2] = 0.0, 1.0
    tokens = rng.uniform(0.1, 30, count)
    features = np.stack([rng.uniform(1.5, 4, count), rng.uniform(0.02, 0.3, count), rng.uniform(0.05, 0.4, count)], 1)
    return Points(rng.uniform(0.3, 8, count), tokens, share, tokens * rng.uniform(0.05, 2, count), features)


def k1(p, x):
    return 1 / x["k1"]


def l3(p, x):
    return p["E"] + p["A"] / x["N"] ** p["alpha"] + p["B"] * x["r"] ** p["eta"] / x["D"] ** p["beta"] + share(p, x)


def share(p, x):
    return p["C"] / (x["r"] + p["eps"]) ** p["gamma"]


def chinchilla(p, x, tokens=None):
    return p["E"] + p["A"] / x["N"] ** p["alpha"] + p["B"] / (tokens or x["D"]) ** p["beta"]


def effective(p, x):
    used = min(x["U"], x["D"])
    repeats = max(x["D"] / x["U"] - 1, 0)
    return used + x["U"] * p["R"] * (1 - math.exp(-repeats / p["R"]))


PLAIN = {
    "chinchilla": chinchilla,
    "dcpt": l3,
    "l1": lambda p, x: chinchilla(p, x) + share(p, x),
    "l2": lambda p, x: (
        p["E"] + p["A"] / x["N"] ** p["alpha"] + (p["B"] / x["D"] ** p["beta"] + share(p, x)) ** p["eta"]
    ),
    "l4": lambda p, x: (
        p["E"] + p["A"] / x["N"] ** p["alpha"] + p["B"] * p["b"] ** x["r"] / x["D"] ** p["beta"]
        + p["C"] * p["c"] ** x["r"]
    ),
    "l5": lambda p, x: chinchilla(p, x, x["r"] * x["D"] + (1 - x["r"]) * p["sigma"] * x["D"]),
    "dcpt-inflection": lambda p, x: l3(p, x) - p["B"] * p["ri"] ** p["eta"] / x["D"] ** p["beta"],
    "dcpt-forgetting": lambda p, x: (
        l3(p, x) + p["F"] * (1 - x["r"]) ** p["kappa"] * (1 - (1 + x["D"] / p["D0"]) ** -p["beta"])
    ),
    "repetition": lambda p, x: chinchilla(p, x, effective(p, x)),
    "cmr": lambda p, x: p["b"] + p["a"] * (1 - max(x["r"], 1e-100) ** p["s"]) / p["s"],
    "k1": lambda p, x: l3(p, x) + p["F"] * x["k1"] ** p["mu"],
    "k2": lambda p, x: l3(p, x) + p["F"] / x["k2"] ** p["mu"],
    "k3": lambda p, x: l3(p, x) + p["F"] / (1 / x["k1"] + p["w2"] * x["k2"]) ** p["mu"],
    "k4": lambda p, x: l3(p, x) + p["F"] / (1 / x["k1"] + p["w2"] * x["k2"] + p["w3"] * x["k3"]) ** p["mu"],
}  # fmt: skip


def vectors(form: Form, at: Points, count: int, seed: int) -> np.ndarray:
    ones = np.ones(len(at))
    return Problem(form, at, 2.0 * ones, ones, np.arange(len(at))).starts(count, np.random.default_rng(seed))


@pytest.mark.parametrize("name", list(ALL))
def test_equation(name: str) -> None:
    form, at = ALL[name], points(np.random.default_rng(3))
    theta = vectors(form, at, 4, 0)
    found = form.loss(theta, at)
    for row, values in enumerate(form.natural(theta)):
        p = dict(zip(form.index, values, strict=True))
        for n in range(len(at)):
            k = at.features[n]
            x = {"N": at.size_billions[n], "D": at.tokens_billions[n], "r": at.share[n], "U": at.unique_billions[n],
                 "k1": k[0], "k2": k[1], "k3": k[2]}  # fmt: skip
            expected = PLAIN[name](p, x)
            if expected > 0.05:  # below, the logarithm is continued as a straight line
                assert found[row, n] == pytest.approx(expected, rel=1e-9), (name, p, x)


@pytest.mark.parametrize("name", list(ALL))
def test_gradient(name: str) -> None:
    form, at = ALL[name], points(np.random.default_rng(4))
    theta, step = vectors(form, at, 3, 1), 1e-6
    _, gradient = form.log_loss(theta, at, jacobian=True)
    for place in range(len(form.parameters)):
        up, down = theta.copy(), theta.copy()
        up[:, place] += step
        down[:, place] -= step
        difference = (form.log_loss(up, at)[0] - form.log_loss(down, at)[0]) / (2 * step)
        np.testing.assert_allclose(gradient[:, place], difference, rtol=2e-4, atol=2e-7, err_msg=name)


def test_log_of_a_negative_sum_is_continued_and_smooth() -> None:
    form = FORMS["dcpt-inflection"]
    values = {"E": 0.01, "A": 1e-6, "alpha": 0.3, "B": 50.0, "beta": 0.3, "eta": 1.0, "C": 1e-6, "gamma": 0.3,
              "eps": 0.1, "ri": 0.9}  # fmt: skip
    at = Points(np.ones(50), np.full(50, 1.0), np.linspace(0.85, 0.95, 50))
    log_loss, gradient = form.log_loss(form.vector(values)[None], at, jacobian=True)
    assert np.isfinite(log_loss).all() and np.isfinite(gradient).all()
    assert (np.diff(log_loss[0]) > 0).all()


def test_extensions_contain_the_law() -> None:
    at = points(np.random.default_rng(0))
    base = dict(zip(FORMS["dcpt"].index, FORMS["dcpt"].natural(vectors(FORMS["dcpt"], at, 1, 0))[0], strict=True))
    plain = FORMS["dcpt"].loss(FORMS["dcpt"].vector(base)[None], at)
    for name, extra in (
        ("dcpt-inflection", {"ri": 0.0}),
        ("dcpt-forgetting", {"F": 0.0, "kappa": 1.0, "D0": 1.0}),
    ):
        same = FORMS[name].loss(FORMS[name].vector(base | extra)[None], at)
        np.testing.assert_allclose(same, plain, rtol=1e-12)


def test_the_inflection_rises_with_tokens_below_its_ratio_only() -> None:
    form = FORMS["dcpt-inflection"]
    values = {"E": 2.0, "A": 0.3, "alpha": 0.3, "B": 0.3, "beta": 0.3, "eta": 1.0, "C": 0.05, "gamma": 0.3,
              "eps": 0.05, "ri": 0.2}  # fmt: skip
    tokens = np.geomspace(0.5, 50, 20)
    for ratio, rises in ((0.05, True), (0.6, False)):
        loss = form.loss(form.vector(values)[None], Points(np.ones(20), tokens, np.full(20, ratio)))[0]
        assert (np.diff(loss) > 0).all() == rises


def test_domain_coefficient() -> None:
    features = np.array([[2.0, 0.1, 0.2], [4.0, 0.3, 0.1]])
    form = VARIANTS["k4"]
    values = dict.fromkeys(form.index, 1.0) | {"w2": 2.0, "w3": 3.0}
    np.testing.assert_allclose(
        domain_coefficient(form, form.vector(values)[None], features)[0], [0.5 + 0.2 + 0.6, 0.25 + 0.6 + 0.3]
    )


@pytest.mark.parametrize(
    ("a4", "s4", "b3", "percent"),
    [  # arXiv 2407.17467, table 5, at 20B tokens
        (0.22524761, 0.26944345, -0.48139982, 29.8),
        (0.7520627, 0.13720245, -1.06581937, 34.9),
        (-2.36384831, -0.15125569, 1.59223649, 41.4),
        (-2.5368197, -0.42071423, 0.84375368, 47.8),
    ],
)
def test_published_critical_ratios(a4: float, s4: float, b3: float, percent: float) -> None:
    assert 100 * critical_ratio(20e9, a4, s4, b3) == pytest.approx(percent, abs=0.06)


def test_unknown_law() -> None:
    with pytest.raises(UserError, match=r"law 'l9' is unknown; choose one of: dcpt, l1, l2"):
        find_form("l9")
    assert find_form("l3") is FORMS["dcpt"]
