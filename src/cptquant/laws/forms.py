"""What a scaling law is here: a sum of terms, each the exponential of a simple expression, with its gradient.

    L(x; theta) = sum_k s_k exp(t_k(x; theta)),    log L by log-sum-exp

Positive parameters are optimised as logarithms (theta = ln value), signed ones as they are. Every function works on a
stack of S parameter vectors at once, so that restarts, bootstrap refits and profiles are one call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BILLION = 1e9
_LEAST_SUM = 1e-3  # of the largest term: below, log is continued as a straight line so that it stays defined


@dataclass(frozen=True)
class Parameter:
    """One number of a law.

    Attributes:
        name: as in the equation; N and D are in billions inside all laws, which only rescales A, B and the like.
        low, high: bounds of the value. start: range of the random starts, log-uniform (uniform if `signed`).
        relative: the range of starts is in units of the smallest observed loss.
        signed: may be negative; optimised as it is instead of as a logarithm.
        removable: may be held at 0, where its term is gone.
        column: the column of the data this parameter needs to vary ("" for the intercept).
    """

    name: str
    low: float
    high: float
    start: tuple[float, float]
    column: str = ""
    relative: bool = False
    signed: bool = False
    removable: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Points:
    """Where a law is evaluated; every array is (n,).

    Attributes:
        size_billions: parameters / 1e9. tokens_billions: training tokens / 1e9. share: of the training tokens, that of
            the corpus whose loss is predicted, 0 to 1. unique_billions: distinct tokens / 1e9. features: (n, 3), the
            domain's k1 (initial loss), k2 (its relative early decline), k3 (how much that decline slows).
    """

    size_billions: Array
    tokens_billions: Array
    share: Array
    unique_billions: Array | None = None
    features: Array | None = None

    @cached_property
    def ln_size(self) -> Array:
        """ln(N / 1e9), (n,)."""
        return np.log(self.size_billions)

    @cached_property
    def ln_tokens(self) -> Array:
        """ln(D / 1e9), (n,)."""
        return np.log(self.tokens_billions)

    @cached_property
    def ln_share(self) -> Array:
        """ln max(r, 1e-100), (n,)."""
        return np.log(np.maximum(self.share, 1e-100))

    def take(self, rows: Any) -> "Points":
        """A selection of rows (index array or mask)."""
        return Points(
            self.size_billions[rows],
            self.tokens_billions[rows],
            self.share[rows],
            None if self.unique_billions is None else self.unique_billions[rows],
            None if self.features is None else self.features[rows],
        )

    def __len__(self) -> int:
        return len(self.size_billions)


@dataclass(frozen=True)
class Theta:
    """A stack of parameter vectors with access by name; arrays come as (S, 1) to broadcast against (n,)."""

    form: "Form"
    vectors: Array  # (S, P), internal

    def log(self, name: str) -> Array:
        """ln of a positive parameter, (S, 1)."""
        return self.vectors[:, self.form.index[name], None]

    def __getitem__(self, name: str) -> Array:
        column = self.log(name)
        return column if self.form.parameters[self.form.index[name]].signed else np.exp(column)


@dataclass(frozen=True)
class Term:
    """sign * exp(log_value); `gradients`: d log_value / d theta by parameter name, each broadcastable to (S, n)."""

    log_value: Array  # (S, n) or (S, 1)
    gradients: Mapping[str, Array | float]
    sign: float = 1.0


@dataclass(frozen=True)
class Form:
    """A law: equation, where it holds, its parameters, and its terms.

    Attributes:
        needs: columns without which the law cannot be evaluated, of N, D, r, U, K.
        ratios: whether the law has a mixture ratio, so that the number of distinct ratios matters.
    """

    name: str
    title: str
    equation: str
    domain: str
    source: str
    parameters: tuple[Parameter, ...]
    needs: tuple[str, ...]
    terms: Callable[[Theta, Points], Sequence[Term]]

    @cached_property
    def index(self) -> dict[str, int]:
        """Parameter name -> position."""
        return {parameter.name: place for place, parameter in enumerate(self.parameters)}

    @property
    def ratios(self) -> bool:
        """Whether the law depends on the mixture ratio."""
        return "r" in self.needs

    @cached_property
    def signed(self) -> NDArray[np.bool_]:
        """Which parameters are not optimised as logarithms, (P,)."""
        return np.array([parameter.signed for parameter in self.parameters])

    def internal(self, values: Array) -> Array:
        """(..., P) natural values -> internal ones; 0 becomes minus infinity."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.signed, values, np.log(values))

    def natural(self, theta: Array) -> Array:
        """(..., P) internal values -> natural ones."""
        with np.errstate(over="ignore"):
            return np.where(self.signed, theta, np.exp(theta))

    def vector(self, values: Mapping[str, float]) -> Array:
        """(P,) internal vector from natural values by name."""
        return self.internal(np.array([values[parameter.name] for parameter in self.parameters], dtype=np.float64))

    def log_loss(
        self,
        theta: Array,  # (S, P), internal
        points: Points,
        *,
        jacobian: bool = False,
    ) -> tuple[Array, Array | None]:
        """ln L, (S, n), and its gradient, (S, P, n), at n points for S parameter vectors."""
        terms = list(self.terms(Theta(self, theta), points))
        shape = (len(theta), len(points))
        largest = np.full(shape, -np.inf)
        for term in terms:
            if term.sign > 0:
                largest = np.maximum(largest, term.log_value)
        shares = [term.sign * np.exp(np.minimum(term.log_value - largest, 50.0)) for term in terms]
        total = np.zeros(shape)
        for share in shares:
            total += share
        held = np.maximum(total, _LEAST_SUM)
        log_loss = largest + np.log(held) + np.minimum(total - held, 0.0) / _LEAST_SUM
        if not jacobian:
            return log_loss, None
        gradient = np.zeros((len(theta), len(self.parameters), len(points)))
        for term, share in zip(terms, shares, strict=True):
            relative = share / held
            for name, slope in term.gradients.items():
                gradient[:, self.index[name], :] += relative * slope
        return log_loss, gradient

    def loss(self, theta: Array, points: Points) -> Array:
        """L in nats, (S, n)."""
        return np.exp(self.log_loss(theta, points)[0])


def constant(theta: Theta, name: str = "E") -> Term:
    """The irreducible loss E."""
    return Term(theta.log(name), {name: 1.0})


def power(theta: Theta, amplitude: str, exponent: str, ln_x: Array) -> Term:
    """amplitude / x^exponent."""
    alpha = theta[exponent]
    return Term(theta.log(amplitude) - alpha * ln_x, {amplitude: 1.0, exponent: -alpha * ln_x})


INTERCEPT = Parameter(
    "E", 1e-3, 100.0, (0.3, 0.98), relative=True, removable=True, meaning="loss that no size, data or mixture removes"
)
SIZE_AMPLITUDE = Parameter("A", 1e-6, 1e4, (0.02, 2.0), "N", removable=True, meaning="weight of model size")
SIZE_EXPONENT = Parameter("alpha", 0.01, 5.0, (0.1, 1.0), "N", meaning="how fast size helps")
DATA_AMPLITUDE = Parameter("B", 1e-6, 1e4, (0.02, 2.0), "D", removable=True, meaning="weight of training tokens")
DATA_EXPONENT = Parameter("beta", 0.01, 5.0, (0.1, 1.0), "D", meaning="how fast tokens help")
