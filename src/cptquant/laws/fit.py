"""Fit a law: many starts by L-BFGS-B with analytic gradients, the best polished by damped Gauss-Newton steps.

The polishing works on a stack of problems at once (restarts, bootstrap weights, profile points), because refitting a
law 200 times one after the other would take minutes where one stack takes a second.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize  # pyright: ignore[reportUnknownVariableType, reportMissingTypeStubs]

from cptquant.core.errors import UserError
from cptquant.laws.forms import Array
from cptquant.laws.problem import Problem

KEPT = 5
"""Starts whose objectives are reported, and from which the best is polished."""


@dataclass(frozen=True)
class Solution:
    """The best vector and how the best starts agree.

    Attributes:
        theta: internal vector, (P,). objective: its value. best_objectives: of the `KEPT` best starts after polishing,
            ascending. best_thetas: theirs, (KEPT, P).
    """

    theta: Array
    objective: float
    best_objectives: tuple[float, ...]
    best_thetas: Array


def fit(problem: Problem, *, starts: int = 40, seed: int = 0, iterations: int = 400) -> Solution:
    """Best of many random starts.

    Args:
        starts: random starts, log-uniform over each parameter's range. iterations: L-BFGS-B iterations of each.

    Raises:
        UserError: the parameters that are held leave no term.
    """
    first = problem.starts(starts, np.random.default_rng(seed))
    with np.errstate(all="ignore"):
        if not np.isfinite(problem.objective(first)).any():
            held = " ".join(f"--fix {name}={value:g}" for name, value in problem.fixed.items())
            raise UserError(
                f"law {problem.form.name} gives no loss with {held}: no term is left; hold fewer parameters"
            )
    ends = np.stack([_descend(problem, theta, iterations) for theta in first])
    values = problem.objective(ends)
    best = ends[np.argsort(values, kind="stable")[:KEPT]]
    polished, objectives = polish(problem, best)
    order = np.argsort(objectives, kind="stable")
    return Solution(
        polished[order[0]],
        float(objectives[order[0]]),
        tuple(float(value) for value in objectives[order]),
        polished[order],
    )


def _descend(problem: Problem, start: Array, iterations: int) -> Array:
    free = problem.free
    low, high = problem.bounds

    def value_and_gradient(vector: Array) -> tuple[float, Array]:
        theta = start.copy()
        theta[free] = vector
        value, gradient = problem.gradient(theta)
        return 1e3 * value, 1e3 * gradient[free]  # Huber values near 1e-6 would meet L-BFGS-B's absolute tolerances

    answer = cast(Any, minimize)(
        value_and_gradient,
        start[free],
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(low[free], high[free], strict=True)),
        options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-9},
    )
    theta = start.copy()
    theta[free] = np.asarray(answer.x, dtype=np.float64)
    return theta


def polish(
    problem: Problem,
    thetas: Array,  # (S, P)
    *,
    weights: Array | None = None,  # (S, n)
    shifts: Array | None = None,  # (S, P)
    free: NDArray[np.bool_] | None = None,  # (S, P)
    iterations: int = 150,
    tolerance: float = 1e-7,
) -> tuple[Array, Array]:
    """Damped Gauss-Newton steps (iteratively reweighted for Huber's loss) within the bounds, on a stack of problems.

    Args:
        weights, shifts: of the rows and of the prior's middle, for bootstrap refits. free: parameters each problem may
            move (default: all not fixed).
        tolerance: relative decrease of the objective below which a problem is left alone.

    Returns:
        Vectors (S, P) and objectives (S,); never worse than the start.
    """
    low, high = problem.bounds
    theta = problem.with_fixed(np.clip(thetas, low, high))
    movable = np.broadcast_to(problem.free, theta.shape) if free is None else free & problem.free
    damping = np.full(len(theta), 1e-5)
    value = problem.objective(theta, weights, shifts)
    quiet = np.zeros(len(theta), dtype=np.int64)  # steps in a row that gained next to nothing
    active = np.arange(len(theta))
    for _ in range(iterations):
        if not len(active):
            break
        here, row_weights = theta[active], None if weights is None else weights[active]
        row_shifts = None if shifts is None else shifts[active]
        _, gradient, curvature = problem.linearise(here, row_weights, row_shifts)
        stuck = ((here <= low) & (gradient > 0)) | ((here >= high) & (gradient < 0)) | ~movable[active]
        trial = np.clip(here + _steps(gradient, curvature, damping[active], stuck), low, high)
        trial = np.where(movable[active], trial, here)
        trial_value = problem.objective(trial, row_weights, row_shifts)
        better = trial_value < value[active]
        gain = np.where(better, (value[active] - trial_value) / np.maximum(value[active], 1e-300), 0.0)
        theta[active[better]] = trial[better]
        value[active[better]] = trial_value[better]
        damping[active] = np.clip(np.where(better, damping[active] / 4, damping[active] * 6), 1e-9, 1e9)
        quiet[active] = np.where(gain > tolerance, 0, quiet[active] + np.where(better, 1, 0))
        active = active[(quiet[active] < 3) & (damping[active] < 1e8)]
    return theta, value


def _steps(gradient: Array, curvature: Array, damping: Array, stuck: NDArray[np.bool_]) -> Array:
    """Solve (H + damping diag H) step = -g with the stuck parameters left out."""
    held = stuck[:, :, None] | stuck[:, None, :]
    matrix = np.where(held, 0.0, curvature)
    diagonal = np.einsum("spp->sp", matrix).copy()
    floor = 1e-12 * np.maximum(diagonal.max(axis=1, keepdims=True), 1e-30)
    places = np.arange(matrix.shape[1], dtype=np.intp)
    matrix[:, places, places] = np.where(stuck, 1.0, diagonal * (1 + damping[:, None]) + floor)
    wanted = np.where(stuck, 0.0, -gradient)
    step = np.linalg.solve(matrix, wanted[:, :, None])[:, :, 0]
    return np.clip(step, -2.0, 2.0)  # a factor of e^2 a step at most
