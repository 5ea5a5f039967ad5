"""Block-AP, the first phase of EfficientQAT (arXiv 2407.11062, section 3.2): all parameters of a block at once.

    min over W, s, z   || F_l(x_q; s (clamp(round(W/s) + z) - z)) - F_l(x) ||^2          (its block-wise objective)

with straight-through rounding, on the stream that the quantized blocks before it produce.

What we changed. The start is a finished solution, GPTQ's say, instead of plain rounding: a latent weight begins at the
original's value where that rounds to the start's code, else at the nearer end of the code's cell. Steps are learned
through their logarithms, so that a rate is relative and a step keeps its sign; rates of latent weights are in steps of
the layer's grid (the paper's 2e-5 at 2 bits is absolute). Steps of GGUF's blocks stay: there the latent weights alone
move. Norms and biases may move too, which the paper does not do; by default they do not.

Adam moves every latent weight by its rate at once, many of which begin at the end of a cell: at first the error rises,
more so at faster rates, and what comes after is better than where it began only once the rates fall.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from cptquant.core.layout import Site
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_training import Pace, Targets, relative_error
from cptquant.quantizers.blocks.open_block import Group, Moving, OpenBlock
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_layer import TrainedLinear, Trains


@dataclass(frozen=True)
class BlockAp:
    """Hyper-parameters.

    Attributes:
        pace: epochs, batches, looks.
        surrogate: what stands in for the slope of rounding.
        latent_rate: of latent weights, in steps of their layer's grid (the mean). step_rate: of steps, relative.
        zero_rate: of zero points, in codes.
        left_rate: of the left factor of a product of low rank, in steps of the grid (the mean), as latent weights'.
        other_rate: of norms and biases; 0 leaves them.
    """

    pace: Pace = field(default_factory=Pace)
    surrogate: Surrogate = field(default_factory=Surrogate)
    latent_rate: float = 0.005
    step_rate: float = 3e-4
    zero_rate: float = 0.01
    left_rate: float = 0.06
    other_rate: float = 0.0

    flag = "blockwise"
    wants_alike = False

    def check(self, site: Site, stored: StoredWeight) -> None:
        """Every form can be trained."""

    def open_(self, block: OpenBlock) -> Moving:
        """Layers that quantize a latent weight in every pass."""
        layers: dict[str, TrainedLinear] = {}
        for site in block.trained_sites:
            layer = TrainedLinear(
                block.starts[site.name], block.originals[site.name], block.bias(site), Trains(), self.surrogate
            )
            block.replace_(site, layer)
            layers[site.name] = layer
        others = block.others(norms_only=False) if self.other_rate > 0 else {}
        groups = [group for layer in layers.values() for group in self._groups(layer)]
        if others:
            for parameter in others.values():
                parameter.requires_grad_(True)
            groups.append(Group(list(others.values()), self.other_rate))
        return Moving(layers, others, groups, block.storage_dtype)

    def loss(self, output: Tensor, targets: Targets) -> Tensor:
        """Squared error of the block's output, relative to the output."""
        return relative_error(output, targets.followed, targets.mask)

    def _groups(self, layer: TrainedLinear) -> list[Group]:
        rated: list[tuple[nn.Parameter | None, float]] = [
            (layer.latent, self.latent_rate * float(layer.grid.steps.abs().mean())),
            (layer.log_steps, self.step_rate),
            (layer.zeros, self.zero_rate),
            (layer.left, self.left_rate * float(layer.left_unit())),
        ]
        return [Group([parameter], rate) for parameter, rate in rated if parameter is not None and rate > 0]
