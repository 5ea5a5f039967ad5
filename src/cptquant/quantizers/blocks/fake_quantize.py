"""Rounding to a grid and back in one step of autograd, with a surrogate's slopes on the way back.

Forward, x = w/s + z, and with hard rounding (ties to even) and, by default, hard clamping

    q = clip(round(x), low, high)                 value = (q - z) s

in the order of operations of `QuantizedWeight.dequantize`, so that what is trained is what is exported. Backward, with
k = r'(c) f'(x), r the surrogate of rounding, f that of clamping:

    d value / d w = k            d value / d s = q - z - (w/s) k            d value / d z = s (k - 1)

f' is taken at x. r' is taken at what is rounded: c = clip(x) where the forward pass clamps hard, c = f(x) where it
clamps softly. Its peaks then lie on the thresholds that the forward pass has; r'(f(x)) under a hard forward pass would
put them beside. Gradients are exact for the composite s (r(c) - z), up to that choice.

On a CPU rows are worked through in blocks of 256 KiB, which keeps the temporaries small and in the cache. Nothing but
the arguments is kept for the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cptquant.quantizers.blocks.clamp_gradient import through_clamp
from cptquant.quantizers.blocks.surrogates import Limit, Surrogate, slope_of_distance_, soft_clamp

_BLOCK_ELEMENTS = 1 << 16


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, low: Limit, high: Limit, surrogate: Surrogate
) -> Tensor:
    """s (q - z), q = clip(round(w / s + z), low, high), with gradients for weight, scale and zero.

    Args:
        weight: (rows, groups, width) float, latent. Below float32 it is worked on in float32.
        scale: (rows or 1, groups or 1, 1), not zero, may be negative.
        zero: of the scale's shape, in codes; None for 0. Taken as continuous: round it before (straight through).
        low, high: code limits, whole numbers; or tensors that broadcast against the weight. They get no gradient.
        surrogate: the slopes, and whether the forward pass clamps softly.

    Returns:
        Of the weight's shape and dtype. Differentiable once.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes(weight, scale, zero)
    value = _FakeQuantize.apply(weight, scale, zero, (low, high), surrogate)
    assert isinstance(value, Tensor)
    return value


@torch.no_grad()
def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, low: Limit, high: Limit) -> Tensor:
    """The codes clip(round(w / s + z), low, high) of the hard forward pass, as floats of the weight's shape.

    Arguments as in `fake_quantize`. Exact integers in float32 or wider, whatever the weight's dtype.
    """
    _check_shapes(weight, scale, zero)
    codes = torch.empty_like(weight, dtype=_working_dtype(weight, scale))
    for block in _row_blocks(weight, scale, zero, (low, high)):
        codes[block.rows] = block.clip_(block.positions().round_())
    return codes


def _check_shapes(weight: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    if weight.ndim != 3:
        raise ValueError(f"the weight is (rows, groups, width), got {tuple(weight.shape)}")
    rows, groups, _ = weight.shape
    fits = scale.ndim == 3 and scale.shape[0] in (1, rows) and scale.shape[1] in (1, groups) and scale.shape[2] == 1
    if not fits:
        raise ValueError(f"the scale is ({rows} or 1, {groups} or 1, 1), got {tuple(scale.shape)}")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"the zero has the scale's shape {tuple(scale.shape)}, got {tuple(zero.shape)}")


def _working_dtype(weight: Tensor, scale: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(weight.dtype, scale.dtype), torch.float32)


