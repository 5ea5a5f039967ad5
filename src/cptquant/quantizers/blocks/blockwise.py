"""Training block by block: each against the original's block, on the inputs that the trained blocks before it produce.

    minimise  ||F_q(x_q) - F(x)||^2 / ||F(x)||^2      x the original's stream, x_q the quantized model's

A block is trained alone, so memory is one block in float32 with its optimizer, and the hidden states of the text twice.
What moves inside the block is the method's: `block_ap.py`, `clipping.py`, `norm_tweaking.py`. How it is trained is the
same for all (`block_training.py`): some sequences are held out, and the block's error there alone chooses the iterate.
The start is among what it chooses from, so no block's held-out error is ever worse than before, and the records say
what became of every block.

The result depends on model, start, method and tokens only; a run that goes on after any block gives the same bits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cptquant.core.errors import DataError
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource, read_weight
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_training import BlockLook, BlockMethod, FinishedBlock, SideBySide, train_block
from cptquant.quantizers.blocks.open_block import OpenBlock
from cptquant.quantizers.held_out import split_held_out
from cptquant.quantizers.output_divergence import mask_for_task


@dataclass(frozen=True)
class Start:
    """Where training starts from; a source of weights for streams.

    Attributes:
        source: the quantized weights, of sites outside the blocks too; these stay.
        others: norms and biases that an earlier training changed, by name.
        frozen: sites that keep codes and steps.
    """

    source: QuantizedSource
    others: Mapping[str, Tensor]
    frozen: frozenset[str] = frozenset()

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and scales of a site."""
        return self.source.quantized(site_name)

    def weight(self, site_name: str) -> Tensor | None:
        """Float32 (out_features, in_features)."""
        return self.source.weight(site_name)

    def kept(self) -> Mapping[str, Tensor]:
        """Norms and biases that are not the original's."""
        return self.others


Keep = Callable[[int, dict[str, StoredWeight], dict[str, Tensor], BlockLook], None]
"""Takes (block index, weights by site, norms and biases by name in the storage dtype, look)."""


def train_blocks(
    model: LoadedModel,
    start: Start,
    method: BlockMethod,
    tokens: TokenSet,
    keep: Keep,
    *,
    resume: Mapping[int, FinishedBlock] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train all blocks in order and hand each to `keep` as soon as it is done.

    Args:
        model: the original; never changed. tokens: training text, what the model wrote itself after what was given.
        resume: blocks that are finished already; `keep` is not called for them again.
        progress: called with (steps done, steps in all), all blocks together.

    Raises:
        DataError: fewer than two sequences. UserError: a site in a form that the method cannot train.
    """
    if tokens.sequence_count < 2:
        raise DataError(
            f"--method {method.flag} needs at least 2 training sequences, got {tokens.sequence_count}: one to learn "
            "on, one to judge by; give more text (--data FILE) or raise --sequences"
        )
    for site in model.layout.block_sites:
        stored = start.quantized(site.name)
        if stored is not None and site.name not in start.frozen:
            method.check(site, stored)
    held, learned = split_held_out(mask_for_task(model, tokens)[0], method.pace.held_out, method.pace.seed)
    learn, judge = (SideBySide(model, start, part, method.pace) for part in (learned, held))
    steps = math.ceil(method.pace.epochs * len(learn.stream.batches))
    total = steps * model.layout.block_count
    for index in range(model.layout.block_count):
        original = learn.original.load_block()
        for text in (learn, judge):
            text.follow(original, alike=method.wants_alike)
        del original
        opened = _open_block(model, start, learn.stream.load_block(), index)
        done = (resume or {}).get(index)
        if done is None:
            done, look = train_block(
                opened, method, learn, judge, steps, lambda step, before=index * steps: progress(before + step, total)
            )
            keep(index, dict(done.weights), dict(done.kept), look)
        else:
            opened.close_(done.weights, done.kept)
        for text in (learn, judge):
            text.advance(opened.module)
        progress((index + 1) * steps, total)


def _open_block(model: LoadedModel, start: Start, block: nn.Module, index: int) -> OpenBlock:
    sites = [site for site in model.layout.sites if site.block_index == index]
    stored = {site.name: start.quantized(site.name) for site in sites}
    starts = {name: weight for name, weight in stored.items() if weight is not None}
    originals = {
        site.name: read_weight(model.module.get_submodule(site.name), site).detach()
        for site in sites
        if site.name in starts
    }
    prefix = f"{model.blocks_path}.{index}."
    return OpenBlock(model.layout, prefix, index, block, starts, originals, start.frozen & set(starts))
