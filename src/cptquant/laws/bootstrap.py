"""Intervals: the law refitted to runs with random weights.

Rows of one run share its seed and schedule, so runs are drawn, not rows. Each replicate gives every run an
exponential weight (the Bayesian bootstrap, Rubin 1981) instead of drawing runs with replacement: a draw without any
run of a mixture ratio would not identify that ratio's term. Deviations from the fit are widened by sqrt(G/(G - p))
for G runs and p fitted parameters, because residuals of a fit are smaller than its errors. What is widened is the
quantity asked for (a parameter, a predicted loss, an optimum), not the draws: where parameters make up for each other,
vectors moved along a straight line leave the curved valley of good fits.
"""

from dataclasses import dataclass

import numpy as np

from cptquant.laws.fit import polish
from cptquant.laws.forms import Array
from cptquant.laws.problem import Problem

LEVEL = 0.90
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Scatter:
    """Standard deviation of ln L that the law leaves: between runs, and within them."""

    run_std: float
    row_std: float


def bootstrap(
    problem: Problem,
    theta: Array,  # (P,)
    *,
    draws: int = 200,
    seed: int = 0,
) -> Array:
    """Refitted internal vectors, (draws, P), started from the fit."""
    rng = np.random.default_rng(seed + 1)
    weights = rng.exponential(size=(draws, problem.run_count))
    weights /= weights.mean(axis=1, keepdims=True)
    starts = np.repeat(theta[None], draws, axis=0)
    shifts = problem.prior_shifts(draws, rng)
    refits, _ = polish(problem, starts, weights=weights[:, problem.run], shifts=shifts, iterations=200, tolerance=1e-8)
    return refits


def widening(problem: Problem) -> float:
    """sqrt(G/(G - p)) for G runs and p fitted parameters."""
    runs, fitted = problem.run_count, int(problem.free.sum())
    return float(np.sqrt(runs / max(runs - fitted, 1)))


def scatter(problem: Problem, theta: Array) -> Scatter:
    """Split the residual variance of ln L into runs and rows (analysis of variance), widened for fitted parameters."""
    residual = problem.form.log_loss(theta[None], problem.points)[0][0] - problem.log_observed
    counts = np.bincount(problem.run)
    means = np.bincount(problem.run, weights=residual) / counts
    within_degrees = len(residual) - len(counts)
    degrees = max(len(residual) - int(problem.free.sum()), 1)
    total = float(np.sum(residual**2)) / degrees
    if within_degrees <= 0:
        return Scatter(float(np.sqrt(total)), 0.0)
    within = float(np.sum((residual - means[problem.run]) ** 2)) / within_degrees
    within = min(within, total)
    return Scatter(float(np.sqrt(max(total - within, 0.0))), float(np.sqrt(within)))


def interval(
    value: Array,  # (...)
    samples: Array,  # (draws, ...)
    factor: float,
) -> tuple[Array, Array]:
    """Ends of the 90% interval around a value, (...) each; deviations of the samples are widened by the factor."""
    low, high = np.quantile(value + factor * (samples - value), _TAILS, axis=0)
    return np.minimum(low, value), np.maximum(high, value)


def new_run_losses(
    log_value: Array,  # (n,)
    log_samples: Array,  # (draws, n)
    factor: float,
    spread: Scatter,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Ends of the 90% interval of ln L that a new run will show: the law's uncertainty and the scatter it leaves."""
    rng = np.random.default_rng(seed + 2)
    draws, count = log_samples.shape
    repeats = -(-2000 // draws)  # scatter is cheap: enough samples for smooth tails
    widened = np.tile(log_value + factor * (log_samples - log_value), (repeats, 1))
    noise = rng.standard_normal((len(widened), 1)) * spread.run_std
    noise = noise + rng.standard_normal((len(widened), count)) * spread.row_std
    return interval(log_value, widened + noise, 1.0)
