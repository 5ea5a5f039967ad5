"""An engine's outputs beside our own dequantized model's, on the same held-out tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.engine_export import KL_BOUND_NATS, EngineComparison
from cptquant.core.layout import ModelLayout
from cptquant.evaluation.lockstep import LANGUAGE_TASKS, Piece, pieces, run_blocks
from cptquant.evaluation.scored_text import ScoredText
from cptquant.models.estimates import estimate_ratio
from cptquant.models.load import LoadedModel
from cptquant.models.losses import cosine_distance, pooled_embedding, sequence_kl
from cptquant.models.stream import ModelStream, WeightSource

_OUTPUT_LIMIT_BYTES = 1 << 28
"""Outputs that one engine writes to disk for a comparison."""


@dataclass(frozen=True)
class EngineOutputs:
    """One way of running an engine.

    Attributes:
        arithmetic: "float activations", "int8 activations". bounded: whether the bound holds for it.
        read: number of a sequence -> its output as the engine gave it: logits (T, V) or (C,), or hidden (T, width).
    """

    arithmetic: str
    bounded: bool
    read: Callable[[int], Tensor]


def comparison_sequences(layout: ModelLayout, available: int, length: int) -> int:
    """How many sequences an engine is asked for: at most 32, and no more than fit the disk limit."""
    width = layout.vocabulary_size if layout.task in LANGUAGE_TASKS else layout.hidden_size
    return max(2, min(available, 32, _OUTPUT_LIMIT_BYTES // (4 * length * width)))


def compare_engine(
    model: LoadedModel, weights: WeightSource | None, text: ScoredText, ways: list[EngineOutputs]
) -> list[EngineComparison]:
    """KL(ours ‖ engine) and top-1 agreement, or the cosine of pooled embeddings, for each way of running it.

    Ours is the original with `weights` in place, in float32, as `evaluate` runs it; without any, the original itself.
    """
    of = "original" if weights is None else "quantized"
    streams: Mapping[str, ModelStream] = {"ours": ModelStream(model, text.tokens, weights=weights)}
    run_blocks(streams)
    sums = {way.arithmetic: torch.zeros(2, len(text.scored), dtype=torch.float64) for way in ways}
    for piece in pieces(streams):  # a sequence may come in several parts
        ours = piece.output("ours")
        for way in ways:
            theirs = torch.stack([way.read(index) for index in range(piece.rows.start, piece.rows.stop)])
            sums[way.arithmetic][:, piece.rows] += _distances(model.layout, text, piece, ours, theirs)
    found = [_summarize(model.layout, text, way, sums[way.arithmetic]) for way in ways]
    return [comparison.model_copy(update={"weights": of}) for comparison in found]


def _distances(layout: ModelLayout, text: ScoredText, piece: Piece, ours: Tensor, theirs: Tensor) -> Tensor:
    """Per sequence of a piece: (summed KL, agreements), or (cosine distance, zeros) for bare encoders; (2, rows)."""
    if layout.task == "encoder":
        mask = text.tokens.attention_mask[piece.rows]
        pooled = theirs if theirs.dim() == 2 else pooled_embedding(theirs.double(), mask)
        distance = cosine_distance(pooled_embedding(ours.double(), mask), pooled)
        return torch.stack([distance, torch.zeros_like(distance)])
    scored = text.scored[piece.rows]
    if scored.ndim == 2:
        scored, theirs = scored[:, piece.columns], theirs[:, piece.columns]
    found = sequence_kl(ours, theirs, scored)
    return torch.stack([found.sums, found.agreements.double()])


def _summarize(layout: ModelLayout, text: ScoredText, way: EngineOutputs, totals: Tensor) -> EngineComparison:
    sums, agreements = totals
    mean = estimate_ratio(sums, text.counts, text.clusters)
    bound = KL_BOUND_NATS if way.bounded else None
    if layout.task == "encoder":
        return EngineComparison(
            arithmetic=way.arithmetic, cosine=1 - mean.value, cosine_lowest=1 - sums.max().item(), n=mean.n,
            stderr=mean.stderr, bound=bound,
        )  # fmt: skip
    share = estimate_ratio(agreements, text.counts, text.clusters)
    return EngineComparison(
        arithmetic=way.arithmetic, kl_nats=mean.value, top1_agreement=share.value, n=mean.n, stderr=mean.stderr,
        bound=bound,
    )  # fmt: skip
