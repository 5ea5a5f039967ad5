"""What the end of a model is judged by: the task's loss, the divergence from the original, and its gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from cptquant.core.errors import ModelError
from cptquant.models.load import LoadedModel
from cptquant.models.losses import (
    IGNORED,
    cosine_distance,
    mask_tokens,
    pooled_embedding,
    scored_targets,
    sequence_kl,
    sequence_nll,
)
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet

Fisher = Literal["empirical", "true"]

_LOGITS_AT_ONCE = 1 << 23  # 32 MB in float32, of which several copies are held


@dataclass(frozen=True)
class Question:
    """Tokens as the model reads them, and what it is asked.

    Attributes:
        targets: (n, T) next or masked tokens, `IGNORED` elsewhere; (n,) class labels; None for a bare encoder.
    """

    tokens: TokenSet
    targets: Tensor | None


def pick_sequences(tokens: TokenSet, count: int) -> TokenSet:
    """`count` sequences spread evenly over the set (all, if it has no more)."""
    total = tokens.sequence_count
    if total <= count:
        return tokens
    return tokens.subset(torch.linspace(0, total - 1, count).round().long())


def pick_for_task(model: LoadedModel, tokens: TokenSet, sequences: int, examples: int) -> TokenSet:
    """`sequences` windows for a language model, `examples` texts for a model that gives one answer to each."""
    is_lm = model.layout.task in ("causal_lm", "masked_lm")
    return pick_sequences(tokens, sequences if is_lm else examples)


def pose_question(model: LoadedModel, tokens: TokenSet) -> Question:
    """Derive the targets of the model's own task from the text.

    Raises:
        DataError: a classifier without labels. ModelError: a masked language model without a mask token.
    """
    if model.layout.task == "encoder":
        return Question(tokens, None)
    if model.layout.task != "masked_lm":
        return Question(tokens, scored_targets(tokens, model.layout.task))
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise ModelError(
            f"{model.path} is a masked language model, but its tokenizer "
            f"{'is missing' if tokenizer is None else 'has no mask token'}; its loss is measured on masked tokens: "
            "add the tokenizer files to the model's folder"
        )
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    mask_token_id = cast(int, tokenizer.mask_token_id)
    masked, targets = mask_tokens(tokens, mask_token_id=mask_token_id, special_ids=special)
    return Question(masked, targets)


@dataclass(frozen=True)
class SequenceTotals:
    """Per-sequence sums and counts, (n,) float64 and (n,) int64; `correct` counts top-1 hits or agreements."""

    sums: Tensor
    counts: Tensor
    correct: Tensor


class Objective:
    """Judges hidden states at the end of a stream.

    Args:
        stream: on the question's tokens; only its `finish` and `batches` are used, whatever block it stands at.
        question: tokens and targets.
        stride: a language model is judged at every stride-th position only (its head works per token); bounds what a
            large vocabulary costs where a mean is wanted, not each token.
    """

    def __init__(self, stream: ModelStream, question: Question, *, stride: int = 1) -> None:
        self._stream, self._task, self._stride = stream, stream.layout.task, stride
        sizes = [batch.sequence_count for batch in stream.batches]
        self._targets = None if question.targets is None else torch.split(question.targets, sizes)

    @property
    def unit(self) -> str:
        """Unit of the divergence."""
        return "one_minus_cosine" if self._task == "encoder" else "kl_nats_per_token" if self._is_lm else "kl_nats"

    @property
    def _is_lm(self) -> bool:
        return self._task in ("causal_lm", "masked_lm")

    @torch.no_grad()
    def losses(
        self,
        hidden: list[Tensor],  # per batch (b, T, d): the last block's output
        reference: list[Tensor],  # the original's
    ) -> SequenceTotals:
        """NLL of the targets; of a bare encoder 1 - cosine to the original's pooled embedding."""
        if self._targets is None:
            return self.divergences(hidden, reference)
        parts = []
        for index, states in enumerate(hidden):
            pieces = [
                sequence_nll(self._stream.finish(index, states[:, part]), targets)
                for part, targets in self._slices(index, states)
            ]
            parts.append([sum(getattr(piece, name) for piece in pieces) for name in ("sums", "counts", "correct")])
        return _join(parts)

    @torch.no_grad()
    def divergences(
        self,
        hidden: list[Tensor],  # per batch (b, T, d): the last block's output
        reference: list[Tensor],  # the original's
        *,
        changed: ModelStream | None = None,
    ) -> SequenceTotals:
        """KL(original ‖ changed) at the scored positions; of a bare encoder 1 - cosine of the pooled embeddings.

        Args:
            hidden, reference: last block's output of the changed and of the original model.
            changed: the stream whose `finish` the changed model uses, where that differs too.
        """
        stream, end = self._stream, changed or self._stream
        parts = []
        for index, (states, original) in enumerate(zip(hidden, reference, strict=True)):
            if self._targets is None:
                mask = stream.batches[index].attention_mask
                before = pooled_embedding(stream.finish(index, original), mask)
                after = pooled_embedding(end.finish(index, states), mask)
                ones = torch.ones(len(states), dtype=torch.int64)
                parts.append([cosine_distance(before, after), ones, ones])
                continue
            pieces = [
                sequence_kl(
                    stream.finish(index, original[:, part]), end.finish(index, states[:, part]), targets != IGNORED
                )
                for part, targets in self._slices(index, states)
            ]
            parts.append([sum(getattr(piece, name) for piece in pieces) for name in ("sums", "counts", "agreements")])
        return _join(parts)

    def gradient(
        self,
        batch_index: int,
        hidden: Tensor,  # (b, T, d): the last block's output
        fisher: Fisher,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """A gradient g with respect to the last block's output whose products E[g g'] are the wanted Fisher matrix.

        Args:
            batch_index: which batch of the stream. hidden: its states.
            fisher: "empirical": the gradient of each sequence's summed loss. "true": the gradient of no loss, but of
                <A v, logits> with random signs v and A A' = diag(p) - p p', the Hessian of the cross entropy with
                respect to the logits. Labels drawn from the model's own p would have the same mean product, but a
                confident model then gives nothing for most draws and much for a few. A bare encoder has no labels:
                either way the gradient of <v, normalised pooled embedding>, whose mean product is J'J.
            generator: of the random signs.

        Returns:
            (b, T, d) gradient and (b,) int64 counts of scored positions.
        """
        pieces: list[Tensor] = []
        counts = torch.zeros(len(hidden), dtype=torch.int64)
        for part, targets in self._slices(batch_index, hidden):
            states = hidden[:, part].detach().requires_grad_(True)
            with torch.enable_grad():
                output = self._stream.finish(batch_index, states)
                if self._targets is None:
                    loss = self._probe_embedding(batch_index, output, generator)
                    counts += 1
                elif fisher == "true":
                    loss = (probe_logits(output.detach(), targets != IGNORED, generator) * output).sum()
                    counts += (targets != IGNORED).reshape(len(hidden), -1).sum(dim=1)
                else:
                    nll = sequence_nll(output, targets)
                    loss = nll.sums.sum()
                    counts += nll.counts
                pieces.append(torch.autograd.grad(loss, states)[0])
        return torch.cat(pieces, dim=1), counts

    def divergence_gradient(
        self,
        batch_index: int,
        hidden: Tensor,  # (b, T, d): the last block's output of the changed model
        reference: Tensor,  # (b, T, d): the original's
    ) -> tuple[Tensor, SequenceTotals]:
        """The summed divergence of one batch and its gradient with respect to `hidden`.

        With p the original's probabilities and q the changed model's, the gradient of KL(p ‖ q) at the logits is q - p,
        and exactly 0 where nothing was changed. Of a bare encoder it is that of 1 - cosine.

        Returns:
            (b, T, d), and the totals of `divergences`.
        """
        gradients: list[Tensor] = []
        parts: list[SequenceTotals] = []
        for part, targets in self._slices(batch_index, hidden):
            states, original = hidden[:, part].detach().requires_grad_(True), reference[:, part]
            with torch.no_grad():
                before = self._stream.finish(batch_index, original)
            with torch.enable_grad():
                after = self._stream.finish(batch_index, states)
                if self._targets is None:
                    mask = self._stream.batches[batch_index].attention_mask
                    distance = cosine_distance(pooled_embedding(before, mask), pooled_embedding(after, mask))
                    ones = torch.ones(len(states), dtype=torch.int64)
                    parts.append(SequenceTotals(distance.detach(), ones, ones))
                    gradients.append(torch.autograd.grad(distance.sum(), states)[0])
                else:
                    scored = targets != IGNORED
                    totals = sequence_kl(before, after.detach(), scored)
                    parts.append(SequenceTotals(totals.sums, totals.counts, totals.agreements))
                    direction = torch.softmax(after.detach(), dim=-1) - torch.softmax(before, dim=-1)
                    gradients.append(torch.autograd.grad(after, states, direction * scored.unsqueeze(-1))[0])
        sums = [sum(getattr(piece, name) for piece in parts) for name in ("sums", "counts", "correct")]
        return torch.cat(gradients, dim=1), SequenceTotals(*cast(list[Tensor], sums))

    def outputs(
        self,
        batch_index: int,
        hidden: Tensor,  # (b, T, d): the last block's output
        *,
        changed: ModelStream | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the model says, a part of the sequence at a time: (b, t, V) or (b, 1, C) logits, and which are scored.

        Of a bare encoder the normalised pooled embedding (b, 1, d), whose half squared distance is 1 - cosine.

        Args:
            changed: the stream whose `finish` is used, where it is not the original's.
        """
        end = changed or self._stream
        for part, targets in self._slices(batch_index, hidden):
            output = end.finish(batch_index, hidden[:, part])
            if self._targets is None:
                embedding = pooled_embedding(output, self._stream.batches[batch_index].attention_mask)
                yield functional.normalize(embedding, dim=-1).unsqueeze(1), torch.ones(len(hidden), 1, dtype=torch.bool)
            else:
                scored = (targets != IGNORED).reshape(len(hidden), -1)
                yield output.reshape(len(hidden), scored.shape[1], -1), scored

    def _probe_embedding(self, batch_index: int, output: Tensor, generator: torch.Generator) -> Tensor:
        embedding = pooled_embedding(output, self._stream.batches[batch_index].attention_mask)
        unit = functional.normalize(embedding, dim=-1)
        return (unit * random_signs(unit.shape, generator)).sum()

    def _slices(self, batch_index: int, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the sequence that can be finished by themselves: only a language model's head works per token."""
        if self._targets is None:
            yield slice(None), hidden  # no targets: the second item is not looked at
            return
        targets = self._targets[batch_index]
        if not self._is_lm:
            yield slice(None), targets
            return
        length, stride = hidden.shape[1], self._stride
        step = stride * max(1, _LOGITS_AT_ONCE // (len(hidden) * max(1, self._stream.layout.vocabulary_size)))
        for start in range(0, length, step):
            part = slice(start, min(start + step, length), stride)
            yield part, targets[:, part]


def probe_logits(
    logits: Tensor,  # (b, T, V), or (b, C)
    scored: Tensor,  # (b, T) or (b,) bool
    generator: torch.Generator,
) -> Tensor:
    """A v = sqrt(p) v - p <sqrt(p), v> for random signs v; 0 where nothing is scored. Shape of the logits."""
    p = torch.softmax(logits, dim=-1)
    signed = p.sqrt().mul_(random_signs(logits.shape, generator))
    return (signed - p * signed.sum(dim=-1, keepdim=True)).mul_(scored.unsqueeze(-1))


def random_signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """+1 or -1 with equal chance, float32."""
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).float()


def _join(parts: list[list[Tensor]]) -> SequenceTotals:
    return SequenceTotals(*(torch.cat(column) for column in zip(*parts, strict=True)))
