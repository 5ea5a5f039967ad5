"""Divergence of a changed model from the original at its outputs, with its gradient.

    language model   KL(original || changed) of the predictions, at positions that have a next token (causal) or are
                     hidden (masked); classifier: KL of the class probabilities; bare encoder: 1 - cosine of the
                     pooled embeddings

dKL/dlogits = softmax(changed) - softmax(original), so neither model's probabilities go through autograd. Of the
original only the last block's output is kept, tokens x width in float32; its logits are made anew, a few positions at
a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from cptquant.models.load import LoadedModel
from cptquant.models.losses import IGNORED, cosine_distance, mask_tokens, pooled_embedding, scored_targets, sequence_kl
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet

_LOGITS_AT_ONCE = 1 << 22
"""16 MB in float32, of which a handful of copies are held."""


def mask_for_task(model: LoadedModel, tokens: TokenSet) -> tuple[TokenSet, Tensor | None]:
    """The tokens as the model reads them and where it is judged: bool (n, T), (n,) for classes, None for an encoder.

    A masked language model gets 15 % of its tokens hidden (if its tokenizer has a mask token; else all are judged).
    """
    task = model.layout.task
    if task == "causal_lm":
        return tokens, scored_targets(tokens, task) != IGNORED
    if task == "sequence_classification":
        return tokens, torch.ones(tokens.sequence_count, dtype=torch.bool)
    if task == "encoder":
        return tokens, None
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.mask_token_id is None:
        return tokens, tokens.attention_mask.bool()
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    masked, targets = mask_tokens(tokens, mask_token_id=cast(int, tokenizer.mask_token_id), special_ids=special)
    return masked, targets != IGNORED


class OutputDivergence:
    """Judges the last block's outputs of a changed model.

    Args:
        original: stream of the original on the tokens; its `finish` is used.
        changed: stream of the changed model on the same tokens in the same batches; its `finish` is used.
        reference: by batch, the original's last hidden state (b, T, width); looked at when a batch is judged.
        judged: as `mask_for_task` gives it.
    """

    def __init__(
        self,
        original: ModelStream,
        changed: ModelStream,
        reference: Mapping[int, Tensor] | Sequence[Tensor],
        judged: Tensor | None,
    ) -> None:
        self._original, self._changed, self._reference = original, changed, reference
        sizes = [batch.sequence_count for batch in changed.batches]
        self._judged = None if judged is None else torch.split(judged, sizes)
        self._is_lm = changed.layout.task in ("causal_lm", "masked_lm")

    @torch.no_grad()
    def divergence(self, batch_index: int, hidden: Tensor) -> tuple[float, int]:
        """Sum over what is judged, and its count."""
        if self._judged is None:
            return float(self._encoder_distance(batch_index, hidden).sum()), len(hidden)
        total = 0.0
        for part, judged in self._slices(batch_index, hidden):
            reference = self._original.finish(batch_index, self._reference[batch_index][:, part])
            logits = self._changed.finish(batch_index, hidden[:, part])
            total += float(sequence_kl(reference.float(), logits.float(), judged).sums.sum())
        return total, int(self._judged[batch_index].sum())

    def gradient(
        self,
        batch_index: int,
        hidden: Tensor,  # (b, T, width)
    ) -> Tensor:
        """d(mean divergence of the batch)/d(hidden), shape of `hidden`; 0 where nothing is judged."""
        if self._judged is None:
            states = hidden.detach().requires_grad_(True)
            with torch.enable_grad():
                loss = self._encoder_distance(batch_index, states).mean()
            return torch.autograd.grad(loss, states)[0].to(hidden.dtype)
        count = max(1, int(self._judged[batch_index].sum()))
        pieces: list[Tensor] = []
        for part, judged in self._slices(batch_index, hidden):
            states = hidden[:, part].detach().requires_grad_(True)
            with torch.no_grad():
                p = torch.softmax(self._original.finish(batch_index, self._reference[batch_index][:, part]).float(), -1)
            with torch.enable_grad():
                logits = self._changed.finish(batch_index, states)
            seed = torch.softmax(logits.detach().float(), -1).sub_(p).mul_(judged.unsqueeze(-1)).div_(count)
            pieces.append(torch.autograd.grad(logits, states, seed.view_as(logits).to(logits.dtype))[0])
        return torch.cat(pieces, dim=1)

    def _encoder_distance(self, batch_index: int, hidden: Tensor) -> Tensor:
        mask = self._changed.batches[batch_index].attention_mask
        with torch.no_grad():
            before = pooled_embedding(self._original.finish(batch_index, self._reference[batch_index]), mask)
        return cosine_distance(before, pooled_embedding(self._changed.finish(batch_index, hidden), mask))

    def _slices(self, batch_index: int, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Positions finished together; only a language model's head works per token."""
        assert self._judged is not None
        judged = self._judged[batch_index]
        if not self._is_lm:
            yield slice(None), judged
            return
        vocabulary = max(1, self._changed.layout.vocabulary_size)
        step = max(1, _LOGITS_AT_ONCE // (len(hidden) * vocabulary))
        for start in range(0, hidden.shape[1], step):
            part = slice(start, start + step)
            yield part, judged[:, part]
