"""Run a model again and again with some weights changed, from the block where the change is, and see where it ends.

A forward pass walks through the original once. At each block every change of that block is run from the block's own
input, which the walk holds, through the rest of the model: half a pass each on average.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import (
    OneSite,
    changed_weights,
    original_weight,
    perturb,
    run_block_on_all,
    run_to_end,
    scale_dtype,
)
from cptquant.sensitivity.scores import entry_sites, exit_sites

_BATCH_SIZE = 8  # sequences; a large vocabulary is met by judging a few positions at a time (`Objective`)
_VARIANT_BYTES = 256 << 20  # hidden states of changed models carried through the blocks at once

Change = Mapping[str, QuantFormat]
"""Site name -> the format it is rounded to; every other site stays as it is."""


@dataclass(frozen=True)
class ChangedEnd:
    """Where a changed model ends.

    Attributes:
        block_index: of the changed block; None where a site outside the blocks was changed.
        hidden: per batch (b, T, d), the last block's output.
        stream: the stream whose `finish` the changed model uses, where that differs from the original's.
    """

    block_index: int | None
    change: Change
    hidden: list[Tensor]
    stream: ModelStream | None = None


class ChangeSweep:
    """The changes of one model on fixed tokens, rounded to nearest.

    Args:
        model: never changed. tokens: all of them are used.

    Attributes:
        stream: on the tokens, at the first block until `inside_blocks` walks it on.
    """

    def __init__(self, model: LoadedModel, tokens: TokenSet) -> None:
        self._model, self._layout, self._tokens = model, model.layout, tokens
        self.stream = self._new_stream()
        self._start = list(self.stream.hidden)

    def _new_stream(self, change: OneSite | None = None) -> ModelStream:
        return ModelStream(self._model, self._tokens, weights=change, batch_size=_BATCH_SIZE)

    def original_end(self) -> list[Tensor]:
        """Per batch (b, T, d): where the original ends."""
        ends = [list(self._start)]
        run_to_end(self.stream, 0, ends)
        return ends[0]

    def inside_blocks(self, changes: Callable[[int], Sequence[Change]]) -> Iterator[ChangedEnd]:
        """Walk through the blocks once; per block the ends of its changes, in order.

        Args:
            changes: of a block, by its index; their sites lie in that block.
        """
        stream = self.stream
        at_once = max(1, _VARIANT_BYTES // sum(states.numel() * 4 for states in self._start))
        for index in range(self._layout.block_count):
            block = stream.load_block()
            modules, wanted = site_modules(block, self._layout, index), changes(index)
            for start in range(0, len(wanted), at_once):
                part, variants = wanted[start : start + at_once], list[list[Tensor]]()
                for change in part:
                    with changed_weights(modules, self._layout, self._quantize(change)):
                        variants.append(run_block_on_all(stream, block, index, stream.hidden))
                run_to_end(stream, index + 1, variants)
                for change, hidden in zip(part, variants, strict=True):
                    yield ChangedEnd(index, change, hidden)
            stream.advance(block)

    def outside_blocks(
        self,
        formats: Mapping[str, Sequence[QuantFormat]],
        end: list[Tensor],  # per batch (b, T, d): where the original ends
    ) -> Iterator[ChangedEnd]:
        """Each format of each site outside the blocks: embeddings pass through the whole model, heads only its end."""
        entries = entry_sites(self._layout)
        for site in (*entries, *exit_sites(self._layout)):
            for fmt in formats.get(site.name, ()):
                weight = original_weight(self._model, site)  # large: upcast by the quantizer, a few rows at a time
                change = OneSite(site.name, Rtn()(weight, fmt, scale_dtype(self._layout)))
                changed = self._new_stream(change)
                if site in entries:
                    variants = [list(changed.hidden)]
                    run_to_end(self.stream, 0, variants)
                    yield ChangedEnd(None, {site.name: fmt}, variants[0])
                else:
                    yield ChangedEnd(None, {site.name: fmt}, end, changed)

    def _quantize(self, change: Change) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, fmt in change.items():
            weight = original_weight(self._model, self._layout.site_by_name[name]).float()
            weights[name] = weight + perturb(weight, fmt, self._layout, Rtn())
        return weights
