"""What stands in for the slope of rounding and clamping on the way back (after arXiv 2410.10849).

Rounding has slope 0 almost everywhere, clamping has slope 0 outside its limits. Training needs something else:

    rounding "ste"       slope 1 (straight-through estimator)
             "sigmoid"   slope of a smooth stair r_T: around every threshold k + 1/2 two logistic curves of sharpness T
    clamp    "hard"      slope 1 inside the limits, 0 outside
             "soft"      slope of f(x) = x g(x-a) g(b-x) + a g(a-x) + b g(x-b), g a gate: Phi(t) or sig(beta t)

The paper's formula of the sigmoid estimator is known only from a summary whose operators were lost. Read literally it
jumps by 1 - tanh(T/2) at every threshold and its slopes add up to tanh(T/2) from one integer to the next. We divide by
tanh(T/2), which makes it continuous with a mean slope of exactly 1, so that T changes the gradient's form, not its size
(`normalised`; False is the literal reading). With d = x - round(x), A = cosh(T d), C = cosh(T/2):

    r_T(x)  = round(x) + sinh(T d) / (A + C) / tanh(T/2)
    r_T'(x) = T (P - tanh(T/2)^2 P^2) / tanh(T/2),        P = C / (A + C)

one exponential instead of two logistic curves. The slope is larger at a threshold than at an integer only for T > 3.06.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cptquant.core.errors import UserError

ROUNDINGS = ("ste", "sigmoid")
CLAMPS = ("hard", "soft")
GATES = ("phi", "sigmoid")
Limit = float | Tensor
"""A code limit: one number, or a tensor that broadcasts against the codes."""

_STEEP = 75.0
"""From this sharpness on the smaller exponential of cosh is below float64's resolution, and the larger may overflow."""


@dataclass(frozen=True)
class Surrogate:
    """What stands in for the slope of rounding and clamping on the way back (arXiv 2410.10849).

    Attributes:
        rounding: "ste", slope 1, or "sigmoid", the slope of a smooth stair.
        sharpness: T of the sigmoid, > 0; 4 is almost "ste", 4 to 8 is the useful range.
        normalised: the stair's mean slope is 1; False: tanh(T/2), as the formula is printed.
        clamp: "hard", slope 1 inside the limits and 0 outside, or "soft".
        gate: of the soft clamp: "phi", the normal distribution's (GELU), or "sigmoid" (Swish).
        beta: steepness of the sigmoid gate, > 0.
        soft_forward: the soft clamp is in the forward pass too. For training only: at 2 to 4 bits it chooses
            other codes for up to a sixth of the weights inside the limits: its loss is not that of what is deployed.

    Raises:
        UserError: a value that is not allowed; the text names the flag.
    """

    rounding: str = "ste"
    sharpness: float = 4.0
    normalised: bool = True
    clamp: str = "hard"
    gate: str = "sigmoid"
    beta: float = 4.0
    soft_forward: bool = False

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--rounding", self.rounding, ROUNDINGS),
            ("--clamp", self.clamp, CLAMPS),
            ("--gate", self.gate, GATES),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value!r} is not known; use one of {', '.join(allowed)}")
        for flag, number, use in (
            ("--sharpness", self.sharpness, "4 to 8 is the useful range"),
            ("--gate-beta", self.beta, "1 is Swish, 4 changes the fewest codes"),
        ):
            if not (math.isfinite(number) and number > 0):
                raise UserError(f"{flag} {number:g} is not a finite number above 0; {use}")
        if self.soft_forward and self.clamp != "soft":
            raise UserError(
                f"the soft forward pass is the soft clamp's, but --clamp is {self.clamp!r}; "
                "use --clamp soft, or leave the soft forward pass out"
            )


class ClampSlopes(NamedTuple):
    """Partial derivatives of the soft clamp f(x; a, b), each of x's shape."""

    x: Tensor
    low: Tensor
    high: Tensor


