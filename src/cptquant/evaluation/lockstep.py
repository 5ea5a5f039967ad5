"""Several models on the same tokens at once: block by block together, so one block of one model is in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.layout import Task
from cptquant.core.progress import Progress, ignore_progress
from cptquant.models.stream import ModelStream

LANGUAGE_TASKS: tuple[Task, ...] = ("causal_lm", "masked_lm")
_OUTPUT_LIMIT_BYTES = 80 << 20
"""Outputs of one model held at once; beside it stand the original's of the same size. Where one sequence needs more
(256 tokens of a 150,000-token vocabulary are 154 MB) it is finished in parts: a language model's head works per
token."""


@dataclass(frozen=True)
class Piece:
    """A few sequences, or a part of one, whose outputs fit into memory.

    Attributes:
        rows: which of all the sequences. columns: which of their tokens; all of them, except in a language model.
    """

    rows: slice
    columns: slice
    _streams: Mapping[str, ModelStream]
    _batch_index: int
    _rows_in_batch: slice

    def output(self, subject: str) -> Tensor:
        """What `ModelStream.finish` gives for these sequences: float32, computed anew at each call."""
        stream = self._streams[subject]
        hidden = stream.hidden[self._batch_index]
        with torch.no_grad():
            return stream.finish(self._batch_index, hidden[self._rows_in_batch, self.columns])


def run_blocks(streams: Mapping[str, ModelStream], progress: Progress = ignore_progress) -> None:
    """Advance every stream to its end, the first block of all, then the second of all, and so on.

    Models of different depth are allowed: the shallower are done earlier.
    """
    total = sum(stream.layout.block_count for stream in streams.values())
    done = 0
    for index in range(max(stream.layout.block_count for stream in streams.values())):
        for stream in streams.values():
            if index < stream.layout.block_count:
                stream.advance(stream.load_block())
                done += 1
                progress("evaluate", done, total)


def pieces(streams: Mapping[str, ModelStream]) -> Iterator[Piece]:
    """All sequences in order, a batch at a time or less where a language model's logits would be large."""
    stream = next(iter(streams.values()))
    is_language_model = stream.layout.task in LANGUAGE_TASKS
    per_token = max(s.layout.vocabulary_size for s in streams.values()) if is_language_model else 1
    tokens_at_once = max(1, _OUTPUT_LIMIT_BYTES // (4 * per_token))
    first_row = 0
    for batch_index, batch in enumerate(stream.batches):
        count, length = batch.input_ids.shape
        step = min(count, max(1, tokens_at_once // length))
        parts = -(-length // tokens_at_once) if is_language_model else 1
        width = -(-length // parts)
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows, in_batch = slice(first_row + start, first_row + stop), slice(start, stop)
            for column in range(0, length, width):
                columns = slice(column, min(column + width, length))
                yield Piece(rows, columns if parts > 1 else slice(None), streams, batch_index, in_batch)
        first_row += count
