"""The mixture of tokenised sources: windows by random access, so that a killed training goes on where it was.

Every window has all its tokens from one source. The order of sources keeps their shares after every prefix
(`core/mixture.py`); each pass over a source is a new permutation of its windows, which depends on the seed, the
source's name and the pass alone: two mixtures of different shares read the same windows of a source in the same order.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cptquant.adaptation.token_files import TokenSource
from cptquant.core.errors import DataError
from cptquant.core.mixture import SourceCount, apportion_windows, check_epochs
from cptquant.models.losses import IGNORED

MAX_EPOCHS = 4.0
"""Default of --max-epochs: up to about four passes, repeated text is worth nearly as much as new (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Window:
    """What the model reads at once.

    Attributes:
        input_ids: (T,) int64. labels: (T,) int64 aligned with `input_ids`, as transformers has it (position t predicts
            labels[t + 1]); `IGNORED` where not counted.
        source: index of the source.
        position_ids: (T,) int64, from 0 in every document, where documents are kept apart; else None.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    source: int
    position_ids: NDArray[np.int64] | None = None


class Mixture:
    """Windows of several sources in exact shares; `mixture[k]` needs nothing before k.

    Args:
        shares: of all tokens, one a source, adding up to 1.
        window_tokens: T. total_tokens: of the whole mixture; rounded down to whole windows.
        keep_documents_apart: positions start anew in every document and its first token is not predicted, so that a
            model which reads `position_ids` does not attend across documents.
        max_epochs: how often a source may be read.

    Raises:
        DataError: a source with less than one window; more tokens asked of a source than `max_epochs` passes hold;
            less than one window in total.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        shares: Sequence[float],
        *,
        window_tokens: int,
        total_tokens: int,
        seed: int,
        keep_documents_apart: bool = False,
        max_epochs: float = MAX_EPOCHS,
    ) -> None:  # fmt: skip
        if len(sources) != len(shares) or len({source.name for source in sources}) < len(sources):
            raise ValueError("one share a source, and every source a name of its own")
        if window_tokens < 2 or total_tokens < window_tokens:
            raise DataError(
                f"--tokens {total_tokens:,} do not fill one window of {window_tokens:,}; give more --tokens, or a "
                "--window of at least 2 and at most as many"
            )
        self.sources, self.shares = tuple(sources), tuple(float(share) for share in shares)
        self.window_tokens, self.seed, self.keep_documents_apart = window_tokens, seed, keep_documents_apart
        self._slots = [len(source.tokens) // window_tokens for source in sources]
        for source, slots, share in zip(sources, self._slots, shares, strict=True):
            if not slots and share > 0:
                raise DataError(
                    f"{source.name} text holds {len(source.tokens):,} tokens, less than one window of "
                    f"{window_tokens:,}; give more of it, or a smaller --window"
                )
        self._order = apportion_windows(self.shares, total_tokens // window_tokens)
        self._rank = np.empty(len(self._order), dtype=np.int64)
        for index in range(len(sources)):
            mine = self._order == index
            self._rank[mine] = np.arange(np.count_nonzero(mine))
        self._passes: dict[int, tuple[int, NDArray[np.int64]]] = {}
        check_epochs(self.counts(), max_epochs)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def digest(self) -> str:
        """sha256 of everything the windows depend on."""
        parts = [self.window_tokens, len(self), self.seed, self.keep_documents_apart]
        parts += [(s.name, share, s.digest) for s, share in zip(self.sources, self.shares, strict=True)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def place(self, index: int) -> tuple[int, int]:
        """Source of a window, and which of the source's own windows it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        source, rank = int(self._order[index]), int(self._rank[index])
        pass_number, within = divmod(rank, self._slots[source])
        return source, int(self._permutation(source, pass_number)[within])

    def __getitem__(self, index: int) -> Window:
        source, slot = self.place(index)
        first = slot * self.window_tokens
        last = first + self.window_tokens
        input_ids = self.sources[source].tokens[first:last].astype(np.int64)
        labels = input_ids.copy()
        if not self.keep_documents_apart:
            return Window(input_ids, labels, source)
        starts = self.sources[source].starts
        inside = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, last, "left")] - first
        labels[inside] = IGNORED
        begins = np.zeros(self.window_tokens, dtype=np.int64)
        begins[inside] = inside
        return Window(input_ids, labels, source, np.arange(self.window_tokens) - np.maximum.accumulate(begins))

    def counts(self, windows: int | None = None) -> tuple[SourceCount, ...]:
        """What the first `windows` windows (all, if None) take from each source with a share."""
        taken = np.bincount(self._order[:windows], minlength=len(self.sources))
        return tuple(
            SourceCount(
                name=source.name,
                share=share,
                windows=int(count),
                tokens=int(count) * self.window_tokens,
                held_tokens=slots * self.window_tokens,
            )
            for source, share, count, slots in zip(self.sources, self.shares, taken, self._slots, strict=True)
            if share > 0
        )

    def _permutation(self, source: int, pass_number: int) -> NDArray[np.int64]:
        kept = self._passes.get(source)
        if kept is None or kept[0] != pass_number:
            key = [self.seed & 0xFFFFFFFF, zlib.crc32(self.sources[source].name.encode()), pass_number]
            kept = (pass_number, np.random.default_rng(key).permutation(self._slots[source]))
            self._passes[source] = kept
        return kept[1]
