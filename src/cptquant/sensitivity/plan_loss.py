"""The divergence of many plans that differ in a few sites: one walk through the blocks, each from its first change.

KL(original ‖ plan) per sequence, as `KL = sum p log p - <p, z> + log sum exp z` with p the original's predictions and z
the plan's logits: the original's part is computed once for all plans. In float32 this is off by about 1e-6 nats a
token, far below what swaps change.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cptquant.core.errors import UserError
from cptquant.models.load import LoadedModel
from cptquant.models.losses import IGNORED
from cptquant.models.stream import ModelStream, WeightSource, site_modules
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.sensitivity.loss import pose_question
from cptquant.sensitivity.perturbation import changed_weights, run_block_on_all

Change = Mapping[str, Tensor | StoredWeight]
"""Site inside the blocks -> its weight (out_features, in_features) in place of the plan's; dequantized where it is run,
so that all changes together take no more memory than they are stored in."""

_BATCH_SIZE = 8
_LOGITS_AT_ONCE = 1 << 23
_VARIANT_BYTES = 256 << 20
"""Hidden states of changed models carried through the blocks at once."""


class PlanLoss:
    """Judges changes of a quantized model on a fixed text.

    Args:
        model: the original; never changed. weights: the quantized model that is changed.
        tokens: what it is judged on; the original runs over all of it once, and its last hidden states are kept.

    Raises:
        UserError: a bare encoder, which has no divergence of predictions. DataError: a classifier without labels.
    """

    def __init__(self, model: LoadedModel, weights: WeightSource, tokens: TokenSet) -> None:
        if model.layout.task == "encoder":
            raise UserError(
                "--refine-swaps judges swaps by the KL of predictions, and a bare encoder makes none; leave it out"
            )
        self._model, self._weights, self._layout = model, weights, model.layout
        question = pose_question(model, tokens)
        assert question.targets is not None  # only bare encoders have none
        scored = (question.targets != IGNORED).reshape(len(question.targets), -1)
        keep = scored.any(dim=1).nonzero().flatten()
        self._tokens, self._scored = question.tokens.subset(keep), scored[keep]
        stream = self._new_stream(self._tokens, None)
        for _ in range(self._layout.block_count):
            stream.advance(stream.load_block())
        self._reference = torch.cat(stream.hidden)

    @property
    def sequence_count(self) -> int:
        """Sequences with something to predict."""
        return self._tokens.sequence_count

    def _new_stream(self, tokens: TokenSet, weights: WeightSource | None) -> ModelStream:
        return ModelStream(self._model, tokens, weights=weights, batch_size=_BATCH_SIZE)

    @torch.no_grad()
    def losses(self, changes: Sequence[Change], sequences: Sequence[int]) -> NDArray[np.float64]:
        """KL in nats per scored position, (changes, sequences); an empty change is the quantized model itself."""
        chosen = torch.as_tensor(list(sequences), dtype=torch.int64)
        tokens = self._tokens.subset(chosen)
        original = self._new_stream(tokens, None)
        original.hidden = list(self._reference[chosen].split(_BATCH_SIZE))
        one_bytes = 4 * int(self._reference[0].numel()) * len(chosen)
        at_once = max(1, _VARIANT_BYTES // one_bytes)
        parts: list[Tensor] = []
        for start in range(0, len(changes), at_once):
            stream = self._new_stream(tokens, self._weights)
            variants = self._run(stream, changes[start : start + at_once])
            parts.append(self._judge(original, stream, variants, self._scored[chosen]))
        return torch.cat(parts).numpy()

    def _run(self, stream: ModelStream, changes: Sequence[Change]) -> list[list[Tensor]]:
        """Last hidden states of every change, per batch; the stream itself is carried to its end unchanged."""
        by_block = [self._split(change) for change in changes]
        states: list[list[Tensor] | None] = [None] * len(changes)
        for index in range(self._layout.block_count):
            block = stream.load_block()
            modules = site_modules(block, self._layout, index)
            for number, change in enumerate(by_block):
                before = states[number]
                if before is None and index not in change:
                    continue
                weights = {name: _dequantize(weight) for name, weight in change.get(index, {}).items()}
                with changed_weights(modules, self._layout, weights):
                    states[number] = run_block_on_all(stream, block, index, before or stream.hidden)
            stream.advance(block)
        return [stream.hidden if found is None else found for found in states]

    def _split(self, change: Change) -> dict[int, dict[str, Tensor | StoredWeight]]:
        found: dict[int, dict[str, Tensor | StoredWeight]] = {}
        for name, weight in change.items():
            block_index = self._layout.site_by_name[name].block_index
            if block_index is None:
                raise ValueError(f"{name} lies outside the blocks, where swaps do not reach")
            found.setdefault(block_index, {})[name] = weight
        return found

    def _judge(
        self,
        original: ModelStream,
        stream: ModelStream,
        variants: Sequence[Sequence[Tensor]],  # per change and batch (b, T, d)
        scored: Tensor,  # (n, positions) bool
    ) -> Tensor:
        """(changes, sequences) float64."""
        totals = torch.zeros(len(variants), len(scored), dtype=torch.float64)
        for batch, rows in enumerate(torch.arange(len(scored)).split(_BATCH_SIZE)):
            for part in self._slices(original.hidden[batch]):
                mask = scored[rows] if part is None else scored[rows, part]
                sequence_of = rows[mask.nonzero()[:, 0]]
                log_p = torch.log_softmax(_at(original.finish(batch, _cut(original.hidden[batch], part)), mask), dim=-1)
                p = log_p.exp()
                own = (p * log_p).sum(dim=-1)
                for number, states in enumerate(variants):
                    logits = _at(stream.finish(batch, _cut(states[batch], part)), mask)
                    kl = own + torch.logsumexp(logits, dim=-1) - torch.linalg.vecdot(p, logits)
                    totals[number].index_add_(0, sequence_of, kl.double())
        return totals / scored.sum(dim=1)

    def _slices(self, hidden: Tensor) -> Iterator[slice | None]:
        """Parts of a sequence that can be finished by themselves: only a language model's head works per token."""
        if self._layout.task == "sequence_classification":
            yield None
            return
        step = max(1, _LOGITS_AT_ONCE // (len(hidden) * max(1, self._layout.vocabulary_size)))
        for start in range(0, hidden.shape[1], step):
            yield slice(start, min(start + step, hidden.shape[1]))


def _dequantize(weight: Tensor | StoredWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def _cut(hidden: Tensor, part: slice | None) -> Tensor:
    return hidden if part is None else hidden[:, part]


def _at(logits: Tensor, scored: Tensor) -> Tensor:
    """(m, V) float32 logits at the scored positions of (b, T, V), or of (b, C)."""
    return (logits.unsqueeze(1) if logits.ndim == 2 else logits)[scored].float()
