"""Learned weight clipping, block by block: OmniQuant's LWC (arXiv 2308.13137, equation 2) and so SliM-LLM+'s.

    w_max' = sig(gamma) w_max,   w_min' = sig(beta) w_min,   one pair a row and group, gamma = beta = 4 at the start
    s = (w_max' - w_min') / (2^b - 1),   z = -round(w_min' / s),   W_q = s (clamp(round(W/s) + z) - z)

trained on ||F_q(x_q) - F(x)||^2 and, as an option that SliM-LLM+ (arXiv 2405.14917) takes for LLaMA,
||F_q(x_q) - F(x_q)||^2 besides: the original block on the quantized stream. Widths of groups stay as in the bit map.

The weights that are rounded are the original's: the start's codes are NOT kept, only its widths, signs of steps, and
order of columns. A GPTQ start, whose codes make up for each other's errors, is therefore often hard to beat; the
start's own weights stay wherever they are better on held-out text.

What we changed. Gamma and beta begin where the start's own grid clips, at 4 at most; at 2 bits a GPTQ start's steps are
little more than half of those at 4, which is epochs away (`first` 4.0 is the published beginning). A symmetric group
has one gamma: its step is sig(gamma) times the least step that clips nothing, of the sign that the start's step has (a
negative step turns the grid over, so that the lone far level lies above). One-bit groups keep their levels, and their
weights are rounded to those. Steps are used as stored, in 16 bits (straight through). Adam's rate falls
along a cosine and is .1: in one epoch of 112 sequences 1e-2, the published one, hardly moves a clip.
"""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from cptquant.core.errors import UserError
from cptquant.core.layout import Site
from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_training import Pace, Targets, relative_error
from cptquant.quantizers.blocks.fake_quantize import fake_quantize, nearest_codes
from cptquant.quantizers.blocks.open_block import Group, Moving, OpenBlock
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_grid import TrainedGrid, grouped, in_stored_order
from cptquant.quantizers.blocks.trained_layer import as_stored, replaced

PUBLISHED_FIRST = 4.0
"""Of gamma and beta: sig(4) = .982."""
_SMALLEST_SHARE = 0.02


@dataclass(frozen=True)
class LearnedClipping:
    """Hyper-parameters.

    Attributes:
        pace: epochs, batches, looks.
        rate: Adam's, of gamma and beta.
        first: where both begin; None: where the start's grid clips.
        alike: weight of the second loss; 0 leaves it out.
    """

    pace: Pace = field(default_factory=lambda: Pace(epochs=4.0))
    rate: float = 0.1
    first: float | None = None
    alike: float = 0.0

    flag = "clipping"

    @property
    def wants_alike(self) -> bool:
        """For the second loss."""
        return self.alike > 0

    def check(self, site: Site, stored: StoredWeight) -> None:
        """Refuse forms without steps of their own.

        Raises:
            UserError: GGUF's blocks.
        """
        if isinstance(stored, BlockWeight):
            raise UserError(
                f"--method clipping learns the steps of groups, and those of {stored.format.name} ({site.name}) are "
                "products of stored parts; use --method blockwise or qat, or a plan for another target than gguf"
            )

    def open_(self, block: OpenBlock) -> Moving:
        """Layers that round the original's weight under learned clips."""
        layers: dict[str, ClippedLinear] = {}
        for site in block.trained_sites:
            layer = ClippedLinear(block.starts[site.name], block.originals[site.name], block.bias(site), self.first)
            block.replace_(site, layer)
            layers[site.name] = layer
        clips = [clip for layer in layers.values() for clip in layer.clips()]
        return Moving(layers, {}, [Group(clips, self.rate)] if clips else [], block.storage_dtype)

    def loss(self, output: Tensor, targets: Targets) -> Tensor:
        """One or both squared errors, each relative to its target."""
        loss = relative_error(output, targets.followed, targets.mask)
        if targets.alike is not None:
            loss = loss + self.alike * relative_error(output, targets.alike, targets.mask)
        return loss


