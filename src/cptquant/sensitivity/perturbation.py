"""The change that quantization makes to a weight, and to a model that has it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, read_weight, write_weight_
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.scores import SiteFormats

BLOCK_SCORE_BITS = 4
"""Block scores of format-wise methods are taken at each site's format nearest to this width."""


def integer_formats(formats: SiteFormats, layout: ModelLayout) -> dict[str, tuple[QuantFormat, ...]]:
    """The candidates that change a weight, in the layout's order; sites that are only kept are left out."""
    chosen = {site.name: tuple(fmt for fmt in formats.get(site.name, ()) if not fmt.is_float) for site in layout.sites}
    return {name: row for name, row in chosen.items() if row}


def nearest_format(formats: Sequence[QuantFormat], bits: int = BLOCK_SCORE_BITS) -> QuantFormat:
    """The format whose codes are nearest to `bits` wide, the narrower of two."""
    return min(formats, key=lambda fmt: (abs(fmt.code_bits - bits), fmt.code_bits))


def scale_dtype(layout: ModelLayout) -> torch.dtype:
    """What scales are stored in."""
    return torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16


def original_weight(model: LoadedModel, site: Site) -> Tensor:
    """The site's weight, (out_features, in_features), in the model's own dtype."""
    return read_weight(model.module.get_submodule(site.name), site).detach()


@dataclass(frozen=True)
class OneSite:
    """A weight source that changes a single site."""

    site_name: str
    replacement: StoredWeight

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes of the changed site."""
        return self.replacement if site_name == self.site_name else None

    def weight(self, site_name: str) -> Tensor | None:
        """Its float32 weight (out_features, in_features)."""
        return self.replacement.dequantize() if site_name == self.site_name else None


@contextmanager
def changed_weights(
    modules: Mapping[str, nn.Module],
    layout: ModelLayout,
    weights: Mapping[str, Tensor],  # site name -> (out_features, in_features)
) -> Iterator[None]:
    """Put other weights into a private copy of a block for the length of a `with`."""
    saved = {name: read_weight(modules[name], layout.site_by_name[name]).clone() for name in weights}
    try:
        for name, weight in weights.items():
            write_weight_(modules[name], layout.site_by_name[name], weight)
        yield
    finally:
        for name, weight in saved.items():
            write_weight_(modules[name], layout.site_by_name[name], weight)


def load_block_at(stream: ModelStream, block_index: int) -> nn.Module:
    """A private copy of any block, wherever the stream stands."""
    walker = copy.copy(stream)
    walker.block_index = block_index
    return walker.load_block()


@torch.no_grad()
def run_block_on_all(
    stream: ModelStream,
    block: nn.Module,
    block_index: int,
    hidden: Sequence[Tensor],  # per batch (b, T, d)
) -> list[Tensor]:
    """The outputs of one block on given inputs, per batch."""
    return [stream.run_block_at(block, block_index, index, states) for index, states in enumerate(hidden)]


def run_to_end(
    stream: ModelStream,
    start_block: int,
    variants: list[list[Tensor]],  # per variant and batch (b, T, d): inputs of block `start_block`
) -> None:
    """Carry several hidden states through the remaining blocks, in place, one block's weights in memory at a time."""
    for block_index in range(start_block, stream.layout.block_count):
        block = load_block_at(stream, block_index)
        for position, hidden in enumerate(variants):
            variants[position] = run_block_on_all(stream, block, block_index, hidden)


def perturb(weight: Tensor, fmt: QuantFormat, layout: ModelLayout, quantizer: Rtn) -> Tensor:
    """Q(W) - W, (out_features, in_features) float32."""
    weight = weight.float()
    return quantizer(weight, fmt, scale_dtype(layout)).dequantize() - weight
