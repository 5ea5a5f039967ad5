"""Leave out what evaluation texts hold: by sequences of words, as data sets of language models are cleaned.

A training document is dropped if at least a share of its 13-word sequences (lower case, punctuation ignored) occur in
an evaluation text. 13 words are what GPT-3 compared (arXiv 2005.14165, appendix C); the share is ours: 0.2 by default,
so that a quoted sentence or a legal formula does not cost a page. Documents of fewer words have no such sequence and
are kept.
"""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cptquant.adaptation.sources import SourceDocument
from cptquant.core.errors import DataError

NGRAM_WORDS = 13
OVERLAP_SHARE = 0.2
_WORD = re.compile(r"\w+")


class OverlapFilter:
    """Knows the word sequences of evaluation texts.

    Args:
        share: documents with at least this share of known sequences are dropped. words: length of a sequence.

    Attributes:
        digest: of everything that a document's fate depends on.
    """

    def __init__(self, evaluation: Iterable[str], *, share: float = OVERLAP_SHARE, words: int = NGRAM_WORDS) -> None:
        self._share, self._words = share, words
        self._known: set[int] = set()
        content = hashlib.sha256(f"{share!r} {words}".encode())
        for text in evaluation:
            self._known.update(self._sequences(text))
            content.update(f"\n{len(text)} ".encode() + text.encode(errors="surrogatepass"))
        self.digest = content.hexdigest()

    def overlap(self, text: str) -> float | None:
        """Share of the text's sequences that an evaluation text holds; None if it is too short to have any."""
        sequences = self._sequences(text)
        return sum(found in self._known for found in sequences) / len(sequences) if sequences else None

    def clean(self, documents: Iterable[SourceDocument]) -> "Cleaning":
        """Drop what overlaps; the pieces of a plain text that remain follow each other."""
        return Cleaning(self, documents)

    def drops(self, share: float | None) -> bool:
        """Whether a document with this overlap is left out."""
        return share is not None and share >= self._share

    def _sequences(self, text: str) -> list[int]:
        words = _WORD.findall(text.lower())
        return [hash(tuple(words[start : start + self._words])) for start in range(len(words) - self._words + 1)]


class Cleaning:
    """Documents that remain, one after the other; one is held back, since what is dropped after it may end it.

    Attributes:
        kept: how many have come. dropped: how many have not. short: kept ones too short to be compared.
    """

    def __init__(self, cleaner: OverlapFilter, documents: Iterable[SourceDocument]) -> None:
        self._cleaner, self._documents = cleaner, documents
        self.kept = self.dropped = self.short = 0

    def __iter__(self) -> Iterator[SourceDocument]:
        last: SourceDocument | None = None
        for document in self._documents:
            share = self._cleaner.overlap(document.text)
            if self._cleaner.drops(share):
                self.dropped += 1
                if document.ends and last is not None:
                    last = replace(last, ends=True)
                continue
            self.kept += 1
            self.short += share is None
            if last is not None:
                yield last
            last = document
        if last is not None:
            yield last


@dataclass(frozen=True)
class Survey:
    """A source after a first reading, which holds none of it but its end.

    Attributes:
        documents, characters: how many. digest: sha256 over all of them.
        ending: the last documents, as many as a held-out tail can need.
    """

    documents: int
    characters: int
    digest: str
    ending: tuple[SourceDocument, ...]

    def tail(self, *, wanted: int, fewest: int) -> tuple[SourceDocument, ...]:
        """The last documents, which are not to be trained on.

        Args:
            wanted: characters that evaluation can use, at most those of `survey`; a tenth of the source is the limit,
                but not below `fewest`, without which there is no evaluation, and half the source is never exceeded.
        """
        limit = min(wanted, max(0.1 * self.characters, fewest))
        taken, start = 0, len(self.ending)
        first = 1 if len(self.ending) == self.documents else 0  # one at least is trained on
        while start > first and taken < limit and taken + len(self.ending[start - 1].text) <= 0.5 * self.characters:
            start -= 1
            taken += len(self.ending[start].text)
        return self.ending[start:]


def survey(documents: Iterable[SourceDocument], *, wanted: int) -> Survey:
    """Read a source once.

    Args:
        wanted: characters of its end to keep, in whole documents.
    """
    content, count, characters = hashlib.sha256(), 0, 0
    ending, held = deque[SourceDocument](), 0
    for document in documents:
        count, characters = count + 1, characters + len(document.text)
        content.update(_bytes_of(document))
        ending.append(document)
        held += len(document.text)
        while len(ending) > 1 and held - len(ending[0].text) >= wanted:
            held -= len(ending.popleft().text)
    return Survey(count, characters, content.hexdigest(), tuple(ending))


def training_part(
    documents: Iterable[SourceDocument], surveyed: Survey, tail: int, flag: str
) -> Iterator[SourceDocument]:
    """A source read again without its last documents; what is then the last one ends.

    Args:
        tail: how many are left out. flag: how the command line spells the source.

    Raises:
        DataError: at the end, if the documents are others than the first time.
    """
    content, last = hashlib.sha256(), surveyed.documents - tail
    for number, document in enumerate(documents, 1):
        content.update(_bytes_of(document))
        if number <= last:
            yield replace(document, ends=True) if number == last else document
    if content.hexdigest() != surveyed.digest:
        raise DataError(f"{flag} changed while it was read; leave the files alone and run the same command again")


def _bytes_of(document: SourceDocument) -> bytes:
    head = f"{len(document.text)} {document.ends:d} "
    return head.encode() + document.text.encode(errors="surrogatepass")
