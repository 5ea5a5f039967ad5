"""Tokenised sources in files: written once, batch by batch, and read as memory-mapped arrays.

SOURCE/tokens.i32    every document's tokens, one after the other, little-endian int32
       starts.i64    where each document begins, and the number of tokens; little-endian int64
       source.json   how many, and the digest of both

The folder gets its name only when everything stands in it. Whoever opens it (this process again after a kill, another
process of torchrun, a worker of Ray) checks the digest. Training touches single windows: of a source larger than
memory only these are read.
"""

import hashlib
import json
import mmap
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cptquant.adaptation.overlap import survey, training_part
from cptquant.adaptation.sources import SourceDocument
from cptquant.core.artifact import digest_json, output_error
from cptquant.core.errors import ArtifactError, DataError, ModelError
from cptquant.core.provenance import installed_versions

_TOKENS, _STARTS, _RECORD = "tokens.i32", "starts.i64", "source.json"
_BATCH_CHARACTERS = 1 << 18
"""Text tokenised at once."""
_BLOCK_BYTES = 1 << 20
_PARTIAL = ".partial"


@dataclass(frozen=True)
class TokenSource:
    """One source, tokenised once.

    Attributes:
        name: "domain", "general", "instructions", "preferences", or a corpus of a sweep.
        tokens: (n,) int32, every document followed by the tokenizer's end-of-sequence token where it has one.
        starts: (documents + 1,) int64, where each document begins; the last entry is n.
        digest: sha256 of both. folder: where they stand; None for arrays in memory.
        facts: what the maker wanted kept with it.
    """

    name: str
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    digest: str
    folder: Path | None = None
    facts: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def build(cls, name: str, tokens: NDArray[np.int32], starts: NDArray[np.int64]) -> "TokenSource":
        """Make a source of arrays in memory, with the digest of its content."""
        content = hashlib.sha256(repr((len(tokens), len(starts))).encode())
        content.update(np.ascontiguousarray(tokens).data)
        content.update(np.ascontiguousarray(starts).data)
        return cls(name, tokens, starts, content.hexdigest())

    @property
    def document_count(self) -> int:
        """Documents; pieces of one plain text count once."""
        return len(self.starts) - 1


def tokenise_source(
    name: str, texts: Iterable[str | SourceDocument], tokenizer: PreTrainedTokenizerBase, folder: Path, *,
    flag: str | None = None, facts: Callable[[], Mapping[str, int]] = dict[str, int],
) -> TokenSource:  # fmt: skip
    """Tokenise documents into one stream on disk; a plain string is a document of its own.

    Args:
        folder: gets the files; what stands there is replaced. flag: how the command line spells this source, for
            messages; `--NAME` if None. facts: asked at the end for what to keep with the source.

    Raises:
        DataError: no text at all. ModelError: the tokenizer makes nothing of it. OutputError: the disk is full.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        written = _write_stream(partial, texts, tokenizer)
        if not written.pieces:
            raise DataError(f"{flag or '--' + name} holds no text; give documents with words in them")
        if not written.words:
            raise ModelError(
                f"the tokenizer makes no token of {flag or '--' + name}; copy the original's tokenizer files"
            )
        _finish(partial, folder, written.tokens, written.documents, facts())
    except OSError as error:
        raise output_error(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_source(name, folder)


def save_source(source: TokenSource, folder: Path) -> None:
    """Write a source that stands in memory."""
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    source.tokens.astype("<i4").tofile(partial / _TOKENS)
    source.starts.astype("<i8").tofile(partial / _STARTS)
    _finish(partial, folder, len(source.tokens), source.document_count, source.facts)


def open_source(name: str, folder: Path) -> TokenSource:
    """A source whose files are whole.

    Raises:
        ArtifactError: missing, or others than were written.
    """
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        tokens, documents, digest = int(record["tokens"]), int(record["documents"]), str(record["digest"])
        if _digest(folder, tokens, documents) != digest:
            raise ValueError("its digest is another than when it was written")
        return TokenSource(
            name, _mapped(folder / _TOKENS, "<i4", tokens), _mapped(folder / _STARTS, "<i8", documents + 1), digest,
            folder, dict(record["facts"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} holds no whole tokens ({error}); run the same command again") from None


def find_source(name: str, folder: Path) -> TokenSource | None:
    """A source if it stands and is whole."""
    try:
        return open_source(name, folder) if folder.is_dir() else None
    except ArtifactError:
        return None


def is_source_of(name: str, folder: Path) -> bool:
    """Whether a folder bears the name of a source with its key."""
    return folder.is_dir() and folder.name.rpartition("-")[0] == name and not folder.name.endswith(_PARTIAL)


def tokenise_once(
    name: str, read: Callable[[], Iterable[SourceDocument]], tokenizer: PreTrainedTokenizerBase, folder: Path, *,
    flag: str | None = None,
) -> TokenSource:  # fmt: skip
    """All of a source, read once to know it, and once more where its tokens do not stand yet.

    Args:
        folder: for tokens of all sources, each in a folder named after it and its key.
    """
    text = survey(read(), wanted=0)
    place = folder / f"{name}-{source_key(text.digest, tokenizer)}"
    documents = training_part(read(), text, 0, flag or f"--{name}")
    return find_source(name, place) or tokenise_source(name, documents, tokenizer, place, flag=flag)


def source_key(text_digest: str, tokenizer: PreTrainedTokenizerBase, *more: object) -> str:
    """Short digest of everything tokens depend on: the text, the tokenizer with its library, and what else is told."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    parts = [type(tokenizer).__name__, vocabulary, cast(int | None, tokenizer.eos_token_id)]
    return digest_json([text_digest, *parts, installed_versions(("transformers", "tokenizers")), *more])[:16]


