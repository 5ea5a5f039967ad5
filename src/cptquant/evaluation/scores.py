"""The pass over the outputs: each model's predictions compared, summed per sequence and let go."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.evaluation.lockstep import Piece, pieces
from cptquant.evaluation.scored_text import ScoredText
from cptquant.models.losses import cosine_distance, pooled_embedding, sequence_kl, sequence_nll
from cptquant.models.stream import ModelStream

ORIGINAL = "original"
"""The subject that the others are compared with."""


@dataclass(frozen=True)
class Scores:
    """One subject's predictions, summed over the scored positions of each sequence.

    Attributes:
        nll_nats, correct: (n,) float64 and int64; None without targets (unlabelled text).
        kl_nats, agreements: (n,) float64 and int64 against the original; None for the original, or without one.
    """

    nll_nats: Tensor | None
    correct: Tensor | None
    kl_nats: Tensor | None
    agreements: Tensor | None


def collect_scores(streams: Mapping[str, ModelStream], text: ScoredText) -> dict[str, Scores]:
    """Finish language models or classifiers whose blocks have been run.

    At most the original's and one subject's outputs of one piece are held.

    Raises:
        ModelError: a subject's outputs are not finite.
    """
    parts: dict[str, list[tuple[slice, Scores]]] = {subject: [] for subject in streams}
    for piece in pieces(streams):
        original = piece.output(ORIGINAL) if ORIGINAL in streams else None
        for subject in streams:
            output = original if subject == ORIGINAL and original is not None else piece.output(subject)
            reference = None if subject == ORIGINAL else original
            parts[subject].append((piece.rows, _score_piece(piece, output, reference, text)))
    scores = {subject: _join(found, len(text.scored)) for subject, found in parts.items()}
    for subject, found in scores.items():
        for sums in (found.nll_nats, found.kl_nats):
            if sums is not None:
                _check_finite(sums, subject)
    return scores


def collect_distances(streams: Mapping[str, ModelStream], text: ScoredText) -> dict[str, Tensor]:
    """1 - cosine of each sentence's pooled embedding to the original's, (n,) float64, for every other subject.

    Raises:
        ModelError: a subject's outputs are not finite.
    """
    parts: dict[str, list[Tensor]] = {subject: [] for subject in streams if subject != ORIGINAL}
    for piece in pieces(streams):
        mask = text.tokens.attention_mask[piece.rows]
        original = pooled_embedding(piece.output(ORIGINAL).double(), mask)
        for subject, found in parts.items():
            found.append(cosine_distance(original, pooled_embedding(piece.output(subject).double(), mask)))
    distances = {subject: torch.cat(found) for subject, found in parts.items()}
    for subject, values in distances.items():
        _check_finite(values, subject)
    return distances


def _score_piece(
    piece: Piece,
    output: Tensor,  # (b, T, V) or (b, C)
    original: Tensor | None,  # the same shape
    text: ScoredText,
) -> Scores:
    nll = None if text.targets is None else sequence_nll(output, _cut(text.targets, piece))
    kl = None if original is None else sequence_kl(original, output, _cut(text.scored, piece))
    return Scores(
        nll_nats=None if nll is None else nll.sums,
        correct=None if nll is None else nll.correct,
        kl_nats=None if kl is None else kl.sums,
        agreements=None if kl is None else kl.agreements,
    )


def _cut(
    per_position: Tensor,  # (n, T), or (n,)
    piece: Piece,
) -> Tensor:
    rows = per_position[piece.rows]
    return rows if rows.ndim == 1 else rows[:, piece.columns]


def _join(parts: list[tuple[slice, Scores]], count: int) -> Scores:
    """Sums over all parts of each of `count` sequences."""

    def join(name: str) -> Tensor | None:
        found = [(rows, getattr(part, name)) for rows, part in parts]
        if found[0][1] is None:
            return None
        total = torch.zeros(count, dtype=found[0][1].dtype)
        for rows, sums in found:
            total[rows] += sums
        return total

    return Scores(join("nll_nats"), join("correct"), join("kl_nats"), join("agreements"))


def _check_finite(
    sums: Tensor,  # (n,)
    subject: str,
) -> None:
    wrong = (~torch.isfinite(sums)).nonzero().flatten()
    if wrong.numel():
        raise ModelError(
            f"the outputs of the {subject} model are NaN or infinite on {wrong.numel()} of {sums.numel()} sequences "
            f"(first: number {int(wrong[0])}); its weights overflow or are damaged, make them anew"
        )