@dataclass(frozen=True)
class _Block:
    """Some rows of everything, in the working dtype."""

    rows: slice
    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    low: Limit
    high: Limit

    def positions(self) -> Tensor:
        """x = w/s + z, in a tensor of its own."""
        x = self.weight / self.scale
        return x if self.zero is None else x.add_(self.zero)

    def clip_(self, x: Tensor) -> Tensor:
        """x, clamped in place to the limits: two numbers or two tensors."""
        return x.clamp_(self.low, self.high)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def rounded_positions(self, surrogate: Surrogate) -> Tensor:
        """What the forward pass rounds, up to a hard clamp: x, or f(x)."""
        x = self.positions()
        return soft_clamp(x, self.low, self.high, surrogate) if surrogate.soft_forward else x

    def step_back(self, incoming: Tensor, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        """The gradient times k = r'(c) f'(x), and q - z; tensors of their own."""
        x = self.positions()
        outgoing = through_clamp(incoming, x, self.low, self.high, surrogate)
        if surrogate.soft_forward:
            x = soft_clamp(x, self.low, self.high, surrogate)
        else:
            x = self.clip_(x)
        codes = x.round()
        if surrogate.rounding == "sigmoid":
            outgoing.mul_(slope_of_distance_(x.sub_(codes), surrogate))
        if surrogate.soft_forward:
            self.clip_(codes)
        return outgoing, codes if self.zero is None else codes.sub_(self.zero)


def _of_one_kind(limits: tuple[Limit, Limit], device: torch.device) -> tuple[Limit, Limit]:
    """Two numbers or two tensors: torch clamps to either, but not to one of each."""
    if not any(isinstance(limit, Tensor) for limit in limits):
        return limits
    low, high = (torch.as_tensor(limit, device=device) for limit in limits)
    return low, high


def _row_blocks(weight: Tensor, scale: Tensor, zero: Tensor | None, limits: tuple[Limit, Limit]) -> Iterator[_Block]:
    dtype = _working_dtype(weight, scale)
    rows = weight.shape[0]
    limits = _of_one_kind(limits, weight.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight[0].numel())) if weight.device.type == "cpu" and rows else rows
    for start in range(0, rows, step or 1):
        part = slice(start, min(start + step, rows))

        def cut(tensor: Tensor, part: slice = part) -> Tensor:
            if tensor.ndim == 3 and tensor.shape[0] != 1:
                tensor = tensor[part]
            return tensor.to(dtype)

        low, high = (cut(limit) if isinstance(limit, Tensor) else float(limit) for limit in limits)
        yield _Block(part, cut(weight), cut(scale), None if zero is None else cut(zero), low, high)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        limits: tuple[Limit, Limit],
        surrogate: Surrogate,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.limits, ctx.surrogate = limits, surrogate
        value = torch.empty_like(weight)
        for block in _row_blocks(weight, scale, zero, limits):
            codes = block.clip_(block.rounded_positions(surrogate).round_())
            if block.zero is not None:
                codes.sub_(block.zero)
            torch.mul(codes, block.scale, out=value[block.rows])
        return value

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, scale, zero = ctx.saved_tensors
        needs_weight, needs_scale, needs_zero = ctx.needs_input_grad[:3]
        for_weight = torch.empty_like(weight) if needs_weight else None
        sums = weight.new_empty((2, *weight.shape[:2], 1), dtype=_working_dtype(weight, scale))
        for block in _row_blocks(weight, scale, zero, ctx.limits):
            incoming = gradient[block.rows].to(sums.dtype)
            outgoing, codes = block.step_back(incoming, ctx.surrogate)
            if for_weight is not None:
                for_weight[block.rows] = outgoing
            if needs_zero:
                part = torch.sum(outgoing, -1, keepdim=True).sub_(incoming.sum(-1, keepdim=True))
                torch.mul(part, block.scale, out=sums[1, block.rows])
            if needs_scale:
                through_codes = codes.mul_(incoming).sum(-1, keepdim=True)
                through_weight = outgoing.mul_(block.weight).sum(-1, keepdim=True)
                torch.sub(through_codes, through_weight.div_(block.scale), out=sums[0, block.rows])
        for_scale = sums[0].sum_to_size(scale.shape).to(scale.dtype) if needs_scale else None
        for_zero = sums[1].sum_to_size(scale.shape).to(zero.dtype) if needs_zero else None
        return for_weight, for_scale, for_zero, None, None
