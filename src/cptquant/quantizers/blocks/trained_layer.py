"""A linear layer whose weight is quantized anew in every forward pass, so that training feels the grid.

What is trained is one of
- a *latent* weight, rounded on the way forward (quantization-aware training), with the steps beside it;
- the steps alone, with the integer codes fixed (EfficientQAT's second phase, arXiv 2407.11062, section 3.3).

Steps are learned as LSQ does (arXiv 1902.08153, section 3), through their logarithms: a step never changes sign or
vanishes, and a rate is a relative one. The forward pass uses them as they are stored, rounded to 16 bits (straight
through), so that what is written afterwards equals what was trained bit for bit.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from cptquant.packing.low_rank import RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, StoredWeight
from cptquant.quantizers.blocks.fake_quantize import fake_quantize, nearest_codes
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_grid import TrainedGrid, grouped, start_latent


@dataclass(frozen=True)
class Trains:
    """What of a layer's weight moves.

    Attributes:
        latent: the weight itself and, of a product of low rank beside the codes, the left factor.
        steps, zeros: of the grid, where its form lets them move.
        multipliers: steps move as multiples of what they were, not by their logarithms (QSLAW, arXiv 2408.03735).
    """

    latent: bool = True
    steps: bool = True
    zeros: bool = True
    multipliers: bool = False


class TrainedLinear(nn.Module):
    """Stands in for a linear layer or a Conv1D with a quantized weight.

    Args:
        stored: the weight that training starts from: the first forward pass gives exactly this.
        original: what it was rounded from, (out_features, in_features), any float dtype; None without a latent, which
            starts there where that rounds to the stored code, else at the nearer end of the code's cell.
        bias: (out_features,) or None.
        activation_bits: of the inputs, each token with a step of its own (symmetric); None leaves them as they are.

    Attributes:
        latent: float32 (rows, columns) in stored order, or None. log_steps: ln |s|, (rows or 1, groups), or None; of
        multipliers the ratio to the first step. zeros: float32, the same shape, or None.
        left: of a product of low rank, float32 (rows, rank), or None; its codes stay inside 8 bits, its scales and the
        right factor stay as they are.
    """

    steps: Tensor
    codes: Tensor
    fixed_zeros: Tensor | None
    offsets: Tensor | None
    order: Tensor | None
    code_momentum: Tensor

    def __init__(
        self,
        stored: StoredWeight,
        original: Tensor | None,
        bias: Tensor | None,
        trains: Trains,
        surrogate: Surrogate,
        *,
        activation_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid = TrainedGrid.of(stored)
        self._surrogate, self._activation_bits, self._multipliers = surrogate, activation_bits, trains.multipliers
        self.out_features, self.in_features = stored.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().float(), requires_grad=False)
        self.register_buffer("steps", grid.steps.clone())
        self.register_buffer("codes", None if trains.latent else grid.codes.clone())
        self.register_buffer("fixed_zeros", None if grid.zeros is None else grid.zeros.clone())
        self.register_buffer("offsets", grid.offsets)
        self.register_buffer("order", None if grid.order is None else torch.argsort(grid.order))
        self.low, self.high = grid.low, grid.high
        self.latent: nn.Parameter | None = None
        if trains.latent:
            assert original is not None
            self.latent = nn.Parameter(start_latent(grid, original))
        learns = trains.steps and grid.learns_steps
        start = torch.ones_like(grid.steps) if trains.multipliers else grid.steps.abs().log()
        self.log_steps = nn.Parameter(start) if learns else None
        movable = trains.zeros and grid.zeros is not None and grid.moves is None and grid.learns_steps
        self.zeros = nn.Parameter(cast(Tensor, grid.zeros).clone()) if movable else None
        self.moves_codes = False
        self._value_gradient: Tensor | None = None
        product = grid.correction if trains.latent else None
        self.left = nn.Parameter(product.columns()) if isinstance(product, LowRankCorrection) else None
        if isinstance(product, LowRankCorrection):
            self.register_buffer("right", product.right.double() / RIGHT_UNIT)
            self.register_buffer("product_scales", product.scales.float())
        self._steps_factor = 1 / math.sqrt(grid.width * max(1.0, float(torch.as_tensor(grid.high).max())))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 (out_features, in_features); differentiable."""
        grid = self.grid
        steps, zeros = self.present_steps(), self.present_zeros()
        if self.latent is not None:
            values = fake_quantize(
                self._grouped(self.latent), steps.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1),
                self.low, self.high, self._surrogate,
            )  # fmt: skip
            values = values.flatten(1)[:, : self.in_features]
        else:
            values = cast(Tensor, _FromCodes.apply(self.codes, steps, zeros, grid.width))
            if self.moves_codes and values.requires_grad:
                values.register_hook(self._add_value_gradient)
        if self.offsets is not None:
            values = values + self.offsets.repeat_interleave(grid.width, dim=1)[:, : self.in_features]
        values = grid.corrected(values) if self.left is None else values + self.present_product(self.left)
        return values if self.order is None else values.index_select(1, self.order)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self._activation_bits is not None:
            hidden = quantize_tokens(hidden, self._activation_bits)
        bias = self.bias if self.bias is None or self.bias.dtype == hidden.dtype else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)

    def stored(self) -> StoredWeight:
        """The present weight in its stored form; `dequantize()` of it equals `weight` bit for bit."""
        with torch.no_grad():
            steps, zeros = self.present_steps(), self.present_zeros()
            codes = self.codes if self.latent is None else self._codes(steps, zeros)
            stored_zeros = None if zeros is None or self.grid.moves is not None else zeros.to(torch.int8)
            found = self.grid.rebuild(codes, steps, stored_zeros)
            if self.left is None:
                return found
            assert isinstance(found, CorrectedWeight) and isinstance(found.correction, LowRankCorrection)
            left = self._left_codes(self.left).to(torch.int8)
            return replace(found, correction=replace(found.correction, left=left))

    def latent_unit(self) -> Tensor:
        """|s| of every latent weight, broadcastable against it."""
        return self.spread(self.present_steps().detach().abs())

    def left_unit(self) -> Tensor:
        """The mean |s| of the grid, beside which changes of the left factor are told."""
        return self.present_steps().detach().abs().mean()

    def present_product(self, left: Tensor) -> Tensor:
        """float32 (rows, columns), the left factor rounded to its codes (straight through); summed as it is stored."""
        rounded = replaced(left, self._left_codes(left) * self.get_buffer("product_scales"))
        return (rounded.double() @ self.get_buffer("right")).float()

    def _left_codes(self, left: Tensor) -> Tensor:
        """Whole numbers of 8 bits, float32 (rows, rank)."""
        return (left.detach() / self.get_buffer("product_scales")).round_().clamp_(-128, 127)

    def follow_codes(self) -> None:
        """From now on codes may be changed from outside, and the gradient of the weight is kept for that."""
        self.moves_codes = True
        self.register_buffer("code_momentum", torch.zeros(self.codes.shape), persistent=False)

    def take_value_gradient(self) -> Tensor:
        """dL/dweight since it was last taken, float32 (rows, columns) in stored order; zeros where there is none."""
        found, self._value_gradient = self._value_gradient, None
        return torch.zeros(self.codes.shape, device=self.codes.device) if found is None else found

    def spread(self, per_group: Tensor) -> Tensor:
        """(rows or 1, groups) -> broadcastable against (rows, columns)."""
        return per_group.repeat_interleave(self.grid.width, dim=1)[:, : self.in_features]

    def limits(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code, broadcastable against (rows, columns)."""
        low, high = (torch.as_tensor(limit, device=self.codes.device) for limit in (self.low, self.high))
        return (low, high) if low.ndim == 0 else (self.spread(low[:, :, 0]), self.spread(high[:, :, 0]))

    def _add_value_gradient(self, gradient: Tensor) -> None:
        self._value_gradient = gradient.clone() if self._value_gradient is None else self._value_gradient + gradient

    def present_steps(self) -> Tensor:
        """float32 (rows or 1, groups), rounded as they are stored (straight through)."""
        if self.log_steps is None:
            return self.steps
        moved = replaced(self.log_steps, self.log_steps.detach(), self._steps_factor)  # LSQ's gradient factor
        steps = self.steps * moved if self._multipliers else torch.copysign(moved.exp(), self.steps)
        assert self.grid.step_dtype is not None
        steps = as_stored(steps, self.grid.step_dtype, self.steps)
        return steps if self.grid.moves is None else torch.where(self.grid.moves, steps, self.steps)

    def present_zeros(self) -> Tensor | None:
        """float32, whole codes inside the limits (straight through); fractions in one-bit groups."""
        if self.zeros is None:
            return self.fixed_zeros
        return replaced(self.zeros, self.zeros.detach().round().clamp_(float(self.low), float(self.high)))

    def _codes(self, steps: Tensor, zeros: Tensor | None) -> Tensor:
        """int8 (rows, columns), as the forward pass has them."""
        codes = nearest_codes(
            self._grouped(cast(Tensor, self.latent)), steps.unsqueeze(-1),
            None if zeros is None else zeros.unsqueeze(-1), self.low, self.high,
        )  # fmt: skip
        return codes.flatten(1)[:, : self.in_features].to(torch.int8).contiguous()

    def _grouped(self, latent: Tensor) -> Tensor:
        return grouped(latent, self.grid)


class _FromCodes(torch.autograd.Function):
    """(q - z) s of fixed codes; keeps the int8 codes for the way back, not a float matrix."""

    @staticmethod
    def forward(ctx: FunctionCtx, codes: Tensor, steps: Tensor, zeros: Tensor | None, width: int) -> Tensor:
        """float32 (rows, columns)."""
        context = cast(Any, ctx)
        context.save_for_backward(codes, steps, zeros)
        context.width = width
        return _spread_product(codes, steps, zeros, width)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> tuple[Tensor | None, ...]:
        """dL/ds = sum over the group of g (q - z); dL/dz = - s times the sum of g."""
        context, gradient = cast(Any, ctx), cast(Tensor, gradients[0])
        codes, steps, zeros = context.saved_tensors
        by_steps = by_zeros = None
        if context.needs_input_grad[1]:
            distances = _spread_product(codes, torch.ones_like(steps), zeros, context.width)
            by_steps = _sum_groups(distances.mul_(gradient), steps, context.width)
        if zeros is not None and context.needs_input_grad[2]:
            by_zeros = -steps * _sum_groups(gradient, steps, context.width)
        return None, by_steps, by_zeros, None


def _spread_product(codes: Tensor, steps: Tensor, zeros: Tensor | None, width: int) -> Tensor:
    rows, columns = codes.shape
    groups = steps.shape[1]
    values = codes.float()
    if groups * width == columns:
        values = values.view(rows, groups, width)
        if zeros is not None:
            values -= zeros.unsqueeze(-1)
        return values.mul_(steps.unsqueeze(-1)).view(rows, columns)
    if zeros is not None:
        values -= zeros.repeat_interleave(width, dim=1)[:, :columns]
    return values.mul_(steps.repeat_interleave(width, dim=1)[:, :columns])


def _sum_groups(values: Tensor, steps: Tensor, width: int) -> Tensor:
    """(rows, columns) -> sums of each group, shape of `steps`."""
    groups = steps.shape[1]
    short = groups * width - values.shape[1]
    if short > 0:
        values = nn.functional.pad(values, (0, short))
    return values.view(len(values), groups, width).sum(dim=2).sum_to_size(steps.shape)


def quantize_tokens(
    hidden: Tensor,  # (..., width)
    bits: int,
) -> Tensor:
    """Inputs in codes of so many bits, symmetric, one step a token; rounding is passed straight through."""
    top = 2.0 ** (bits - 1) - 1
    step = hidden.detach().abs().amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(hidden.dtype).tiny) / top
    rounded = (hidden.detach() / step).round_().mul_(step)
    return hidden + (rounded - hidden.detach())


class _Through(torch.autograd.Function):
    """Other values on the way forward; on the way back the gradient times a factor."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, replaced: Tensor, factor: float) -> Tensor:
        """`replaced`."""
        cast(Any, ctx).factor = factor
        return replaced.view_as(replaced)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> tuple[Tensor | None, ...]:
        """To `values` alone."""
        gradient, factor = cast(Tensor, gradients[0]), cast(Any, ctx).factor
        return gradient if factor == 1 else gradient * factor, None, None


def replaced(values: Tensor, by: Tensor, factor: float = 1.0) -> Tensor:
    """`by` on the way forward; on the way back the gradient times a factor goes to `values`."""
    return cast(Tensor, _Through.apply(values, by, factor))


def as_stored(steps: Tensor, dtype: torch.dtype, before: Tensor) -> Tensor:
    """Steps rounded to 16 bits, straight through; what would not be finite or would vanish stays as it was."""
    stored = steps.detach().to(dtype).float()
    return replaced(steps, torch.where(torch.isfinite(stored) & (stored != 0), stored, before))