class ClippedLinear(nn.Module):
    """Stands in for a linear layer or a Conv1D whose weight is rounded anew under learned clips.

    Args:
        stored: gives format, widths, signs of steps, levels of one-bit groups; its codes are not used.
        original: (out_features, in_features), any float dtype. bias: (out_features,) or None.
        first: of gamma and beta; None: where the grid of `stored` clips.

    Attributes:
        gamma: (rows or 1, groups), of the largest weight, or of the largest magnitude where the grid is symmetric.
        beta: the same shape, of the smallest weight; None where the grid is symmetric.
    """

    def __init__(self, stored: StoredWeight, original: Tensor, bias: Tensor | None, first: float | None = None) -> None:
        super().__init__()
        self.grid = grid = TrainedGrid.of(stored)
        assert grid.step_dtype is not None
        self._step_dtype, self._columns = grid.step_dtype, stored.shape[1]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().float(), requires_grad=False)
        self.register_buffer("values", grouped(in_stored_order(original, grid), grid))
        self.register_buffer("back", None if grid.order is None else torch.argsort(grid.order))
        self._symmetric = grid.zeros is None or grid.moves is not None
        largest, smallest = _extremes(cast(Tensor, self.values), grid)
        self.register_buffer("largest", largest)
        self.register_buffer("smallest", smallest)
        top, bottom = _ends(grid)
        self.gamma = nn.Parameter(_first(top, largest, first))
        self.beta = None if self._symmetric else nn.Parameter(_first(bottom, smallest, first))

    def clips(self) -> list[nn.Parameter]:
        """What is learned."""
        return [self.gamma] if self.beta is None else [self.gamma, self.beta]

    def present_grid(self) -> tuple[Tensor, Tensor | None]:
        """Steps and zeros (rows or 1, groups), as they are stored (straight through)."""
        grid, top = self.grid, cast(Tensor, self.largest) * torch.sigmoid(self.gamma)
        if self.beta is None:
            steps = as_stored(torch.copysign(top, grid.steps), self._step_dtype, grid.steps)
            return (steps if grid.moves is None else torch.where(grid.moves, steps, grid.steps)), grid.zeros
        bottom = cast(Tensor, self.smallest) * torch.sigmoid(self.beta)
        low, high = float(grid.low), float(grid.high)
        steps = as_stored((top - bottom) / (high - low), self._step_dtype, grid.steps)
        zeros = low - bottom / steps
        return steps, replaced(zeros, zeros.detach().round().clamp_(low, high))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 (out_features, in_features); differentiable."""
        steps, zeros = self.present_grid()
        values = fake_quantize(
            cast(Tensor, self.values), steps.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1),
            self.grid.low, self.grid.high, Surrogate(),
        ).flatten(1)[:, : self._columns]  # fmt: skip
        values = self.grid.corrected(values)
        return values if self.back is None else values.index_select(1, cast(Tensor, self.back))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        bias = self.bias if self.bias is None else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)

    @torch.no_grad()
    def stored(self) -> StoredWeight:
        """The present weight in its stored form; `dequantize()` of it equals `weight` bit for bit."""
        steps, zeros = self.present_grid()
        codes = nearest_codes(
            cast(Tensor, self.values), steps.unsqueeze(-1), None if zeros is None else zeros.unsqueeze(-1),
            self.grid.low, self.grid.high,
        ).flatten(1)[:, : self._columns]  # fmt: skip
        stored_zeros = None if zeros is None or self._symmetric else zeros.to(torch.int8)
        return self.grid.rebuild(codes.to(torch.int8).contiguous(), steps, stored_zeros)


def _extremes(
    values: Tensor,  # (rows, groups, width)
    grid: TrainedGrid,
) -> tuple[Tensor, Tensor]:
    """What gamma and beta multiply, shape of `grid.steps`.

    Asymmetric: largest and smallest weight, 0 among them. Symmetric: the least magnitude of a step of the grid's sign
    that clips nothing, and nothing.
    """
    over = (0, 1, 2) if grid.steps.numel() == 1 else (2,)
    largest = values.amax(dim=over).clamp_(min=0).view_as(grid.steps)
    smallest = values.amin(dim=over).clamp_(max=0).view_as(grid.steps)
    if grid.zeros is not None and grid.moves is None:
        return largest, smallest
    below, above = (_per_group(limit, grid) for limit in (grid.low, grid.high))
    upright = torch.maximum(largest / above, smallest / below)
    turned = torch.maximum(largest / -below, smallest / -above)
    return torch.where(grid.steps < 0, turned, upright), torch.zeros_like(smallest)


def _ends(grid: TrainedGrid) -> tuple[Tensor, Tensor]:
    """What `_extremes` would give for weights that the grid just holds."""
    if grid.zeros is None or grid.moves is not None:
        return grid.steps.abs(), torch.zeros_like(grid.steps)
    return (grid.high - grid.zeros) * grid.steps, (grid.low - grid.zeros) * grid.steps


def _first(end: Tensor, extreme: Tensor, first: float | None) -> Tensor:
    """The gamma with sig(gamma) extreme = end, as near as the allowed range comes; or `first`."""
    if first is not None:
        return torch.full_like(extreme, first)
    share = (end / extreme).nan_to_num_(nan=1.0)
    return torch.logit(share.clamp_(_SMALLEST_SHARE, 1 / (1 + math.exp(-PUBLISHED_FIRST))))


def _per_group(limit: float | Tensor, grid: TrainedGrid) -> Tensor:
    """A code limit, broadcastable to `grid.steps`; never 0, which one-bit groups have and do not use."""
    found = torch.as_tensor(limit, dtype=torch.float32).reshape(1, -1)
    return torch.where(found == 0, torch.ones_like(found), found)
