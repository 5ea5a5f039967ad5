"""From a table's sum of damages to the loss that quantizing really costs, with an honest 90 % band.

    ln loss = a + b (ln damage - center) + e,   e ~ N(0, s^2)

The sum is biased: it knows no interactions between sites, and scores are of rounding where GPTQ compensates. Both show
as a factor and a power, seen at a few plans that are really quantized. (a, b) and s have the conjugate prior of a
straight line (normal, inverse gamma), so a prediction is Student's t and few points, even none, give a usable band.
For second-order KL divergences (TDMPQ) of causal language models the prior is what the package's table of observations
shows between families of models; for other tables it says next to nothing.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cptquant.core.forecast import METHODS
from cptquant.core.frontier import BandPrior, DamageCalibration
from cptquant.laws.ptq import usable_observations
from cptquant.laws.ptq_table import SHIPPED, PtqObservation, read_observations

CENTER_NATS = 0.03
_LEAST_LOSS = 1e-7
"""Below it the rounding of float32 forward passes is what is measured."""
_FEWEST_ROWS, _FEWEST_FAMILIES = 5, 3
_PRIOR_DEGREES = 2.0
"""Scatter differs up to fivefold between families, so what others show counts for two residuals only. With this, 89 to
100 % of the table's plans lie inside, each family left out in turn, with 0, 2 or 4 of its own plans measured (five
random orders; RTN 100, 93 and 92 %, GPTQ 94, 90 and 89 %)."""
_CHOSEN_INTERCEPT_STD, _CHOSEN_SLOPE_STD = 0.2, 0.1
"""Allowance for plans that were chosen by the very scores that predict them: where scores err low, the knapsack saves
bits, so such plans cost more than their sum says, the more so the more was saved. The table's plans, most of them
uniform, do not show it; frontiers do (benchmarks/frontier.py: slopes of 1.04 to 1.14)."""
FEWEST_UNINFORMED = 3
"""Measured points without which a prior that says nothing gives no band."""

Floats = NDArray[np.float64]


def vague_prior(center_damage: float) -> BandPrior:
    """For a table in any unit: the intercept is free, the loss grows about like the damage."""
    return BandPrior(
        center=math.log(center_damage), intercept=math.log(center_damage), intercept_std=20.0, slope=1.0, slope_std=0.5,
        scatter=0.2, degrees=1.0, informed=False, source="none: the table's unit or the quantizer was not seen before",
    )  # fmt: skip


def observed_prior(method: str, *, without: Sequence[str] = (), table: Path = SHIPPED) -> BandPrior | None:
    """What the package's table shows between families, for second-order KL divergences of rounding to nearest.

    Args:
        method: one of `METHODS`: what quantized. without: families or models to leave out, as the one at hand.

    Returns:
        None where the table has no such method, or too few families.
    """
    if method not in METHODS or not table.exists():
        return None
    rows = [
        row
        for row in usable_observations(read_observations(table))
        if row.features.method == method and not {row.family, row.model, row.model.split(":")[-1]} & set(without)
    ]
    center = math.log(CENTER_NATS)
    lines = {name: fitted_line(rows, name, center) for name in dict.fromkeys(row.family for row in rows)}
    fits = [line for line in lines.values() if line is not None]
    if len(fits) < _FEWEST_FAMILIES:
        return None
    values = np.array(fits)  # (families, 3): intercept, slope, scatter
    spread = math.sqrt(1 + 1 / len(fits))  # a new family around the mean of these
    return BandPrior(
        center=center,
        intercept=float(values[:, 0].mean()),
        intercept_std=math.hypot(spread * float(values[:, 0].std(ddof=1)), _CHOSEN_INTERCEPT_STD),
        slope=float(values[:, 1].mean()),
        slope_std=math.hypot(spread * float(values[:, 1].std(ddof=1)), _CHOSEN_SLOPE_STD),
        scatter=float(np.exp(np.log(values[:, 2]).mean())),
        degrees=_PRIOR_DEGREES,
        informed=True,
        source=f"{table.name}: {len(rows)} plans of {len(fits)} families, {method}",
    )


def fitted_line(rows: Sequence[PtqObservation], family: str, center: float) -> tuple[float, float, float] | None:
    """Least squares through one family: intercept, slope, scatter of ln KL; None with too few rows."""
    mine = [row for row in rows if row.family == family]
    if len(mine) < _FEWEST_ROWS:
        return None
    rounded = [row.features.taylor_kl_nats / row.features.method_ratio for row in mine]
    x = np.log(np.array(rounded)) - center
    y = np.log(np.array([row.kl_nats for row in mine]))
    design = np.stack([np.ones_like(x), x], axis=1)
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    residuals = y - design @ found
    return float(found[0]), float(found[1]), math.sqrt(float(residuals @ residuals) / (len(mine) - 2))


def calibrate(damages: Sequence[float], losses: Sequence[float], prior: BandPrior) -> DamageCalibration | None:
    """Learn the straight line from plans that were measured.

    Args:
        damages, losses: (points,) sums of the table's damages and what was measured; pairs that are not above zero
            teach nothing about a ratio and are left out.

    Returns:
        None with fewer than three points where the prior is not informed.
    """
    pairs = [(damage, loss) for damage, loss in zip(damages, losses, strict=True) if damage > 0 and loss > _LEAST_LOSS]
    if not prior.informed and len(pairs) < FEWEST_UNINFORMED:
        return None
    # here: `cptquant diff` and `--help` need none of it
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]

    x = np.log(np.array([damage for damage, _ in pairs])) - prior.center
    y = np.log(np.array([loss for _, loss in pairs]))
    design = np.stack([np.ones_like(x), x], axis=1)
    start = np.array([prior.intercept, prior.slope])
    # precisions in units of 1 / s^2
    first = np.diag([(prior.scatter / prior.intercept_std) ** 2, (prior.scatter / prior.slope_std) ** 2])
    precision = first + design.T @ design
    mean = np.linalg.solve(precision, first @ start + design.T @ y)
    residuals = y - design @ mean
    shift = mean - start
    squares = prior.degrees * prior.scatter**2 + float(residuals @ residuals + shift @ first @ shift)
    degrees = prior.degrees + len(pairs)
    covariance = np.linalg.inv(precision)
    used = [damage for damage, _ in pairs]
    return DamageCalibration(
        center=prior.center,
        mean=(float(mean[0]), float(mean[1])),
        covariance=(float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1])),
        scatter=math.sqrt(squares / degrees),
        degrees=degrees,
        quantile=float(stdtrit(degrees, 0.5 + DamageCalibration.LEVEL / 2)),
        damages=(min(used), max(used)) if used else None,
        points=len(pairs),
        prior=prior.source,
    )
