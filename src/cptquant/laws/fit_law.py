"""`law fit`: observations and a form -> LawFit."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cptquant.core.errors import DataError
from cptquant.core.laws import FitStatus, FittedParameter, LawFit, LossFit, ObservedRange
from cptquant.core.provenance import Stopwatch
from cptquant.laws.bootstrap import bootstrap, interval, scatter, widening
from cptquant.laws.fit import Solution, fit
from cptquant.laws.forms import Array, Form, Points
from cptquant.laws.identifiability import Profile, profile_parameters
from cptquant.laws.observations import Observations
from cptquant.laws.problem import Problem
from cptquant.laws.requirements import check_requirements, penalty_of

LEAST_RATIOS = 5
"""Distinct ratios below which a mixture law is reported as not held by the data (the paper uses nine)."""
_REFUSED_RATIOS = 3
_LEAST_SIZES = 3
_AGREEMENT = 1e-3  # relative difference of objectives up to which starts agree
_AT_BOUND = 1e-3  # internal distance from a bound
_NEGLIGIBLE_VIOLATION = 0.0


@dataclass(frozen=True)
class FitOptions:
    """How to fit.

    Attributes:
        starts: random starts. draws: bootstrap refits. huber_delta: in units of ln L. penalty: strength of the penalty
            on violated requirements, 0 for none. fixed: parameters held, N and D in billions.
        drop_highest: rows with the highest losses to leave out (arXiv 2404.10102 drops five outliers).
    """

    starts: int = 40
    draws: int = 200
    huber_delta: float = 1e-3
    penalty: float = 0.0
    fixed: Mapping[str, float] = field(default_factory=dict[str, float])
    drop_highest: int = 0
    seed: int = 0


def fit_law(observations: Observations, form: Form, options: FitOptions | None = None) -> LawFit:
    """Fit a form to every loss column of the data, each by itself.

    Raises:
        DataError: a column the form needs is missing or constant, or there are too few ratios or rows.
    """
    options, watch = options or FitOptions(), Stopwatch()
    fits = {name: fit_loss(observations, form, name, options)[0] for name in observations.losses}
    return LawFit(
        provenance=watch.provenance(seed=options.seed),
        kind=form.name,
        fits=fits,
        settings={
            "starts": options.starts,
            "draws": options.draws,
            "huber_delta": options.huber_delta,
            "penalty": options.penalty,
            "drop_highest": options.drop_highest,
            "seed": options.seed,
            "source": observations.source,
            "fixed": ", ".join(f"{name}={value:g}" for name, value in options.fixed.items()),
        },
    )


def problem_of(observations: Observations, form: Form, loss: str, options: FitOptions) -> Problem:
    """The fitting problem of one loss column.

    Raises:
        DataError: see `fit_law`.
    """
    if options.drop_highest >= len(observations):
        raise DataError(
            f"--drop-highest {options.drop_highest} leaves no rows: {observations.source} has {len(observations)} with "
            "D > 0; drop fewer"
        )
    data = drop_highest(observations, loss, options.drop_highest) if options.drop_highest else observations
    require_columns(data, form, options.fixed)
    points = data.points(loss)
    return problem_at(data, form, loss, points, options)


def problem_at(data: Observations, form: Form, loss: str, points: Points, options: FitOptions) -> Problem:
    """The same with points of the caller's (features of domains among them)."""
    penalty = penalty_of(form, points, options.penalty) if options.penalty > 0 else None
    problem = Problem(
        form, points, data.losses[loss], _scales(data, loss), data.run, options.huber_delta, options.fixed, penalty
    )
    fitted = int(problem.free.sum())
    if len(data) <= fitted:
        raise DataError(
            f"{data.source} has {len(data)} rows with D > 0; law {form.name} has {fitted} parameters to fit. Add rows "
            "or hold parameters with --fix"
        )
    lowest, highest = float(problem.loss.min()), float(problem.loss.max())
    if highest - lowest <= 1e-9 * highest:
        raise DataError(
            f"{data.source}: column {loss} is {lowest:g} in all {len(data)} rows to be fitted, so there is nothing a "
            "law could explain; give measured losses, or leave the column out"
        )
    return problem


def _scales(data: Observations, loss: str) -> Array:
    if loss not in data.stderrs:
        return np.ones(len(data))
    relative = data.stderrs[loss] / data.losses[loss]
    return float(np.sqrt(np.mean(relative**2))) / relative


def drop_highest(observations: Observations, loss: str, count: int) -> Observations:
    """Without the rows of the highest losses."""
    return observations.take(np.sort(np.argsort(observations.losses[loss], kind="stable")[: -count or None]))


def require_columns(data: Observations, form: Form, fixed: Mapping[str, float]) -> None:
    """Refuse data in which a column that the form's free parameters live on is missing, constant or too poor.

    Raises:
        DataError: with the column and what to do.
    """
    columns = data.columns()
    for column in form.needs:
        if column == "K":
            continue
        holders = [p.name for p in form.parameters if p.column == column and p.name not in fixed]
        if column not in columns:
            raise DataError(f"{data.source} has no column {column!r}, which law {form.name} needs ({form.equation})")
        distinct = np.unique(columns[column])
        if not holders:
            continue
        if len(distinct) == 1:
            held = " ".join(f"--fix {name}={'0' if name == 'A' else '1'}" for name in holders)
            raise DataError(
                f"{data.source}: column {column} is {distinct[0]:g} in every row, so {', '.join(holders)} of law "
                f"{form.name} cannot be told apart from a constant; add runs with another {column}, or hold them "
                f"(e.g. {held})"
            )
        if column == "r" and len(distinct) < _REFUSED_RATIOS and len(holders) > 1:
            raise DataError(
                f"{data.source} has {len(distinct)} mixture ratios (r = {', '.join(f'{x:g}' for x in distinct)}); law "
                f"{form.name} needs at least {_REFUSED_RATIOS}, and {LEAST_RATIOS} to be held by the data"
            )


