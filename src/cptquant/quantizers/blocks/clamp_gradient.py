"""A gradient through the clamp, by the shortest closed form that holds for the limits at hand.

The derivative of the soft clamp f (`surrogates.soft_clamp_slopes` is the readable form; a = low, b = high):

    far apart       Only the nearer limit is felt: f'(x) = h'(t), t = min(x - a, b - x), h(t) = t g(t), which is GELU
                    or SiLU, whose derivative torch has as one operation. Used where the other gate is shut to rounding.
    sigmoid gate    With V = exp(-beta (x-a)), W = exp(beta (x-b)), K = exp(-beta (b-a)) = V W, G = 1/(1 + K + V + W),
                    both gates' product: f' = G + beta G^2 [V (x - a + K b) + W (b - x - K a) + 2 K (b-a)]. Two
                    exponentials, and no difference of large numbers.
    phi gate        As it stands: two error functions, two exponentials.
"""

import math

import torch
from torch import Tensor

from cptquant.quantizers.blocks.surrogates import Limit, Surrogate

_LARGEST_EXPONENT = 60.0
_SHUT = {torch.float32: 25.0, torch.float64: 60.0}
"""A gate is shut at half the distance of the limits where its own value there is below exp(-this)."""


def through_clamp(gradient: Tensor, x: Tensor, low: Limit, high: Limit, surrogate: Surrogate) -> Tensor:
    """gradient * f'(x), f the clamp of the surrogate; a new tensor.

    Args:
        gradient, x: float32 or float64 of one shape; x in units of codes.
        low, high: numbers, or tensors that broadcast against x.
        surrogate: `clamp`, `gate` and `beta` are used. "hard": slope 1 at the limits themselves, as torch.clamp.
    """
    numbers = None if isinstance(low, Tensor) or isinstance(high, Tensor) else (low, high)
    if surrogate.clamp == "hard":
        if numbers is None:
            return x.clamp(torch.as_tensor(low), torch.as_tensor(high)).eq_(x).mul_(gradient)
        return torch.ops.aten.hardtanh_backward(gradient, x, *_just_outside(*numbers, x.dtype))
    if numbers is not None and _far_apart(*numbers, x.dtype, surrogate):
        return _through_nearer_limit(gradient, x, *numbers, surrogate)
    slope = _phi_slope(x, low, high) if surrogate.gate == "phi" else _sigmoid_slope(x, low, high, surrogate.beta)
    return slope.mul_(gradient)


def _just_outside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The next numbers of the dtype outside the limits: hardtanh's own gradient is 0 at its limits."""
    ends = torch.tensor([low, high], dtype=dtype)
    lower, upper = torch.nextafter(ends, torch.tensor([-math.inf, math.inf], dtype=dtype)).tolist()
    return lower, upper


def _far_apart(low: float, high: float, dtype: torch.dtype, surrogate: Surrogate) -> bool:
    half = (high - low) / 2
    return (half * half / 2 if surrogate.gate == "phi" else surrogate.beta * half) > _SHUT[dtype]


def _through_nearer_limit(gradient: Tensor, x: Tensor, low: float, high: float, surrogate: Surrogate) -> Tensor:
    inwards = torch.sub(x, (low + high) / 2).abs_().neg_().add_((high - low) / 2)
    if surrogate.gate == "phi":
        return torch.ops.aten.gelu_backward(gradient, inwards)
    return torch.ops.aten.silu_backward(gradient, inwards.mul_(surrogate.beta))


def _exp(exponent: Limit) -> Limit:
    return torch.exp(exponent) if isinstance(exponent, Tensor) else math.exp(exponent)


def _sigmoid_slope(x: Tensor, low: Limit, high: Limit, beta: float) -> Tensor:
    reach = _LARGEST_EXPONENT / beta
    x = x.clamp(low - reach, high + reach)  # pyright: ignore[reportArgumentType, reportCallIssue]
    both = _exp(-beta * (high - low))
    below = torch.mul(x, -beta).add_(beta * low).exp_()
    above = torch.mul(x, beta).sub_(beta * high).exp_()
    product = torch.add(below, above).add_(1 + both).reciprocal_()
    pull = below.mul_(torch.sub(x, low - both * high)).add_(above.mul_(x.neg_().add_(high - both * low)))
    pull.add_(2 * both * (high - low)).mul_(product)
    return pull.mul_(beta).add_(1).mul_(product)


def _phi_slope(x: Tensor, low: Limit, high: Limit) -> Tensor:
    from_low, from_high = (x - low).mul_(math.sqrt(0.5)), (high - x).mul_(math.sqrt(0.5))
    above, below = torch.erf(from_low).add_(1).mul_(0.5), torch.erf(from_high).add_(1).mul_(0.5)
    low_density = from_low.square_().neg_().exp_().mul_(torch.mul(x, below).sub_(low))
    high_density = from_high.square_().neg_().exp_().mul_(torch.mul(x, above).sub_(high))
    return above.mul_(below).add_(low_density.sub_(high_density), alpha=1 / math.sqrt(2 * math.pi))
