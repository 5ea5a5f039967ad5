"""Intervals: the law refitted to runs with random weights.

Rows of one run share its seed and schedule, so runs are drawn, not rows. Each replicate gives every run an
exponential weight (the Bayesian bootstrap, Rubin 1981) instead of drawing runs with replacement: a draw without any
run of a mixture ratio would not identify that ratio's term. Deviations from the fit are widened by sqrt(G/(G - p))
for G runs and p fitted parameters, because residuals of a fit are smaller than its errors.
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
    refits, _ = polish(problem, starts, weights=weights[:, problem.run], iterations=60, tolerance=1e-5)
    low, high = problem.bounds
    widened = np.clip(theta + (refits - theta) * _widening(problem), low, high)
    return problem.with_fixed(widened)


def _widening(problem: Problem) -> float:
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


def interval(samples: Array) -> tuple[Array, Array]:
    """Ends of the 90% interval over the first axis."""
    low, high = np.quantile(samples, _TAILS, axis=0)
    return low, high


def new_run_losses(
    law_losses: Array,  # (draws, n)
    spread: Scatter,
    seed: int = 0,
) -> Array:
    """Losses a new run may show: the law's uncertainty and the scatter the law leaves, (draws, n)."""
    rng = np.random.default_rng(seed + 2)
    draws, count = law_losses.shape
    noise = spread.run_std * rng.standard_normal((draws, 1)) + spread.row_std * rng.standard_normal((draws, count))
    return law_losses * np.exp(noise)