def fit_loss(
    observations: Observations, form: Form, loss: str, options: FitOptions, points: Points | None = None
) -> tuple[LossFit, Solution]:
    """Fit one loss column, with intervals, profiles and requirement checks."""
    if points is None:
        problem = problem_of(observations, form, loss, options)
    else:
        problem = problem_at(observations, form, loss, points, options)
    solution = fit(problem, starts=options.starts, seed=options.seed)
    draws = bootstrap(problem, solution.theta, draws=options.draws, seed=options.seed)
    # penalty and prior are part of the estimate, not of what the data say
    profiles = profile_parameters(replace(problem, penalty=None, prior=False), solution.theta)
    factor = widening(problem)
    low, high = (
        form.natural(np.where(problem.free, end, solution.theta))
        for end in interval(np.where(problem.free, solution.theta, 0.0), np.where(problem.free, draws, 0.0), factor)
    )
    parameters = tuple(
        _parameter(problem, solution.theta, place, (float(low[place]), float(high[place])), profiles[place])
        for place in range(len(form.parameters))
    )
    checks = check_requirements(form, solution.theta, problem.points)
    residual: Array = form.loss(solution.theta[None], problem.points)[0] - problem.loss
    spread = scatter(problem, solution.theta)
    natural_draws: list[list[float]] = form.natural(draws).tolist()
    fitted = LossFit(
        target=loss,
        corpus="" if not form.ratios else "general" if loss == "general_nll" else "domain",
        form=form.name,
        equation=form.equation,
        statuses=_statuses(problem, solution, parameters, violated=any(c.violated_share > 0 for c in checks)),
        parameters=parameters,
        rows=len(problem.loss),
        runs=problem.run_count,
        objective=solution.objective,
        best_objectives=solution.best_objectives,
        r2=r_squared(problem.loss, residual),
        mae_nats=float(np.mean(np.abs(residual))),
        run_std=spread.run_std,
        row_std=spread.row_std,
        draws=tuple(tuple(draw) for draw in natural_draws),
        widening=factor,
        ranges=_ranges(observations),
        requirements=checks,
        base=observations.base.get(loss, ()),
    )
    return fitted, solution


def r_squared(observed: Array, residual: Array) -> float:
    """1 - residual over total sum of squares."""
    total = float(np.sum((observed - np.mean(observed)) ** 2))
    return 1 - float(np.sum(residual**2)) / total if total > 0 else float("nan")


def _parameter(
    problem: Problem, theta: Array, place: int, ends: tuple[float, float], profile: Profile
) -> FittedParameter:
    parameter = problem.form.parameters[place]
    low, high = problem.bounds
    fixed = not problem.free[place]
    at_low, at_high = theta[place] <= low[place] + _AT_BOUND, theta[place] >= high[place] - _AT_BOUND
    return FittedParameter(
        name=parameter.name,
        value=float(problem.form.natural(theta)[place]),
        low=ends[0],
        high=ends[1],
        profile_low=profile.low,
        profile_high=profile.high,
        at_bound="" if fixed else "low" if at_low else "high" if at_high else "",
        identified=profile.identified,
        fixed=fixed,
        meaning=parameter.meaning,
    )


def _statuses(
    problem: Problem, solution: Solution, parameters: tuple[FittedParameter, ...], *, violated: bool
) -> tuple[FitStatus, ...]:
    found: list[FitStatus] = []
    agreeing = sum(value <= solution.objective * (1 + _AGREEMENT) for value in solution.best_objectives)
    if agreeing < 2:
        found.append(FitStatus.STARTS_DISAGREE)
    if any(parameter.at_bound for parameter in parameters):
        found.append(FitStatus.AT_BOUND)
    if not all(parameter.identified for parameter in parameters):
        found.append(FitStatus.NOT_IDENTIFIED)
    if not found:
        found.append(FitStatus.CONVERGED)
    form, points = problem.form, problem.points
    if form.ratios and len(np.unique(points.share)) < LEAST_RATIOS:
        found.append(FitStatus.TOO_FEW_RATIOS)
    if "N" in form.needs and len(np.unique(points.size_billions)) < _LEAST_SIZES:
        found.append(FitStatus.TOO_FEW_SIZES)
    if problem.run_count <= int(problem.free.sum()) + 2:
        found.append(FitStatus.TOO_FEW_RUNS)
    if violated:
        found.append(FitStatus.REQUIREMENTS_VIOLATED)
    return tuple(found)


def _ranges(observations: Observations) -> dict[str, ObservedRange]:
    return {
        name: ObservedRange(low=float(values.min()), high=float(values.max()), distinct=len(np.unique(values)))
        for name, values in observations.columns().items()
    }
