"""The requirements a mixture law has to meet (arXiv 2406.01375, section 3), checked on the data's range.

    dL/dN < 0,  dL/dD < 0,  dL/dr < 0  (explicit trends),  d2L/dDdr < 0  (more of the corpus makes tokens more useful),
    at fixed r the law is Chinchilla's: E + A/N^a + B'/D^b  (consistency)

No form meets all of them for every parameter vector: L3's dL/dr is positive wherever D^beta <
eta B r^(eta-1) (r+eps)^(gamma+1)/(gamma C). So a fit is checked, the violations are mapped, and they can be penalised.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cptquant.core.laws import RequirementCheck
from cptquant.laws.forms import BILLION, Array, Form, Points
from cptquant.laws.problem import Penalty

FALLS_WITH_SIZE = "loss falls with N"
FALLS_WITH_TOKENS = "loss falls with D"
FALLS_WITH_SHARE = "loss falls with the share"
MIXED = "a larger share makes tokens more useful"
CONSISTENT = "at fixed share the law is Chinchilla's"
_TOLERANCE = 1e-5  # nats between neighbours on the grid; smaller differences are flat
_BEND = 0.05  # relative change of the local exponent in D that still counts as a power law


@dataclass(frozen=True)
class Grid:
    """Axes on which requirements are checked, N and D in billions and logarithmic, share linear."""

    sizes: Array
    tokens: Array
    shares: Array

    @classmethod
    def over(cls, points: Points, form: Form, *, fine: bool = True) -> "Grid":
        """The range of the data; one value on an axis the law does not use."""
        count = (5, 17, 21) if fine else (2, 8, 11)
        return cls(
            _axis(points.size_billions, count[0] if "N" in form.needs else 1, logarithmic=True),
            _axis(points.tokens_billions, count[1] if "D" in form.needs else 1, logarithmic=True),
            _axis(points.share, count[2] if "r" in form.needs else 1, logarithmic=False),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(sizes, tokens, shares)."""
        return len(self.sizes), len(self.tokens), len(self.shares)

    def points(self, sample: Points) -> Points:
        """All grid points, share fastest; what the grid does not span is taken from the sample's first row."""
        axes = np.meshgrid(self.sizes, self.tokens, self.shares, indexing="ij")
        size, tokens, share = (axis.ravel() for axis in axes)
        count = len(size)
        return Points(
            size,
            tokens,
            share,
            None if sample.unique_billions is None else tokens.copy(),
            None if sample.features is None else np.repeat(np.median(sample.features, axis=0)[None], count, axis=0),
        )


def _axis(values: Array, count: int, *, logarithmic: bool) -> Array:
    low, high = float(values.min()), float(values.max())
    if count == 1 or low == high:
        return np.array([float(np.median(values))])
    return np.geomspace(low, high, count) if logarithmic else np.linspace(low, high, count)


def check_requirements(form: Form, theta: Array, points: Points) -> tuple[RequirementCheck, ...]:
    """Check one internal vector (P,) on the range of the data it was fitted to."""
    grid = Grid.over(points, form)
    loss = form.loss(theta[None], grid.points(points))[0].reshape(grid.shape)
    checks: list[RequirementCheck] = []
    if grid.shape[0] > 1:
        checks.append(_check(FALLS_WITH_SIZE, np.diff(loss, axis=0), grid))
    if grid.shape[1] > 1:
        checks.append(_check(FALLS_WITH_TOKENS, np.diff(loss, axis=1), grid))
    if grid.shape[2] > 1:
        checks.append(_check(FALLS_WITH_SHARE, np.diff(loss, axis=2), grid))
    if grid.shape[1] > 1 and grid.shape[2] > 1:
        checks.append(_check(MIXED, np.diff(np.diff(loss, axis=1), axis=2), grid))
    if grid.shape[0] > 1 and grid.shape[1] > 3:
        checks.append(_check_consistency(loss, grid))
    return tuple(checks)


def _check(name: str, differences: Array, grid: Grid) -> RequirementCheck:
    violated = differences > _TOLERANCE
    middle = violated[violated.shape[0] // 2]
    tokens, shares = grid.tokens[: middle.shape[0]], grid.shares[: middle.shape[1]]
    clean: NDArray[np.bool_] = np.logical_not(np.any(violated, axis=(0, 2)))
    above = np.flatnonzero(np.cumprod(clean[::-1])[::-1])
    return RequirementCheck(
        name=name,
        violated_share=float(violated.mean()),
        tokens=tuple(float(value * BILLION) for value in tokens),
        shares=tuple(float(value) for value in shares),
        violated=tuple(tuple(bool(cell) for cell in row) for row in middle),
        first_tokens=float(tokens[above[0]] * BILLION) if len(above) else None,
    )


def _check_consistency(loss: Array, grid: Grid) -> RequirementCheck:
    """Size and tokens must not interact, and the effect of tokens must be one power of D at every share."""
    steps = np.diff(loss, axis=1)
    interacting = np.abs(np.diff(steps, axis=0)).max(axis=(0, 1)) > 1e-6 + 1e-3 * np.abs(steps).max(axis=(0, 1))
    tiny = np.abs(steps[0]) < _TOLERANCE
    ratios = steps[0, 1:] / np.where(tiny[:-1], 1.0, steps[0, :-1])  # constant for a power law on a logarithmic axis
    spread = np.where(tiny[1:] | tiny[:-1], 0.0, np.abs(np.log(np.maximum(np.abs(ratios), 1e-12))))
    step = float(np.log(grid.tokens[1] / grid.tokens[0]))
    bending = (spread.max(axis=0) - spread.min(axis=0)) > _BEND * np.maximum(spread.mean(axis=0), 0.1 * step)
    bending &= ~tiny.all(axis=0)
    return RequirementCheck(
        name=CONSISTENT,
        violated_share=float((interacting | bending).mean()),
        shares=tuple(float(value) for value in grid.shares),
    )


def penalty_of(form: Form, points: Points, strength: float) -> Penalty:
    """Penalty on rising loss in N, D and share and on a positive mixed derivative, over the data's range."""
    grid = Grid.over(points, form, fine=False)
    identity = np.eye(int(np.prod(grid.shape))).reshape(*grid.shape, -1)
    rows = [np.diff(identity, axis=axis) for axis in range(3) if grid.shape[axis] > 1]
    if grid.shape[1] > 1 and grid.shape[2] > 1:
        rows.append(np.diff(np.diff(identity, axis=1), axis=2))
    matrix = np.concatenate([row.reshape(-1, identity.shape[-1]) for row in rows])
    return Penalty(grid.points(points), matrix, strength)
