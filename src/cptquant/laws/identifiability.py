"""Which parameters the data hold: profiles of the objective.

One parameter is moved and held, the others are refitted. It is identified if the objective rises above its 90% limit
within a factor of two on both sides. The limit is a likelihood ratio with the residual variance estimated from the
fit, and widened by how strongly residuals of one run go together (rows of a run are not independent).
"""

from dataclasses import dataclass

import numpy as np

from cptquant.laws.fit import polish
from cptquant.laws.forms import Array
from cptquant.laws.problem import Problem

_OFFSETS = np.log(np.array([1.05, 1.2, 1.5, 2.0, 4.0, 20.0]))
_IDENTIFIED_WITHIN = float(np.log(2.0)) + 1e-9
_CHI2_90 = 2.706  # 90% quantile of chi-squared with one degree of freedom


@dataclass(frozen=True)
class Profile:
    """Where the profile of one parameter leaves its 90% limit, in natural values; None: not within a factor of 20."""

    low: float | None
    high: float | None
    identified: bool


def design_effect(problem: Problem, theta: Array) -> float:
    """How much wider the variance of means is because residuals of one run go together, 1 to rows per run."""
    z = problem.residuals(theta[None])[0]
    sums = np.bincount(problem.run, weights=z)
    most = len(z) / problem.run_count
    return float(np.clip(np.sum(sums**2) / max(float(np.sum(z**2)), 1e-300), 1.0, max(most, 1.0)))


def profile_parameters(problem: Problem, theta: Array) -> list[Profile]:
    """One profile per parameter at the solution theta, (P,)."""
    count, rows = len(theta), len(problem.loss)
    places = [(p, sign, step) for p in range(count) if problem.free[p] for sign in (-1, 1) for step in range(6)]
    low, high = problem.bounds
    starts = np.repeat(theta[None], len(places), axis=0)
    free = np.ones(starts.shape, dtype=bool)
    shifts = np.array([sign * _OFFSETS[step] for _, sign, step in places])
    for row, (p, _, _) in enumerate(places):
        free[row, p] = False
        starts[row, p] = theta[p] + shifts[row]
    columns = np.array([p for p, _, _ in places])
    outside = (starts[np.arange(len(places)), columns] < low[columns]) | (
        starts[np.arange(len(places)), columns] > high[columns]
    )
    _, values = polish(problem, starts, free=free, iterations=100, tolerance=1e-6)
    best = float(problem.objective(theta[None])[0])
    degrees = max(rows - int(problem.free.sum()), 1)
    limit = best * (1 + _CHI2_90 * design_effect(problem, theta) / degrees)
    crossed = (values > limit) & ~outside
    profiles: list[Profile] = []
    for p in range(count):
        if not problem.free[p]:
            profiles.append(Profile(None, None, True))
            continue
        ends: list[float | None] = []
        for sign in (-1, 1):
            steps = [row for row, place in enumerate(places) if place[:2] == (p, sign)]
            first = next((shifts[row] for row in steps if crossed[row]), None)
            ends.append(None if first is None else float(first))
        natural = [None if end is None else _natural_at(problem, theta, p, end) for end in ends]
        held = all(end is not None and abs(end) <= _IDENTIFIED_WITHIN for end in ends)
        profiles.append(Profile(natural[0], natural[1], held))
    return profiles


def _natural_at(problem: Problem, theta: Array, p: int, shift: float) -> float:
    moved = theta.copy()
    moved[p] += shift
    return float(problem.form.natural(moved)[p])
