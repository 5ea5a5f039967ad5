"""Which form predicts runs it has not seen: every form on the same folds.

    by=N    one model size at a time          by=r   one mixture ratio at a time, the two outer ones never
    by=D    the second half of the tokens     by=run runs in five groups

R2 over runs is dominated by the difference between sizes; the error of *differences* (within a size, its mean error
taken off) is therefore reported beside the error itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import DataError, UserError
from cptquant.laws.fit import fit
from cptquant.laws.fit_law import FitOptions, problem_of, r_squared
from cptquant.laws.forms import Array, Form
from cptquant.laws.observations import Observations
from cptquant.laws.problem import huber

HOLDOUTS = ("N", "r", "D", "run")
_GROUPS = 5


@dataclass(frozen=True)
class HeldOutError:
    """Errors of one form on one loss, over rows that were not fitted.

    Attributes:
        r2: over all held-out rows, against their mean. mae_nats: mean absolute error. mae_stderr: its standard error
            over held-out runs. mae_of_differences: with each size's mean error in each fold taken off. huber: mean
            Huber loss of ln L (delta 1e-3). worst_nats: largest absolute error.
    """

    form: str
    target: str
    folds: int
    rows: int
    runs: int
    r2: float
    mae_nats: float
    mae_stderr: float
    mae_of_differences: float
    huber: float
    worst_nats: float


def compare_forms(
    observations: Observations, forms: Sequence[Form], by: str, options: FitOptions | None = None
) -> list[HeldOutError]:
    """Fit every form without each fold in turn and predict the fold.

    Raises:
        UserError: `by` is unknown. DataError: the data cannot be split that way.
    """
    chosen = options or FitOptions()
    folds = make_folds(observations, by)
    errors: list[HeldOutError] = []
    for target in observations.losses:
        for form in forms:
            predicted = held_out_predictions(observations, form, target, folds, chosen)
            errors.append(_summarise(observations, form, target, folds, predicted))
    return errors


def make_folds(observations: Observations, by: str) -> list[NDArray[np.bool_]]:
    """One mask of held-out rows per fold.

    Raises:
        UserError, DataError: see `compare_forms`.
    """
    if by not in HOLDOUTS:
        raise UserError(f"--holdout by={by} is unknown; choose by={', by='.join(HOLDOUTS)}")
    columns = observations.columns()
    if by == "D":
        later = observations.tokens > np.median(observations.tokens)
        if not later.any():
            raise DataError(
                f"--holdout by=D needs runs of different lengths; half of the rows of {observations.source} have the "
                f"largest D = {observations.tokens.max():g}. Choose another --holdout"
            )
        return [later]
    if by == "run":
        if observations.run.max() + 1 < 2 * _GROUPS:
            raise DataError(f"--holdout by=run needs at least {2 * _GROUPS} runs; {observations.source} has fewer")
        order = np.random.default_rng(0).permutation(int(observations.run.max()) + 1) % _GROUPS
        return [order[observations.run] == group for group in range(_GROUPS)]
    if by not in columns:
        raise DataError(f"--holdout by={by}: {observations.source} has no column {by}")
    values = np.unique(columns[by])
    if len(values) < 3:
        raise DataError(
            f"--holdout by={by} needs at least 3 values of {by}; {observations.source} has {len(values)}. Choose "
            "another --holdout"
        )
    if by == "r":  # without an outer ratio the law would be asked beyond its data
        values = values[1:-1]
    return [columns[by] == value for value in values]


def held_out_predictions(
    observations: Observations, form: Form, target: str, folds: Sequence[NDArray[np.bool_]], options: FitOptions
) -> Array:
    """Predicted loss of every row that some fold holds out, (n,); not a number elsewhere."""
    predicted = np.full(len(observations), np.nan)
    points = observations.points(target)
    for fold in folds:
        problem = problem_of(observations.take(~fold), form, target, options)
        solution = fit(problem, starts=options.starts, seed=options.seed)
        predicted[fold] = form.loss(solution.theta[None], points.take(fold))[0]
    return predicted


def _summarise(
    observations: Observations, form: Form, target: str, folds: Sequence[NDArray[np.bool_]], predicted: Array
) -> HeldOutError:
    held = np.isfinite(predicted)
    observed = observations.losses[target][held]
    error = predicted[held] - observed
    run = np.unique(observations.run[held], return_inverse=True)[1]
    by_run = np.bincount(run, weights=np.abs(error)) / np.bincount(run)
    differences = error.copy()
    for fold in folds:
        for size in np.unique(observations.size):
            rows = (fold & (observations.size == size))[held]
            if rows.any():
                differences[rows] -= error[rows].mean()
    return HeldOutError(
        form=form.name,
        target=target,
        folds=len(folds),
        rows=int(held.sum()),
        runs=len(by_run),
        r2=r_squared(observed, error),
        mae_nats=float(np.abs(error).mean()),
        mae_stderr=float(by_run.std(ddof=1) / np.sqrt(len(by_run))) if len(by_run) > 1 else float("nan"),
        mae_of_differences=float(np.abs(differences).mean()),
        huber=float(np.mean(huber(np.log(np.maximum(predicted[held], 1e-6) / observed), 1e-3))),
        worst_nats=float(np.abs(error).max()),
    )


def quick(options: FitOptions) -> FitOptions:
    """The same options with half the starts: comparisons fit many times."""
    return replace(options, starts=max(10, options.starts // 2))
