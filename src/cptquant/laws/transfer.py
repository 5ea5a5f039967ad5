"""Cross-domain law: from domains that were trained to one that was only begun.

The domain coefficient K comes from the first ~1% of a run. Three numbers (F, mu, w2) are fitted on as many points as
there are domains, so the law is compared, on domains that were left out two at a time, with the same law without the
domain term; where it does not win, it says so.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import DataError, UserError
from cptquant.core.laws import Interval, LawFit
from cptquant.core.provenance import Stopwatch
from cptquant.laws.bootstrap import Scatter, interval, new_run_losses
from cptquant.laws.cross_domain import VARIANTS, domain_coefficient
from cptquant.laws.dcpt import L3
from cptquant.laws.fit import fit, polish
from cptquant.laws.fit_law import FitOptions, fit_loss, problem_at, require_columns
from cptquant.laws.forms import Array, Form, Points
from cptquant.laws.observations import LARGEST_NLL, Observations
from cptquant.laws.predict import fitted_theta, make_points
from cptquant.laws.problem import Problem

TARGET = "domain_nll"
LEAST_DOMAINS = 4
_WANTED = ("domain", "initial_nll", "early_nll")

Features = dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class LeftOut:
    """Errors of a variant on domains it was not fitted on, two left out at a time.

    Attributes:
        variant: k1 to k4, or "none" for L3 fitted to all domains together. splits: pairs of domains. mae_nats: mean
            over splits of the mean absolute error; stderr: over splits.
    """

    variant: str
    splits: int
    mae_nats: float
    stderr: float


def read_features(path: Path) -> Features:
    """Domain -> (k1, k2, k3) from a CSV: domain, initial_nll, early_nll, and optionally middle_nll.

    initial_nll: validation loss before training; early_nll: after ~1% of the steps; middle_nll: half way there.

    Raises:
        DataError: missing columns, or losses that are no positive numbers or do not fall.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--features {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(
            f"--features {path} is not UTF-8 text; give a CSV: {', '.join(_WANTED)}[, middle_nll]"
        ) from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    cells = [[cell.strip() for cell in next(csv.reader([line]))] for line in lines]
    header = cells[0] if cells else []
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise DataError(f"--features {path} has two columns called {doubled[0]!r}; rename one")
    lacking = [name for name in _WANTED if name not in header]
    if lacking:
        raise DataError(f"--features {path} has no column {lacking[0]}; expected {', '.join(_WANTED)}[, middle_nll]")
    features: Features = {}
    for row in cells[1:]:
        if len(row) != len(header):
            raise DataError(f"--features {path}: {','.join(row)!r} has {len(row)} cells, the header has {len(header)}")
        named = dict(zip(header, row, strict=True))
        if not named["domain"]:
            raise DataError(f"--features {path}: a row has no domain ({','.join(row)!r}); name it")
        if named["domain"] in features:
            raise DataError(f"--features {path} has two rows of domain {named['domain']!r}; keep one")
        features[named["domain"]] = _features_of(path, named)
    if not features:
        raise DataError(f"--features {path} has no rows; give one a domain")
    return features


def _features_of(path: Path, row: Mapping[str, str]) -> tuple[float, float, float]:
    values: list[float] = []
    for name in ("initial_nll", "early_nll", "middle_nll"):
        if name not in row:
            continue
        try:
            value = float(row[name])
        except ValueError:
            value = float("nan")
        if not 0 < value <= LARGEST_NLL:
            hint = "; is it a perplexity? Then take its natural logarithm" if value > LARGEST_NLL else ""
            raise DataError(
                f"--features {path}, domain {row['domain']!r}: {name} = {row[name]!r} is not a loss in nats per token "
                f"(at most {LARGEST_NLL:g}){hint}"
            )
        values.append(value)
    initial, early = values[:2]
    if early >= initial:
        raise DataError(
            f"--features {path}, domain {row['domain']!r}: early_nll {early:g} is not below initial_nll {initial:g}; "
            "measure it later in the run"
        )
    slowed = (values[2] - early) / (initial - early) if len(values) > 2 else 0.0
    return initial, (initial - early) / initial, max(slowed, 0.0)


def with_features(data: Observations, features: Features) -> Points:
    """Points of the domain loss with each row's features.

    Raises:
        DataError: a domain of the data has no features.
    """
    absent = sorted(set(data.domain) - set(features))
    if absent:
        named = absent[0] or "(no `domain` column)"
        raise DataError(f"{data.source}: domain {named} is not in --features, which has {', '.join(sorted(features))}")
    plain = data.points(TARGET)
    rows = np.array([features[name] for name in data.domain])
    return Points(plain.size_billions, plain.tokens_billions, plain.share, None, rows)


def fit_cross_domain(
    data: Observations, features: Features, options: FitOptions | None = None, variant: str = "k3"
) -> LawFit:
    """Fit the domain loss of all domains by one law, and judge it on left-out domains.

    Raises:
        DataError: fewer than four domains, no domain loss, or features that do not fit. UserError: no such variant.
    """
    options, watch = options or FitOptions(), Stopwatch()
    if variant not in VARIANTS:
        raise UserError(f"--variant {variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")
    names = sorted(set(data.domain))
    if TARGET not in data.losses:
        raise DataError(f"{data.source} has no column {TARGET}, which the cross-domain law is about")
    points = with_features(data, features)
    if len(names) < LEAST_DOMAINS:
        raise DataError(
            f"{data.source} has {len(names)} domains ({', '.join(names)}); a cross-domain law needs at least "
            f"{LEAST_DOMAINS}"
        )
    if variant == "k4" and not np.any(points.features[:, 2] > 0):  # type: ignore[index]
        raise DataError("variant k4 needs a column middle_nll in --features; add it or choose --variant k3")
    require_columns(data, VARIANTS[variant], options.fixed)
    fitted, solution = fit_loss(data, VARIANTS[variant], TARGET, options, points)
    judged = leave_domains_out(data, points, [variant], options, start=solution.theta)
    return LawFit(
        provenance=watch.provenance(seed=options.seed),
        kind="cross-domain",
        fits={TARGET: fitted},
        settings={"variant": variant, "source": data.source, "starts": options.starts, "draws": options.draws,
                  "seed": options.seed},
        features={name: features[name] for name in names},
        notes=judgement(judged, len(names)),
    )  # fmt: skip


def leave_domains_out(
    data: Observations,
    points: Points,
    variants: list[str],
    options: FitOptions,
    *,
    start: Array | None = None,
    left_out: int = 2,
) -> list[LeftOut]:
    """Errors on domains left out `left_out` at a time; always with the law without a domain term beside."""
    names = sorted(set(data.domain))
    splits = list(combinations(names, left_out))
    domain = np.array(data.domain)
    found: list[LeftOut] = []
    for variant in [*variants, "none"]:
        form = L3 if variant == "none" else VARIANTS[variant]
        whole = problem_at(data, form, TARGET, points, options)
        first = start if start is not None and form is VARIANTS.get(variants[0]) else fit(
            whole, starts=options.starts, seed=options.seed
        ).theta  # fmt: skip
        errors: list[float] = []
        for pair in splits:
            held: NDArray[np.bool_] = np.isin(domain, pair)
            part = problem_at(data.take(~held), form, TARGET, points.take(~held), options)
            theta = _refit(part, first, options)
            loss = form.loss(theta[None], points.take(held))[0]
            error: Array = loss - data.losses[TARGET][held]
            errors.append(float(np.mean(np.abs(error))))
        stderr = float(np.std(np.array(errors), ddof=1)) / len(errors) ** 0.5
        found.append(LeftOut(variant, len(splits), float(np.mean(errors)), stderr))
    return found


def _refit(problem: Problem, start: Array, options: FitOptions) -> Array:
    fresh = problem.starts(3, np.random.default_rng(options.seed))
    thetas, objectives = polish(problem, np.concatenate([start[None], fresh]), iterations=150, tolerance=1e-6)
    return thetas[int(np.argmin(objectives))]


def judgement(judged: list[LeftOut], domains: int) -> tuple[str, ...]:
    """What the left-out domains say, in sentences."""
    law, without = judged[0], judged[-1]
    figures = (
        f"two domains left out at a time ({law.splits} splits): mean absolute error {law.mae_nats:.4f} ± "
        f"{law.stderr:.4f} nats with K, {without.mae_nats:.4f} ± {without.stderr:.4f} without any domain term"
    )
    verdict = (
        "the features support the law on these domains"
        if law.mae_nats + law.stderr < without.mae_nats - without.stderr
        else "the features do not support the law: K predicts left-out domains no better than no domain term"
    )
    caveat = f"F, mu and the weights in K rest on {domains} domains, and K moves the intercept only"
    return figures, verdict, caveat


@dataclass(frozen=True)
class Transfer:
    """A new domain under a fitted cross-domain law.

    Attributes:
        coefficient: K with its interval. known: smallest and largest K among the fitted domains. domain_nll: predicted,
            where a run was given.
    """

    domain: str
    coefficient: Interval
    known: tuple[float, float]
    domain_nll: Interval | None

    @property
    def inside(self) -> bool:
        """Whether K lies among those of the fitted domains."""
        return self.known[0] <= self.coefficient.value <= self.known[1]


def transfer(law: LawFit, features: Features, run: tuple[float, float, float] | None = None) -> list[Transfer]:
    """K of new domains, and the loss of a run (N parameters, D tokens, r) on each.

    Raises:
        DataError: the law is no cross-domain law.
    """
    if law.kind != "cross-domain":
        raise DataError(f"this law is {law.kind}; transfer needs one made by: cptquant law fit cross-domain RUNS.csv")
    fit_of = law.fits[TARGET]
    form, theta, draws = fitted_theta(fit_of)
    stack = np.concatenate([theta[None], draws])
    known = domain_coefficient(form, theta[None], np.array(list(law.features.values())))[0]
    answers: list[Transfer] = []
    for name, values in features.items():
        row = np.array(values)
        coefficients = domain_coefficient(form, stack, row[None])[:, 0]
        predicted = None if run is None else _predict(law, form, stack, run, row)
        answers.append(
            Transfer(
                name, _interval_of(coefficients, fit_of.widening), (float(known.min()), float(known.max())), predicted
            )
        )
    return answers


def _predict(law: LawFit, form: Form, stack: Array, run: tuple[float, float, float], features: Array) -> Interval:
    fit_of = law.fits[TARGET]
    logs = form.log_loss(stack, make_points(fit_of, *run, features))[0]
    spread = Scatter(fit_of.run_std, fit_of.row_std)
    low, high = new_run_losses(logs[0], logs[1:], fit_of.widening, spread)
    return Interval(value=float(np.exp(logs[0, 0])), low=float(np.exp(low[0])), high=float(np.exp(high[0])))


def _interval_of(values: Array, factor: float) -> Interval:
    low, high = interval(np.log(values[0]), np.log(values[1:]), factor)
    return Interval(value=float(values[0]), low=float(np.exp(low)), high=float(np.exp(high)))