@dataclass
class _Written:
    """Counts of a stream on its way; words are its tokens without separators."""

    pieces: int = 0
    tokens: int = 0
    words: int = 0
    documents: int = 0


def _write_stream(
    folder: Path, texts: Iterable[str | SourceDocument], tokenizer: PreTrainedTokenizerBase
) -> _Written:  # fmt: skip
    separator, begun = cast(int | None, tokenizer.eos_token_id), False
    written = _Written()
    with open(folder / _TOKENS, "wb") as tokens, open(folder / _STARTS, "wb") as starts:
        starts.write(np.zeros(1, "<i8").tobytes())
        for ids, ends in _encoded(texts, tokenizer):
            written.words += len(ids)
            if ends and separator is not None:
                ids = [*ids, separator]
            tokens.write(np.asarray(ids, dtype="<i4").tobytes())
            written.pieces += 1
            written.tokens += len(ids)
            begun = not ends
            if ends:
                written.documents += 1
                starts.write(np.asarray([written.tokens], dtype="<i8").tobytes())
        if begun:
            written.documents += 1
            starts.write(np.asarray([written.tokens], dtype="<i8").tobytes())
    return written


def _encoded(
    texts: Iterable[str | SourceDocument], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of every piece and whether its document ends there."""
    batch: list[SourceDocument] = []
    characters = 0
    for text in texts:
        document = SourceDocument(text) if isinstance(text, str) else text
        if not document.text.strip():
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from _encode(batch, tokenizer)
            batch, characters = [], 0
    yield from _encode(batch, tokenizer)


def _encode(batch: list[SourceDocument], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bool]]:
    if batch:
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False)
        for ids, document in zip(encoded["input_ids"], batch, strict=True):
            yield ids, document.ends


def _finish(partial: Path, folder: Path, tokens: int, documents: int, facts: Mapping[str, int]) -> None:
    """Write the record, and give the folder its name."""
    record = {"tokens": tokens, "documents": documents, "digest": _digest(partial, tokens, documents)}
    (partial / _RECORD).write_text(json.dumps({**record, "facts": dict(facts)}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _digest(folder: Path, tokens: int, documents: int) -> str:
    """What `TokenSource.build` makes of the same arrays, without holding them."""
    content = hashlib.sha256(repr((tokens, documents + 1)).encode())
    for name in (_TOKENS, _STARTS):
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                content.update(block)
    return content.hexdigest()


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """(count,) array of a file, whose pages are read when they are touched."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # windows come in random order: reading ahead would read in vain
    return np.frombuffer(mapped, dtype=dtype, count=count)
