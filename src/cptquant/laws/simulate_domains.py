"""Made runs on several domains and their early features, to try the cross-domain law on.

The losses come from a planted K3 law (`cross_domain.py`) plus noise. One domain more than was trained has features: it
was only begun, and lies between the others, so `law transfer` has something to predict.
"""

import numpy as np

from cptquant.laws.cross_domain import VARIANTS
from cptquant.laws.forms import BILLION, Array, Points
from cptquant.laws.observations import Observations
from cptquant.laws.simulate import LAST_TOKENS, SIZES
from cptquant.laws.transfer import Features

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
EVALUATIONS = 5
BEGUN = "begun"
"""Name of the domain that has features and no runs."""

PLANTED = {"E": 0.8, "A": 0.25, "alpha": 0.35, "B": 0.5, "beta": 0.4, "eta": 0.2, "C": 0.25, "eps": 0.05, "gamma": 0.5,
           "F": 0.3, "mu": 0.8, "w2": 2.0}  # fmt: skip
"""Planted parameters, N and D in billions."""


def simulate_domains(count: int, *, noise: float = 0.003, seed: int = 0) -> tuple[Observations, Features]:
    """`count` domains x 3 sizes x 5 ratios x 5 evaluations with domain losses; features of them and of one more."""
    rng = np.random.default_rng(seed)
    initial, decline = np.linspace(2.0, 3.2, count), rng.permutation(np.linspace(0.03, 0.2, count))
    features: Features = {
        f"d{place}": (float(initial[place]), float(decline[place]), 0.0) for place in range(count)
    } | {BEGUN: (float(initial.mean()), float(decline.mean()), 0.0)}
    tokens = np.linspace(LAST_TOKENS / EVALUATIONS, LAST_TOKENS, EVALUATIONS)
    axes = np.meshgrid(np.arange(count, dtype=np.float64), np.array(SIZES), np.array(RATIOS), tokens, indexing="ij")
    domain, size, ratio, trained = (axis.ravel() for axis in axes)
    names = tuple(f"d{place:.0f}" for place in domain)
    loss = planted_loss(size, trained, ratio, np.array([features[name] for name in names]))
    loss = loss + rng.normal(0, 1, len(loss)) * noise
    run = np.repeat(np.arange(len(loss) // EVALUATIONS), EVALUATIONS).astype(np.int64)
    return Observations("simulated", size, trained, ratio, None, run, names, {"domain_nll": loss}), features


def planted_loss(size: Array, tokens: Array, ratio: Array, features: Array) -> Array:
    """Domain loss without noise, (n,), from features (n, 3)."""
    form = VARIANTS["k3"]
    return form.loss(form.vector(PLANTED)[None], Points(size / BILLION, tokens / BILLION, ratio, None, features))[0]


def features_csv(features: Features) -> str:
    """CSV text: domain, initial_nll, early_nll (after ~1% of the steps)."""
    lines = ["domain,initial_nll,early_nll"]
    lines += [f"{name},{k1:.6f},{k1 * (1 - k2):.6f}" for name, (k1, k2, _) in features.items()]
    return "\n".join(lines) + "\n"