def rounded_surrogate(x: Tensor, surrogate: Surrogate) -> Tensor:
    """The function whose slope stands in for rounding's: x for "ste", the stair r_T for "sigmoid".

    Args:
        x: floats of any shape, in units of codes. surrogate: `rounding`, `sharpness` and `normalised` are used.

    Returns:
        Of x's shape and dtype, differentiable by autograd. At an integer it is that integer.
    """
    if surrogate.rounding == "ste":
        return x.clone()
    sharpness = surrogate.sharpness
    nearest = x.detach().round()
    distance = x - nearest
    # sinh(T d) / (A + C), in a form that does not overflow.
    rise = 0.5 * (torch.tanh(sharpness * (distance + 0.5) / 2) + torch.tanh(sharpness * (distance - 0.5) / 2))
    return nearest + (rise / math.tanh(sharpness / 2) if surrogate.normalised else rise)


@torch.no_grad()
def round_slope(x: Tensor, surrogate: Surrogate) -> Tensor:
    """Slope of `rounded_surrogate` at x, in closed form; of x's shape and dtype, without gradient."""
    if surrogate.rounding == "ste":
        return torch.ones_like(x)
    return slope_of_distance_(x - x.round(), surrogate)


def slope_of_distance_(distance: Tensor, surrogate: Surrogate) -> Tensor:
    """`round_slope` of "sigmoid", in place: `distance` = x - round(x) is overwritten by r_T'(x) and returned."""
    sharpness = surrogate.sharpness
    if sharpness > _STEEP:
        ratio = distance.abs_().sub_(0.5).mul_(sharpness).exp_()  # A / C
    else:
        ratio = distance.mul_(sharpness).exp_()
        ratio = ratio.add_(ratio.reciprocal()).mul_(0.5 / math.cosh(sharpness / 2))
    share = ratio.add_(1.0).reciprocal_()  # P
    mass = math.tanh(sharpness / 2)
    size = sharpness / mass if surrogate.normalised else sharpness
    return share.mul_(torch.mul(share, -size * mass * mass).add_(size))


def gate_value(t: Tensor, surrogate: Surrogate) -> Tensor:
    """The gate g(t), from 0 to 1, with g(-t) = 1 - g(t): Phi(t), or the logistic function of beta t."""
    return torch.special.ndtr(t) if surrogate.gate == "phi" else torch.sigmoid(surrogate.beta * t)


def gate_slope(t: Tensor, surrogate: Surrogate) -> Tensor:
    """g'(t), an even function."""
    if surrogate.gate == "phi":
        return torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    value = torch.sigmoid(surrogate.beta * t)
    return surrogate.beta * value * (1 - value)


def soft_clamp(x: Tensor, low: Limit, high: Limit, surrogate: Surrogate) -> Tensor:
    """f(x) = x g(x-a) g(b-x) + a g(a-x) + b g(x-b), a clamp with a GELU or Swish in place of either ReLU.

    Not monotone: it overshoots a limit by at most 0.170 (phi), 0.278 (sigmoid, beta 1), 0.070 (beta 4). At 2 bits the
    two ends overlap, and f depends on where the codes lie, not on their number alone.

    Args:
        x: floats of any shape, in units of codes. low, high: a and b, a < b.
        surrogate: `gate` and `beta` are used, whatever `clamp` says.

    Returns:
        Of x's shape and dtype, differentiable by autograd in x, low and high.
    """
    above, below = gate_value(x - low, surrogate), gate_value(high - x, surrogate)
    return x * above * below + low * (1 - above) + high * (1 - below)


@torch.no_grad()
def soft_clamp_slopes(x: Tensor, low: Limit, high: Limit, surrogate: Surrogate) -> ClampSlopes:
    """The three slopes of `soft_clamp` at x, in closed form, without gradient.

    With p = g(x-a), m = g(b-x): df/da = 1 - p - p'(x m - a), df/db = 1 - m - m'(b - x p), and all three add up to
    1 + (1-p)(1-m), nearly 1 for limits far apart.
    """
    above, below = gate_value(x - low, surrogate), gate_value(high - x, surrogate)
    from_low = gate_slope(x - low, surrogate) * (x * below - low)
    from_high = gate_slope(high - x, surrogate) * (high - x * above)
    return ClampSlopes(above * below + from_low + from_high, 1 - above - from_low, 1 - below - from_high)
