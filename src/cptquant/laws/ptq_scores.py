"""What predictions are worth: every family left out of the fit in turn, and intervals from what was missed then."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cptquant.core.artifact import Frozen
from cptquant.core.forecast import PlanFeatures
from cptquant.laws.ptq_forms import PtqCoefficients
from cptquant.laws.ptq_table import PtqObservation

LEVEL = 0.9
EDGES_NATS = (0.01, 0.1)
"""Predicted KL at which the width of the intervals may change: small errors add up linearly, large ones do not."""
_FIRST_ORDER = 0.05
"""The NLL's first-order part is of the order of sqrt(KL); its share in the scale of the rise's residuals."""

Fitter = Callable[[Sequence[PtqObservation]], PtqCoefficients]


@dataclass(frozen=True)
class HeldOutPoint:
    """An observation and what a law fitted without its family says of it."""

    observation: PtqObservation
    kl_nats: float
    rise_nats: float


def leave_one_family_out(observations: Sequence[PtqObservation], fit: Fitter) -> list[HeldOutPoint]:
    """Predict every observation from the other families."""
    points: list[HeldOutPoint] = []
    for family in dict.fromkeys(row.family for row in observations):
        law = fit([row for row in observations if row.family != family])
        points += [
            HeldOutPoint(row, law.kl_nats(row.features), law.rise_nats(row.features))
            for row in observations
            if row.family == family
        ]
    return points


class Bands(Frozen):
    """Half-widths of 90 % intervals, by predicted KL (`EDGES_NATS`).

    Attributes:
        log_kl: of ln KL. rise_scale: of the rise, in units of KL + 0.05 sqrt(KL).
    """

    log_kl: tuple[float, ...]
    rise_scale: tuple[float, ...]

    def kl_interval(self, kl_nats: float) -> tuple[float, float]:
        """Low and high, nats per token."""
        factor = math.exp(self.log_kl[_bin(kl_nats)])
        return kl_nats / factor, kl_nats * factor

    def rise_interval(self, rise_nats: float, kl_nats: float) -> tuple[float, float]:
        """Low and high, nats per token."""
        width = self.rise_scale[_bin(kl_nats)] * rise_scale(kl_nats)
        return rise_nats - width, rise_nats + width


def rise_scale(kl_nats: float) -> float:
    """How far off a predicted rise may be, up to a factor: KL + 0.05 sqrt(KL)."""
    return kl_nats + _FIRST_ORDER * math.sqrt(kl_nats)


def _bin(kl_nats: float) -> int:
    return sum(kl_nats > edge for edge in EDGES_NATS)


def fit_bands(points: Sequence[HeldOutPoint]) -> Bands:
    """The residuals' 90 % quantile in each bin, with the finite-sample correction of split conformal prediction.

    Bins with few points take the widest of their neighbours, and a bin is never narrower than the one below it.
    """
    return Bands(
        log_kl=_quantiles(points, lambda p: abs(math.log(p.observation.kl_nats / p.kl_nats))),
        rise_scale=_quantiles(points, lambda p: abs(p.observation.rise_nats - p.rise_nats) / rise_scale(p.kl_nats)),
    )


def _quantiles(points: Sequence[HeldOutPoint], residual: Callable[[HeldOutPoint], float]) -> tuple[float, ...]:
    usable = [p for p in points if p.kl_nats > 0 and p.observation.kl_nats > 0]
    everything = _conformal([residual(p) for p in usable])
    widths: list[float] = []
    for index in range(len(EDGES_NATS) + 1):
        mine = [residual(p) for p in usable if _bin(p.kl_nats) == index]
        widths.append(_conformal(mine) if len(mine) >= _FEWEST_IN_BIN else everything)
    return tuple(max(widths[: index + 1]) for index in range(len(widths)))


_FEWEST_IN_BIN = 12


def _conformal(values: Sequence[float]) -> float:
    ordered = sorted(values)
    rank = math.ceil(LEVEL * (len(ordered) + 1))
    return ordered[min(rank, len(ordered)) - 1]


class HeldOutScores(Frozen):
    """How well a form predicts families it was not fitted on.

    Attributes:
        rows, families: how many. r2_log_kl: of ln KL. r2_log_rise: of ln rise, over rows whose rise is above two
            standard errors. spearman_kl: rank correlation.
        median_error_nats: of the rise, where the rise is below 0.5. median_error_3bit_nats, largest_error_3bit_nats:
            of the rise, plans of 3 bits and more. median_kl_factor: exp of the median |ln(KL / predicted)|.
        coverage_kl, coverage_rise: share inside the 90 % intervals, whose widths come from the other families only.
    """

    rows: int
    families: int
    r2_log_kl: float
    r2_log_rise: float
    spearman_kl: float
    median_kl_factor: float
    median_error_nats: float
    median_error_3bit_nats: float
    largest_error_3bit_nats: float
    coverage_kl: float
    coverage_rise: float


def score_held_out(observations: Sequence[PtqObservation], fit: Fitter) -> HeldOutScores:
    """All scores of one form; intervals are judged by leaving a family out twice, once for the fit, once for widths."""
    points = leave_one_family_out(observations, fit)
    covered_kl: list[bool] = []
    covered_rise: list[bool] = []
    for family in dict.fromkeys(row.family for row in observations):
        bands = fit_bands(leave_one_family_out([row for row in observations if row.family != family], fit))
        for point in points:
            if point.observation.family != family:
                continue
            low, high = bands.kl_interval(point.kl_nats)
            covered_kl.append(low <= point.observation.kl_nats <= high)
            low, high = bands.rise_interval(point.rise_nats, point.kl_nats)
            covered_rise.append(low <= point.observation.rise_nats <= high)
    return summarise(points, float(np.mean(covered_kl)), float(np.mean(covered_rise)))


def summarise(points: Sequence[HeldOutPoint], coverage_kl: float, coverage_rise: float) -> HeldOutScores:
    """Scores of predictions that were made already."""
    measured = np.log([p.observation.kl_nats for p in points])
    predicted = np.log([p.kl_nats for p in points])
    clear = [p for p in points if p.observation.rise_nats > 2 * p.observation.rise_stderr_nats and p.rise_nats > 0]
    errors = [(p, abs(p.rise_nats - p.observation.rise_nats)) for p in points]
    small = [error for p, error in errors if p.observation.rise_nats < 0.5]
    wide = [error for p, error in errors if at_least_3_bits(p.observation.features)]
    return HeldOutScores(
        rows=len(points),
        families=len({p.observation.family for p in points}),
        r2_log_kl=r_squared(measured, predicted),
        r2_log_rise=r_squared(np.log([p.observation.rise_nats for p in clear]), np.log([p.rise_nats for p in clear])),
        spearman_kl=_spearman(measured, predicted),
        median_kl_factor=math.exp(float(np.median(np.abs(measured - predicted)))),
        median_error_nats=float(np.median(small)),
        median_error_3bit_nats=float(np.median(wide)),
        largest_error_3bit_nats=max(wide),
        coverage_kl=coverage_kl,
        coverage_rise=coverage_rise,
    )


def at_least_3_bits(features: PlanFeatures) -> bool:
    """Whether the blocks' weights have 3 bits or more on average."""
    return features.code_bits >= 3 - 1e-9


def r_squared(measured: np.ndarray, predicted: np.ndarray) -> float:
    """1 - residual over total sum of squares; below 0 is worse than the mean."""
    total = float(((measured - measured.mean()) ** 2).sum())
    return 1 - float(((measured - predicted) ** 2).sum()) / total if total else 0.0


def _spearman(measured: np.ndarray, predicted: np.ndarray) -> float:
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (measured, predicted))
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))
