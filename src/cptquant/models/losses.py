"""Losses per sequence: negative log-likelihood, divergence from a reference model, pooled embeddings.

Everything is summed per sequence with its count, because standard errors are taken over sequences (or over the
documents they come from) and a mean over tokens cannot be split again. Logits are worked through in slices of
positions, so that beside the logits themselves only a bounded amount of memory is needed whatever the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from cptquant.core.errors import DataError
from cptquant.core.layout import Task

if TYPE_CHECKING:
    from cptquant.models.text import TokenSet

IGNORED = -100
"""Target of a position that is not scored (the value torch's cross entropy skips)."""

_FAR_NATS = -80.0
"""Below this log ratio exp(-d) nears float32's range."""
_SLICE_ENTRIES = 2**19  # logits per slice: 2 MB in float32, so that the dozen passes over a slice stay in the cache


@dataclass(frozen=True)
class SequenceNll:
    """Negative log-likelihood of the targets, per sequence.

    Attributes:
        sums: (b,) float64, nats summed over the scored positions; carries a gradient if the logits do.
        counts: (b,) int64, scored positions. correct: (b,) int64, of which the target is the most likely.
    """

    sums: Tensor
    counts: Tensor
    correct: Tensor

    @property
    def means(self) -> Tensor:
        """(b,) float64, nats per scored position; 0 where a sequence has none."""
        return self.sums / self.counts.clamp(min=1)


@dataclass(frozen=True)
class SequenceDivergence:
    """How far a model's predictions are from a reference's, per sequence.

    Attributes:
        sums: (b,) float64, KL(reference ‖ model) in nats, summed over the scored positions; never negative.
        counts: (b,) int64, scored positions. agreements: (b,) int64, of which both have the same most likely entry.
    """

    sums: Tensor
    counts: Tensor
    agreements: Tensor

    @property
    def means(self) -> Tensor:
        """(b,) float64, nats per scored position; 0 where a sequence has none."""
        return self.sums / self.counts.clamp(min=1)


def scored_targets(tokens: "TokenSet", task: Task) -> Tensor:
    """What the model is asked to predict.

    Args:
        tokens: n sequences of T tokens.
        task: "causal_lm": the next token, where this and the next are real; "sequence_classification": the label.
            Masked language models need `mask_tokens` first, which returns its own targets; a bare encoder has none.

    Returns:
        int64, (n, T) aligned with the logits and `IGNORED` elsewhere, or (n,) class labels.

    Raises:
        DataError: a classifier is given text without labels.
        ValueError: the task has no targets of its own.
    """
    if task == "causal_lm":
        targets = torch.full_like(tokens.input_ids, IGNORED)
        real = tokens.attention_mask.bool()
        targets[:, :-1] = torch.where(real[:, :-1] & real[:, 1:], tokens.input_ids[:, 1:], IGNORED)
        return targets
    if task == "sequence_classification":
        if tokens.labels is None:
            raise DataError(
                "a classifier is measured on labelled text, and this text has no labels; give --calibration and "
                '--eval-text as jsonl lines with "text" and "label"'
            )
        return tokens.labels
    raise ValueError(f"task {task!r} has no targets in its tokens alone")


def mask_tokens(
    tokens: "TokenSet",
    *,
    mask_token_id: int,
    special_ids: Tensor,  # (k,) int64, never masked: [CLS], [SEP], padding
    fraction: float = 0.15,
    seed: int = 0,
) -> tuple["TokenSet", Tensor]:
    """Hide a fixed random choice of tokens behind the mask token, for the loss of a masked language model.

    Every chosen token becomes the mask token (BERT, arXiv 1810.04805, leaves 20 % of them visible or random, which
    serves training; a measurement wants only hidden targets). A sequence in which chance chose none has its first
    ordinary token hidden, so that each sequence counts.

    Returns:
        The tokens as the model shall read them, and targets (n, T) int64, `IGNORED` where nothing is hidden.
    """
    ordinary = tokens.attention_mask.bool() & ~torch.isin(tokens.input_ids, special_ids)
    generator = torch.Generator().manual_seed(seed)
    hidden = ordinary & (torch.rand(tokens.input_ids.shape, generator=generator) < fraction)
    first = ordinary & (ordinary.cumsum(dim=1) == 1)
    hidden |= first & ~hidden.any(dim=1, keepdim=True)
    targets = torch.where(hidden, tokens.input_ids, IGNORED)
    masked = replace(
        tokens,
        input_ids=torch.where(hidden, mask_token_id, tokens.input_ids),
        digest=f"{tokens.digest}-masked-{fraction}-{seed}",
        description=f"{tokens.description}, {fraction:.0%} of the tokens masked (seed {seed})",
    )
    return masked, targets


def sequence_nll(
    logits: Tensor,  # (b, T, V), or (b, C) for classification
    targets: Tensor,  # (b, T) int64 with IGNORED, or (b,)
) -> SequenceNll:
    """Cross entropy of the targets in nats, summed per sequence; differentiable with respect to the logits."""
    logits, targets = _with_positions(logits, targets)
    counts = (targets != IGNORED).sum(dim=1)
    sums = torch.zeros(len(logits), dtype=torch.float64)
    correct = torch.zeros(len(logits), dtype=torch.int64)
    for rows, columns in _slices(targets != IGNORED, logits.shape[-1]):
        part, wanted = logits[rows, columns], targets[rows, columns]
        loss = functional.cross_entropy(part.float(), wanted, reduction="none")
        sums = sums.index_add(0, rows, loss.double())
        correct.index_add_(0, rows, (part.argmax(dim=-1) == wanted).long())
    return SequenceNll(sums, counts, correct)


@torch.no_grad()
def sequence_kl(
    reference_logits: Tensor,  # (b, T, V), or (b, C)
    logits: Tensor,  # the same shape
    scored: Tensor,  # (b, T) or (b,) bool: positions that count
) -> SequenceDivergence:
    """KL(softmax(reference) ‖ softmax(logits)) in nats and top-1 agreement, summed per sequence."""
    reference_logits, scored = _with_positions(reference_logits, scored)
    logits = logits.reshape(reference_logits.shape)
    sums = torch.zeros(len(logits), dtype=torch.float64)
    agreements = torch.zeros(len(logits), dtype=torch.int64)
    for rows, columns in _slices(scored, logits.shape[-1]):
        reference, part = reference_logits[rows, columns], logits[rows, columns]
        sums.index_add_(0, rows, _kl(reference, part))
        agreements.index_add_(0, rows, (reference.argmax(dim=-1) == part.argmax(dim=-1)).long())
    return SequenceDivergence(sums, scored.sum(dim=1), agreements)


def pooled_embedding(
    hidden: Tensor,  # (b, T, d)
    attention_mask: Tensor,  # (b, T), 1 = real token
) -> Tensor:
    """Mean of the hidden states over the real tokens, (b, d): what sentence encoders return before normalisation."""
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def cosine_distance(
    reference: Tensor,  # (b, d)
    embedding: Tensor,  # (b, d)
) -> Tensor:
    """1 - cosine, (b,) float64, as half the squared distance of the unit vectors: exact where the two nearly agree."""
    unit_reference = functional.normalize(reference.double(), dim=-1)
    unit = functional.normalize(embedding.double(), dim=-1)
    return 0.5 * (unit - unit_reference).square().sum(dim=-1)


def _kl(
    reference: Tensor,  # (m, V) float32 logits
    logits: Tensor,  # (m, V) float32 logits
) -> Tensor:
    """KL per row, (m,) float64.

    With d = log p - log q, KL = sum p (d + exp(-d) - 1), since p and q each sum to 1: a sum of non-negative terms of
    second order in d, in which float32's rounding of the normalisers (first order, 1e-7) cancels instead of adding up
    as it does in the textbook difference of logarithms (one site in 8 bits costs about 1e-6 nats). Equal logits give
    exactly 0. Where exp(-d) could overflow, p is 0 in float32 and the term is q.
    """
    log_p, log_q = torch.log_softmax(reference.float(), dim=-1), torch.log_softmax(logits.float(), dim=-1)
    difference = log_p - log_q
    far = difference < _FAR_NATS
    terms = torch.expm1(-difference).add_(difference).mul_(log_p.exp_())
    if bool(far.any()):
        terms = torch.where(far, log_q.exp_(), terms)
    return terms.sum(dim=-1, dtype=torch.float64).clamp(min=0)


def _with_positions(logits: Tensor, per_position: Tensor) -> tuple[Tensor, Tensor]:
    """View class logits (b, C) as one position per sequence."""
    if logits.ndim == 2:
        return logits.unsqueeze(1), per_position.reshape(-1, 1)
    return logits, per_position


def _slices(scored: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (row, column) of the scored positions, a bounded number of logits at a time."""
    rows, columns = scored.nonzero(as_tuple=True)
    step = max(1, _SLICE_ENTRIES // width)
    for start in range(0, len(rows), step):
        yield rows[start : start + step], columns[start : start + step]
