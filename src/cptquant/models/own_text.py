"""More calibration text than a person has: sequences that the model writes itself.

GPTQ's second moments and learned rounding take what a hundred sequences happen to show for how the model is used.
On 128 x 256 tokens reference-llama's GPTQ at 3 bits has a KL of .0120 on the text it was calibrated on and .0167 on
other text; with 896 more sequences written by the model itself, .0122 and .0117 (docs/log.md). What the model writes
costs no data, comes from about the distribution it was trained on, and the original's own predictions are all that is
compared with, so nothing needs to be true of it.

Each sequence continues a few tokens from a random place of the calibration text by ancestral sampling at temperature
1, over the end of a document where that comes, as windows of calibration text do (LLM-QAT, arXiv 2305.17888, section
2.1; it starts from a random token and takes the first few greedily. Starting from the person's text keeps to its
subject).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cptquant.core.errors import ModelError
from cptquant.models.load import LoadedModel, quiet_transformers
from cptquant.models.text import TokenSet

_PROMPT_TOKENS = 8
_LARGEST_BATCH = 128
_BATCH_BYTES = 1 << 28
"""Keys, values and logits of the sequences written together."""
_CHECKED = 4
"""Sequences whose last prediction is made again without a cache."""
_CACHE_NATS = 0.1
"""Largest divergence between the two: rounding to 16 bits makes far less, ignoring the cache far more."""
_REFUSALS = (
    TypeError, ValueError, AttributeError, NotImplementedError, LookupError, AssertionError, RuntimeError,
)  # fmt: skip
"""How models fail that were not written for a cache of keys and values; also where memory runs out."""
NO_DOCUMENT = -1
"""`TokenSet.documents` of what the model wrote."""


class OwnTextError(ModelError):
    """A causal language model that cannot write calibration text.

    Attributes:
        reason: why, without what to do about it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; use --own-text 0, which calibrates on the given text alone")
        self.reason = reason


def write_own_text(
    model: LoadedModel,
    text: TokenSet,
    sequences: int,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> TokenSet:
    """Sequences of the same length as the calibration text, written by the model itself.

    The result depends on the model, the text, the count and the seed; on another processor or with another number of
    threads a token may differ.

    Args:
        model: a causal language model. text: where the first tokens of each sequence come from.
        sequences: how many, 1 or more. progress: called with (tokens a sequence has, tokens it will have, over all
            batches).

    Raises:
        ModelError: not a causal language model. OwnTextError: it does not go on from the keys and values kept in a
            cache, or its predictions are not finite.
    """
    if model.layout.task != "causal_lm":
        raise ModelError(f"{model.layout.source} is for {model.layout.task}; only causal language models write text")
    length = text.input_ids.shape[1]
    batch = _batch_size(model, length)
    generator = torch.Generator().manual_seed(seed)
    prompts = _prompts(text, sequences, min(_PROMPT_TOKENS, length - 1), generator)
    parts: list[Tensor] = []
    count, steps = -(-sequences // batch), length - prompts.shape[1]

    def show(step: int) -> None:
        if progress is not None:
            progress(len(parts) * steps + step, count * steps)

    with quiet_transformers(), torch.no_grad():
        for part in prompts.split(batch):
            try:
                ids, last = _continue(model, part, length, generator, show)
            except _REFUSALS as error:
                raise _no_cache(model, str(error)) from error
            if not parts:
                _check_cache(model, ids, last)
            parts.append(ids)
    ids = torch.cat(parts)
    documents = torch.full((sequences,), NO_DOCUMENT, dtype=torch.int64)
    return TokenSet.build(
        ids, torch.ones_like(ids), None, documents, f"{sequences} windows of {length} tokens the model wrote itself"
    )


def join_texts(first: TokenSet, second: TokenSet) -> TokenSet:
    """Both one after the other; of one length, without labels."""
    return TokenSet.build(
        torch.cat([first.input_ids, second.input_ids]),
        torch.cat([first.attention_mask, second.attention_mask]),
        None,
        torch.cat([first.documents, second.documents]),
        f"{first.description}, and {second.description}",
    )


def _prompts(text: TokenSet, sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """(sequences, length) consecutive tokens from random places of random sequences."""
    rows = torch.randint(text.sequence_count, (sequences,), generator=generator)
    starts = torch.randint(text.input_ids.shape[1] - length + 1, (sequences,), generator=generator)
    return text.input_ids[rows].gather(1, starts.unsqueeze(1) + torch.arange(length))


def _continue(
    model: LoadedModel, prompts: Tensor, length: int, generator: torch.Generator, show: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """The sequences, (b, length) int64, and the logits from which their last tokens were drawn, (b, vocabulary)."""
    module, device = model.module, model.module.device
    cache = DynamicCache(config=module.config)
    cache.layers = [_Reserved(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    ids = torch.empty(len(prompts), length, dtype=torch.int64)
    known = prompts.shape[1]
    ids[:, :known] = prompts
    fresh, last = ids[:, :known], torch.empty(0)
    for end in range(known, length):
        output = module(
            input_ids=fresh.to(device),
            attention_mask=torch.ones(len(ids), end, dtype=torch.int64, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        last = output.logits[:, -1].float().cpu()
        ids[:, end] = _draw(last, generator, model)
        fresh = ids[:, end : end + 1]
        show(end + 1 - known)
    return ids, last


def _check_cache(model: LoadedModel, ids: Tensor, last: Tensor) -> None:
    """A model that ignored the cache would have written every token from the one before it alone."""
    few = ids[:_CHECKED, :-1]
    whole = model.module(input_ids=few.to(model.module.device), use_cache=False).logits[:, -1].float().cpu()
    expected, found = whole.log_softmax(-1), last[:_CHECKED].log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(dim=-1).mean())
    if not divergence < _CACHE_NATS:
        raise _no_cache(model, f"its predictions differ by {divergence:.2g} nats from those made without a cache")


def _no_cache(model: LoadedModel, reason: str) -> OwnTextError:
    return OwnTextError(
        f"{model.layout.source}: {model.layout.architecture} cannot go on from keys and values kept in a cache "
        f"({reason})"
    )


def _draw(logits: Tensor, generator: torch.Generator, model: LoadedModel) -> Tensor:
    """A token a row by the inverse of the cumulative distribution; tokens beyond the vocabulary are never drawn."""
    chances = torch.softmax(logits[:, : model.layout.vocabulary_size], dim=-1).cumsum(dim=-1)
    totals = chances[:, -1:]
    if not bool(torch.isfinite(totals).all()):
        raise OwnTextError(f"{model.layout.source} overflows while it writes calibration text")
    places = torch.rand(len(logits), 1, generator=generator) * totals
    return torch.searchsorted(chances, places, right=True).clamp_(max=chances.shape[1] - 1).squeeze(1)


def _batch_size(model: LoadedModel, length: int) -> int:
    """Sequences whose keys and values (at most the width of the hidden state, each) and logits fit."""
    layout = model.layout
    width = int(getattr(model.module.config.get_text_config(), "hidden_size", 0) or 0)
    item = torch.finfo(model.module.dtype).bits // 8
    a_sequence = 2 * item * layout.block_count * width * length + 12 * layout.vocabulary_size
    return max(1, min(_LARGEST_BATCH, _BATCH_BYTES // a_sequence))


class _Reserved(DynamicLayer):
    """Keys and values in memory that is there from the beginning: appending to `DynamicLayer` copies all of it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append in place; returns views of all keys and values, (b, heads, tokens, head width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (self._reserve(key_states), self._reserve(value_states))
        assert self._buffers is not None
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _reserve(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-2], self._length, states.shape[-1])
