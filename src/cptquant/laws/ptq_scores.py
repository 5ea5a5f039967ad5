"""What predictions are worth: every family left out of the fit in turn, and intervals from what was missed then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, model_validator

from cptquant.core.artifact import Frozen
from cptquant.core.forecast import PlanFeatures
from cptquant.laws.ptq_forms import Design, Floats
from cptquant.laws.ptq_table import PtqObservation

LEVEL = 0.9
EDGES_NATS = (0.01, 0.1)
"""Predicted KL at which the width of the intervals may change: small errors add up linearly, large ones do not."""
_FIRST_ORDER = 0.05
"""The NLL's first-order part is of the order of sqrt(KL); its share in the scale of the rise's residuals."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions by laws that never saw the row's family: kl, rise (n,) nats per token; rows: which of the table."""

    rows: NDArray[np.int64]
    kl: Floats
    rise: Floats


def leave_one_family_out(design: Design, *, without: int | None = None) -> HeldOut:
    """Predict every row from the other families.

    Args:
        without: index of a family that is left out of everything, to judge on it what was learned from the others.
    """
    used = np.ones(len(design.kl), dtype=np.bool_) if without is None else design.family != without
    kl, rise = np.zeros(len(used)), np.zeros(len(used))
    for family in range(design.families):
        mine = design.family == family
        if family != without:
            predicted = design.predict(design.fit(used & ~mine))
            kl[mine], rise[mine] = predicted[0][mine], predicted[1][mine]
    rows = np.flatnonzero(used)
    return HeldOut(rows, kl[rows], rise[rows])


class Bands(Frozen):
    """Half-widths of 90 % intervals, by predicted KL (`EDGES_NATS`).

    Attributes:
        log_kl: of ln KL. rise_scale: of the rise, in units of KL + 0.05 sqrt(KL).
    """

    log_kl: tuple[FiniteFloat, ...]
    rise_scale: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _one_for_each_bin(self) -> Self:
        for name, widths in (("log_kl", self.log_kl), ("rise_scale", self.rise_scale)):
            if len(widths) != len(EDGES_NATS) + 1:
                raise ValueError(f"{name} has {len(widths)} widths, expected {len(EDGES_NATS) + 1}")
        return self

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


def fit_bands(design: Design, held_out: HeldOut) -> Bands:
    """The residuals' 90 % quantile in each bin, with the finite-sample correction of split conformal prediction.

    Bins with few points take the quantile of all points, and a bin is never narrower than the one below it.
    """
    bins = np.array([_bin(kl) for kl in held_out.kl])
    residuals = np.abs(np.log(design.kl[held_out.rows] / held_out.kl))
    scaled = np.abs(design.rise[held_out.rows] - held_out.rise) / np.array([rise_scale(kl) for kl in held_out.kl])
    return Bands(log_kl=_quantiles(residuals, bins), rise_scale=_quantiles(scaled, bins))


def _quantiles(residuals: Floats, bins: NDArray[np.int64]) -> tuple[float, ...]:
    everything = _conformal(residuals)
    widths: list[float] = []
    for index in range(len(EDGES_NATS) + 1):
        mine = residuals[bins == index]
        widths.append(_conformal(mine) if len(mine) >= _FEWEST_IN_BIN else everything)
    return tuple(max(widths[: index + 1]) for index in range(len(widths)))


_FEWEST_IN_BIN = 12


def _conformal(values: Floats) -> float:
    rank = math.ceil(LEVEL * (len(values) + 1))
    return float(np.sort(values)[min(rank, len(values)) - 1])


class HeldOutScores(Frozen):
    """How well a form predicts families it was not fitted on.

    Attributes:
        rows, families: how many. r2_log_kl: of ln KL. r2_log_rise: of ln rise, over rows whose rise is above two
            standard errors. spearman_kl: rank correlation.
        median_error_nats: of the rise, where the rise is below 0.5. median_error_3bit_nats, largest_error_3bit_nats:
            of the rise, plans of 3 bits and more (None without one).
        median_kl_factor: exp of the median |ln(KL / predicted)|.
        coverage_kl, coverage_rise: share inside the 90 % intervals, whose widths come from the other families only.
    """

    rows: int
    families: int
    r2_log_kl: float
    r2_log_rise: float
    spearman_kl: float
    median_kl_factor: float
    median_error_nats: float
    median_error_3bit_nats: float | None
    largest_error_3bit_nats: float | None
    coverage_kl: float
    coverage_rise: float


def score_held_out(observations: Sequence[PtqObservation], form: str) -> HeldOutScores:
    """All scores of one form; intervals are judged on families left out of the fit and of the widths alike."""
    design = Design.build(observations, form)
    points = leave_one_family_out(design)
    in_kl, in_rise = np.zeros(len(design.kl), dtype=np.bool_), np.zeros(len(design.kl), dtype=np.bool_)
    for family in range(design.families):
        bands = fit_bands(design, leave_one_family_out(design, without=family))
        for row in np.flatnonzero(design.family == family):
            kl, rise = float(points.kl[row]), float(points.rise[row])
            low, high = bands.kl_interval(kl)
            in_kl[row] = low <= design.kl[row] <= high
            low, high = bands.rise_interval(rise, kl)
            in_rise[row] = low <= design.rise[row] <= high
    wide = np.array([at_least_3_bits(row.features) for row in observations])
    clear = (design.rise > 2 * design.rise_stderr) & (points.rise > 0)
    errors = np.abs(points.rise - design.rise)
    measured, predicted = np.log(design.kl), np.log(points.kl)
    return HeldOutScores(
        rows=len(design.kl),
        families=design.families,
        r2_log_kl=r_squared(measured, predicted),
        r2_log_rise=r_squared(np.log(design.rise[clear]), np.log(points.rise[clear])),
        spearman_kl=_spearman(measured, predicted),
        median_kl_factor=math.exp(float(np.median(np.abs(measured - predicted)))),
        median_error_nats=float(np.median(errors[design.rise < 0.5])),
        median_error_3bit_nats=float(np.median(errors[wide])) if wide.any() else None,
        largest_error_3bit_nats=float(errors[wide].max()) if wide.any() else None,
        coverage_kl=float(in_kl.mean()),
        coverage_rise=float(in_rise.mean()),
    )


def at_least_3_bits(features: PlanFeatures) -> bool:
    """Whether the blocks' weights have 3 bits or more on average."""
    return features.code_bits >= 3 - 1e-9


def r_squared(measured: Floats, predicted: Floats) -> float:
    """1 - residual over total sum of squares; below 0 is worse than the mean."""
    total = float(((measured - measured.mean()) ** 2).sum())
    return 1 - float(((measured - predicted) ** 2).sum()) / total if total else 0.0


def _spearman(measured: Floats, predicted: Floats) -> float:
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (measured, predicted))
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))
