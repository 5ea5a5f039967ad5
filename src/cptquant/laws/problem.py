"""One fitting problem: Huber loss of log-loss residuals, its gradient, and bounds, for stacks of parameter vectors.

    minimise  mean_i w_i h_delta(z_i) + (penalty/2) mean_j max(0, (G L)_j)^2
              + (delta^2/2n) sum_p ((theta_p - m_p)/d_p)^2,
    z_i = s_i (ln L(x_i; theta) - ln L_i)

h_delta is Huber's function with delta = 1e-3 by default (arXiv 2203.15556). s_i is 1, or mean relative standard error
over that of the row where standard errors are given. w_i are 1, or bootstrap weights, equal within a run. The rows of G
take differences of L on a grid that should not be positive (see `requirements.py`).

The last term is a weak prior: m_p and d_p are the middle and half width of the parameter's range of starts, and the
whole term weighs like one residual of delta. It changes nothing that the data hold; where they hold nothing (E, A and
alpha from two model sizes) it decides for ordinary exponents instead of whatever a start ended on. Profiles are taken
without it, and bootstrap draws move m_p at random, so that it never passes for knowledge.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import UserError
from cptquant.laws.forms import Array, Form, Points


@dataclass(frozen=True)
class Penalty:
    """Weight of violated requirements: `differences` (m, g) times the loss at `points` (g,) should not be positive."""

    points: Points
    differences: Array
    strength: float


@dataclass(frozen=True)
class Problem:
    """A form, its data and how they are weighed.

    Attributes:
        loss: observed losses in nats, (n,). scale: factor of each row's residual, (n,). run: index of each row's run,
            (n,). fixed: parameters that are held, by name, in natural values.
    """

    form: Form
    points: Points
    loss: Array
    scale: Array
    run: NDArray[np.int64]
    huber_delta: float = 1e-3
    fixed: Mapping[str, float] = field(default_factory=dict[str, float])
    penalty: Penalty | None = None
    prior: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.fixed if name not in self.form.index]
        if unknown:
            raise UserError(
                f"--fix {unknown[0]}={self.fixed[unknown[0]]:g}: law {self.form.name} has no such parameter; "
                f"it has {', '.join(self.form.index)}"
            )
        low, high = (self.form.natural(ends) for ends in self.bounds)
        for name, value in self.fixed.items():
            place = self.form.index[name]
            removed = value == 0 and self.form.parameters[place].removable
            least, most = low[place] - 1e-9 * abs(low[place]), high[place] * (1 + 1e-9)  # the logarithm and back
            if not removed and not least <= value <= most:
                zero = ", or 0 to leave its term out" if self.form.parameters[place].removable else ""
                raise UserError(
                    f"--fix {name}={value:g}: {name} of law {self.form.name} must lie between {low[place]:.4g} and "
                    f"{high[place]:.4g}{zero} (N and D in billions)"
                )

    @cached_property
    def log_observed(self) -> Array:
        """ln of the observed losses, (n,)."""
        return np.log(self.loss)

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        """Parameters that are fitted, (P,)."""
        return np.array([parameter.name not in self.fixed for parameter in self.form.parameters])

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Internal lower and upper bounds, (P,) each; a relative parameter's are in units of the smallest loss."""
        least = float(self.loss.min())
        low = [p.low * least if p.relative else p.low for p in self.form.parameters]
        high = [float(self.loss.max()) if p.relative else p.high for p in self.form.parameters]
        return self.form.internal(np.array(low)), self.form.internal(np.array(high))

    @cached_property
    def start_range(self) -> tuple[Array, Array]:
        """Internal ends of the ranges of starts, (P,) each: where a parameter usually lies."""
        least = float(self.loss.min())
        ends = np.array([[edge * (least if p.relative else 1.0) for edge in p.start] for p in self.form.parameters])
        return self.form.internal(ends[:, 0]), self.form.internal(ends[:, 1])

    @property
    def run_count(self) -> int:
        """Number of distinct runs."""
        return int(self.run.max()) + 1

    def with_fixed(self, theta: Array) -> Array:
        """The same stack with the fixed parameters at their values."""
        held = np.array(theta, dtype=np.float64)
        for name, value in self.fixed.items():
            place = self.form.index[name]
            signed = self.form.parameters[place].signed
            held[..., place] = value if signed else np.log(value) if value > 0 else -np.inf
        return held

    def starts(self, count: int, rng: np.random.Generator) -> Array:
        """Random internal vectors, (count, P), within the bounds."""
        low, high = self.start_range
        drawn = low + (high - low) * rng.uniform(size=(count, len(low)))
        low_bounds, high_bounds = self.bounds
        return self.with_fixed(np.clip(drawn, low_bounds, high_bounds))

    def residuals(self, theta: Array) -> Array:
        """z, (S, n)."""
        return self.scale * (self.form.log_loss(theta, self.points)[0] - self.log_observed)

    def prior_shifts(self, count: int, rng: np.random.Generator) -> Array:
        """Random shifts of the prior's middle, (count, P), for bootstrap draws."""
        low, high = self.start_range
        return rng.standard_normal((count, len(low))) * (high - low) / 2

    def objective(self, theta: Array, weights: Array | None = None, shifts: Array | None = None) -> Array:
        """Objective of each vector, (S,)."""
        value = np.mean(self._weigh(huber(self.residuals(theta), self.huber_delta), weights), axis=1)
        if self.penalty is not None:
            excess, _ = self._violations(theta, self.penalty, jacobian=False)
            value = value + 0.5 * self.penalty.strength * np.mean(excess**2, axis=1)
        return value + self._prior(theta, shifts)[0]

    def _prior(self, theta: Array, shifts: Array | None) -> tuple[Array, Array, Array]:
        """Value (S,), gradient (S, P) and curvature (P,) of the weak prior."""
        low, high = self.start_range
        half = (high - low) / 2
        strength = self.huber_delta**2 / len(self.loss) if self.prior else 0.0
        middle = (low + high) / 2 + (0.0 if shifts is None else shifts)
        scaled = np.where(self.free, np.where(self.free, theta, middle) - middle, 0.0) / half
        curvature = np.where(self.free, strength / half**2, 0.0)
        return 0.5 * strength * np.sum(scaled**2, axis=-1), strength * scaled / half, curvature

    def linearise(
        self,
        theta: Array,  # (S, P)
        weights: Array | None = None,  # (S, n)
        shifts: Array | None = None,  # (S, P)
    ) -> tuple[Array, Array, Array]:
        """Objective (S,), gradient (S, P) and the curvature (S, P, P) of the quadratic that majorises Huber's loss."""
        log_loss, slopes = self.form.log_loss(theta, self.points, jacobian=True)
        assert slopes is not None
        z = self.scale * (log_loss - self.log_observed)
        slopes *= self.scale
        rows = z.shape[1]
        value = np.mean(self._weigh(huber(z, self.huber_delta), weights), axis=1)
        push = self._weigh(np.clip(z, -self.huber_delta, self.huber_delta), weights) / rows
        gradient = np.matmul(slopes, push[:, :, None])[:, :, 0]
        stiffness = self._weigh(np.minimum(1.0, self.huber_delta / np.maximum(np.abs(z), 1e-300)), weights) / rows
        curvature = np.matmul(slopes * stiffness[:, None, :], slopes.transpose(0, 2, 1))
        if self.penalty is not None:
            excess, slopes_of_excess = self._violations(theta, self.penalty, jacobian=True)
            assert slopes_of_excess is not None
            factor = self.penalty.strength / excess.shape[1]
            active = slopes_of_excess * (excess > 0)[:, None, :]
            value = value + 0.5 * factor * np.sum(excess**2, axis=1)
            gradient = gradient + factor * np.matmul(active, excess[:, :, None])[:, :, 0]
            curvature = curvature + factor * np.matmul(active, active.transpose(0, 2, 1))
        extra, slope, bend = self._prior(theta, shifts)
        return value + extra, gradient + slope, curvature + np.diag(bend)

    def gradient(self, theta: Array) -> tuple[float, Array]:
        """Objective and gradient (P,) of one vector, as L-BFGS-B wants them."""
        log_loss, slopes = self.form.log_loss(theta[None], self.points, jacobian=True)
        assert slopes is not None
        z = self.scale * (log_loss[0] - self.log_observed)
        push = self.scale * np.clip(z, -self.huber_delta, self.huber_delta) / len(z)
        value, gradient = float(np.mean(huber(z, self.huber_delta))), slopes[0] @ push
        if self.penalty is not None:
            excess, slopes_of_excess = self._violations(theta[None], self.penalty, jacobian=True)
            assert slopes_of_excess is not None
            factor = self.penalty.strength / excess.shape[1]
            value += 0.5 * factor * float(np.sum(excess**2))
            gradient = gradient + factor * (slopes_of_excess[0] @ excess[0])
        extra, slope, _ = self._prior(theta, None)
        return value + float(extra), np.where(self.free, gradient + slope, 0.0)

    def _violations(self, theta: Array, penalty: Penalty, *, jacobian: bool) -> tuple[Array, Array | None]:
        log_loss, slopes = self.form.log_loss(theta, penalty.points, jacobian=jacobian)
        loss = np.exp(log_loss)
        excess = np.maximum(loss @ penalty.differences.T, 0.0)
        if slopes is None:
            return excess, None
        return excess, (slopes * loss[:, None, :]) @ penalty.differences.T

    @staticmethod
    def _weigh(values: Array, weights: Array | None) -> Array:
        return values if weights is None else values * weights


def huber(z: Array, delta: float) -> Array:
    """z^2/2 up to delta, then a straight line."""
    size = np.abs(z)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
