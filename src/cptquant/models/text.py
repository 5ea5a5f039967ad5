"""Turn text into the fixed sets of tokens on which everything is measured."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from cptquant.core.errors import DataError, ModelError
from cptquant.models.corpus import CHUNK_CHARACTERS, Document, Split, Texts, read_texts
from cptquant.models.load import LoadedModel, quiet_transformers

__all__ = ["MINIMUM_EVALUATION_SEQUENCES", "Split", "Texts", "TokenSet", "load_tokens", "read_texts", "tokenize"]

MINIMUM_EVALUATION_SEQUENCES = 8
"""Evaluation text may be shorter than asked, down to this many sequences; below, an error means nothing."""
_CALIBRATION_SURPLUS = 4
"""Calibration sequences are drawn from about this many times the tokens needed."""
_EVALUATION_SURPLUS = 16
"""Evaluation windows are spread over documents with at most this many times the tokens needed."""
_BATCH_CHARACTERS = 1 << 18
"""Text tokenized at once."""
_UNLIMITED_LENGTH = 10**9
"""Tokenizers without a limit report a huge model_max_length."""


@dataclass(frozen=True)
class TokenSet:
    """Token sequences of one length.

    Attributes:
        input_ids: (n, T) int64. attention_mask: (n, T) int64, 1 = real token, 0 = padding (always on the right).
        labels: (n,) int64 class numbers for sequence classification, else None.
        documents: (n,) int64, the source document; standard errors are clustered by it.
        digest: sha256 over all of the above. description: where they come from, for reports.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    documents: Tensor
    digest: str
    description: str

    @classmethod
    def build(
        cls,
        input_ids: Tensor,  # (n, T) int64
        attention_mask: Tensor,  # (n, T) int64
        labels: Tensor | None,  # (n,) int64
        documents: Tensor,  # (n,) int64
        description: str,
    ) -> "TokenSet":
        """Make a set, with the digest of its content."""
        content = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
        for tensor in (input_ids, attention_mask, documents, *(() if labels is None else (labels,))):
            content.update(tensor.contiguous().numpy().tobytes())
        return cls(input_ids, attention_mask, labels, documents, content.hexdigest(), description)

    @property
    def sequence_count(self) -> int:
        """n."""
        return self.input_ids.shape[0]

    @property
    def token_count(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def subset(self, indices: Sequence[int] | Tensor | slice) -> "TokenSet":
        """The sequences at the given positions, in that order."""
        index = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        return TokenSet.build(
            self.input_ids[index], self.attention_mask[index], labels, self.documents[index], self.description
        )


def load_tokens(
    model: LoadedModel,
    source: str | Path | None,
    split: Split,
    *,
    sequences: int,
    length: int,
    seed: int,
) -> TokenSet:
    """Read and tokenize text for a model: `read_texts`, then `tokenize`; the embedded text if `source` is None."""
    return tokenize(read_texts(source, split, model.layout.task), model, sequences=sequences, length=length, seed=seed)


def tokenize(texts: Texts, model: LoadedModel, *, sequences: int, length: int, seed: int) -> TokenSet:
    """Cut text into sequences as the model's task needs them.

    Language models get windows of exactly `length` tokens from the documents joined by the tokenizer's end-of-sequence
    token, where it has one. Windows never overlap. Calibration draws them at random; evaluation takes consecutive ones
    from the beginning of plain text (as published perplexities do), and evenly spaced ones from a text of documents,
    so that many documents have a say. A masked language model's windows each stand between the special tokens its
    tokenizer adds. Classifiers and bare encoders get one example a row, with special tokens, padded on the right: a
    classifier's example is cut at `length`, a bare encoder's longer document becomes several rows. Of more rows than
    asked a random choice is taken, in file order.

    Args:
        sequences: how many; evaluation takes fewer, down to `MINIMUM_EVALUATION_SEQUENCES`, if the text is short.
        length: tokens per sequence, special tokens included; capped by what the model and its tokenizer can take.
        seed: of all random choices.

    Raises:
        DataError: the text is too short (tokens found, tokens needed), or has labels the model does not know.
        ModelError: the model has no tokenizer, or one that does not belong to it.
    """
    if sequences < 1 or length < 2:
        raise DataError(f"{sequences} sequences of {length} tokens were asked for; at least 1 of 2 are needed")
    tokenizer = model.require_tokenizer()
    length = _capped_length(length, model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with quiet_transformers():
        if model.layout.task in ("causal_lm", "masked_lm"):
            tokens = _windows(texts, model, tokenizer, sequences, length, generator)
        elif model.layout.task == "sequence_classification":
            tokens = _examples(texts, model, tokenizer, sequences, length, generator)
        else:
            tokens = _passages(texts, model, tokenizer, sequences, length, generator)
    top = int(tokens.input_ids.max())
    if top >= model.layout.vocabulary_size:
        raise ModelError(
            f"{model.layout.source}: the tokenizer gives token {top}, but the model knows only "
            f"{model.layout.vocabulary_size:,}; they do not belong together: copy the original's tokenizer files"
        )
    return tokens


def _capped_length(length: int, model: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    limits = [length]
    if model.layout.max_positions is not None:
        limits.append(model.layout.max_positions)
    if 1 < tokenizer.model_max_length < _UNLIMITED_LENGTH:
        limits.append(int(tokenizer.model_max_length))
    return min(limits)


# --- language models: windows of a stream -----------------------------------------------------------------------------


def _windows(
    texts: Texts,
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    generator: torch.Generator,
) -> TokenSet:
    prefix, suffix = _frame(tokenizer) if model.layout.task == "masked_lm" else ([], [])
    body = length - len(prefix) - len(suffix)
    sampled, plain = texts.split in ("calibration", "training"), texts.documents[0].first_character is not None
    order = torch.randperm(len(texts.documents), generator=generator).tolist() if sampled else None
    surplus = _CALIBRATION_SURPLUS if sampled else (1 if plain else _EVALUATION_SURPLUS)
    stream, clusters = _token_stream(texts, tokenizer, surplus * sequences * body, order)
    slots = stream.numel() // body
    if slots < _fewest(texts, sequences):
        raise _too_short(texts, stream.numel(), _fewest(texts, sequences), body, "tokens")
    taken = min(slots, sequences)
    if sampled:
        start = int(torch.randint(stream.numel() - slots * body + 1, (1,), generator=generator))
        chosen = torch.randperm(slots, generator=generator)[:taken].sort().values * body + start
    else:
        chosen = torch.arange(taken) * (1 if plain else slots) // (1 if plain else taken) * body
    ids = torch.stack([stream[first : first + body] for first in chosen.tolist()])
    framed = torch.cat([_column(prefix, len(ids)), ids, _column(suffix, len(ids))], dim=1)
    description = _describe(texts, len(ids), sequences, f"windows of {length} tokens")
    return TokenSet.build(framed, torch.ones_like(framed), None, clusters[chosen], description)


def _column(ids: list[int], rows: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64).expand(rows, len(ids))


def _token_stream(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, wanted: int, order: list[int] | None
) -> tuple[Tensor, Tensor]:
    """All tokens of as many documents as it takes to have `wanted`, in file order, and the cluster of each token.

    Args:
        order: in which order documents are taken until there are enough; None for file order.
    """
    separator = cast(int | None, tokenizer.eos_token_id)
    encoded: dict[int, list[int]] = {}
    count = 0
    for index, ids in _encoded(texts.documents, tokenizer, order or range(len(texts.documents))):
        encoded[index] = [*ids, separator] if separator is not None and texts.documents[index].ends else ids
        count += len(encoded[index])
        if count >= wanted:
            break
    pieces = [torch.tensor(encoded[index], dtype=torch.int64) for index in sorted(encoded)]
    clusters = [_clusters(texts.documents[index], len(encoded[index])) for index in sorted(encoded)]
    return torch.cat(pieces), torch.cat(clusters)


def _encoded(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, order: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Index and token ids of the documents, in the given order, tokenized as far as they are asked for."""
    part: list[int] = []
    characters = 0
    for place, index in enumerate(order, 1):
        part.append(index)
        characters += len(documents[index].text)
        if characters >= _BATCH_CHARACTERS or place == len(order):
            batch = tokenizer([documents[index].text for index in part], add_special_tokens=False, verbose=False)
            yield from zip(part, batch["input_ids"], strict=True)
            part, characters = [], 0


def _clusters(document: Document, tokens: int) -> Tensor:
    """(tokens,) int64. In plain text a token's character is taken as proportional to its position in the piece."""
    if document.first_character is None:
        return torch.full((tokens,), document.cluster, dtype=torch.int64)
    characters = document.first_character + torch.arange(tokens) * len(document.text) // max(1, tokens)
    return characters // CHUNK_CHARACTERS


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after a text, found by asking it."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    ids, special = probe["input_ids"], probe["special_tokens_mask"]
    ordinary = [place for place, mark in enumerate(special) if not mark]
    if not ordinary:
        raise ModelError('the tokenizer turns "a" into special tokens only; copy the original\'s tokenizer files')
    return list(ids[: ordinary[0]]), list(ids[ordinary[-1] + 1 :])


# --- classifiers and bare encoders: one example a row -----------------------------------------------------------------


def _examples(
    texts: Texts,
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    generator: torch.Generator,
) -> TokenSet:
    found = len(texts.documents)
    if found < _fewest(texts, sequences):
        raise _too_short(texts, found, _fewest(texts, sequences), 1, "examples")
    chosen = torch.randperm(found, generator=generator)[:sequences].sort().values.tolist()
    documents = [texts.documents[index] for index in chosen]
    rows = tokenizer(
        [document.text for document in documents], truncation=True, max_length=length, padding=False, verbose=False
    )["input_ids"]
    labels = torch.tensor([_label_number(document, texts, model) for document in documents], dtype=torch.int64)
    clusters = torch.tensor([document.cluster for document in documents], dtype=torch.int64)
    description = _describe(texts, len(rows), sequences, f"examples of at most {length} tokens")
    return TokenSet.build(*_padded(rows, model, tokenizer), labels, clusters, description)


def _label_number(document: Document, texts: Texts, model: LoadedModel) -> int:
    names = cast(dict[int, str], model.module.config.id2label or {})
    label = document.label
    if isinstance(label, int) and label in names:
        return label
    for number, name in names.items():
        if name == label:
            return number
    allowed = ", ".join(list(names.values())[:20]) + (", ..." if len(names) > 20 else "")
    raise DataError(
        f"{texts.flag} {texts.source}, line {document.row}: label {label!r} is unknown to {model.layout.source}; it "
        f"knows {allowed} (id2label in config.json), or their numbers 0 to {len(names) - 1}"
    )


def _passages(
    texts: Texts,
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    generator: torch.Generator,
) -> TokenSet:
    prefix, suffix = _frame(tokenizer)
    body = length - len(prefix) - len(suffix)
    rows: list[list[int]] = []
    places: list[tuple[int, int]] = []
    order = torch.randperm(len(texts.documents), generator=generator).tolist()
    for index, ids in _encoded(texts.documents, tokenizer, order):
        for start in range(0, len(ids), body):
            rows.append([*prefix, *ids[start : start + body], *suffix])
            places.append((index, start))
        if len(rows) >= _CALIBRATION_SURPLUS * sequences:
            break
    if len(rows) < _fewest(texts, sequences):
        raise _too_short(texts, len(rows), _fewest(texts, sequences), 1, "examples")
    chosen = torch.randperm(len(rows), generator=generator)[:sequences].tolist()
    chosen.sort(key=lambda row: places[row])
    clusters = torch.tensor([texts.documents[places[row][0]].cluster for row in chosen], dtype=torch.int64)
    description = _describe(texts, len(chosen), sequences, f"passages of at most {length} tokens")
    return TokenSet.build(*_padded([rows[row] for row in chosen], model, tokenizer), None, clusters, description)


def _padded(rows: list[list[int]], model: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """(n, T) ids and mask, T the longest row."""
    padding = getattr(model.module.config, "pad_token_id", None)
    padding = cast(int | None, tokenizer.pad_token_id if padding is None else padding)
    if padding is None and len({len(row) for row in rows}) > 1:
        raise ModelError(
            f"{model.layout.source} names no padding token, and examples of different length need one; set "
            "pad_token_id in config.json"
        )
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=padding or 0),
        pad_sequence(mask, batch_first=True, padding_value=0),
    )


# --- how much is enough -----------------------------------------------------------------------------------------------


def _fewest(texts: Texts, sequences: int) -> int:
    return sequences if texts.split == "calibration" else min(sequences, MINIMUM_EVALUATION_SEQUENCES)


def _too_short(texts: Texts, found: int, fewest: int, each: int, unit: str) -> DataError:
    needed = f"{fewest * each:,}" + (f" ({fewest} windows of {each})" if each > 1 else "")
    return DataError(
        f"{texts.description} is too short: {found:,} {unit} found, {needed} needed; give more text with {texts.flag}, "
        "or ask for fewer or shorter sequences"
    )


def _describe(texts: Texts, taken: int, asked: int, what: str) -> str:
    short = f" (of {asked} asked)" if taken < asked else ""
    return f"{texts.description}: {taken}{short} {what}"
