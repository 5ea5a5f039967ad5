"""Leave out what evaluation texts hold: by sequences of words, as data sets of language models are cleaned.

A training document is dropped if at least a share of its 13-word sequences (lower case, punctuation ignored) occur in
an evaluation text. 13 words are what GPT-3 compared (arXiv 2005.14165, appendix C); the share is ours: 0.2 by default,
so that a quoted sentence or a legal formula does not cost a page. Documents of fewer words have no such sequence and
are kept.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cptquant.adaptation.sources import SourceDocument

NGRAM_WORDS = 13
OVERLAP_SHARE = 0.2
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Cleaned:
    """Attributes: kept: in order. dropped: how many were not. short: kept ones too short to be compared."""

    kept: tuple[SourceDocument, ...]
    dropped: int
    short: int


class OverlapFilter:
    """Knows the word sequences of evaluation texts.

    Args:
        share: documents with at least this share of known sequences are dropped. words: length of a sequence.
    """

    def __init__(self, evaluation: Iterable[str], *, share: float = OVERLAP_SHARE, words: int = NGRAM_WORDS) -> None:
        self._share, self._words = share, words
        self._known: set[int] = set()
        for text in evaluation:
            self._known.update(self._sequences(text))

    def overlap(self, text: str) -> float | None:
        """Share of the text's sequences that an evaluation text holds; None if it is too short to have any."""
        sequences = self._sequences(text)
        return sum(found in self._known for found in sequences) / len(sequences) if sequences else None

    def clean(self, documents: Iterable[SourceDocument]) -> Cleaned:
        """Drop what overlaps; the pieces of a plain text that remain follow each other."""
        kept: list[SourceDocument] = []
        dropped = short = 0
        for document in documents:
            share = self.overlap(document.text)
            short += share is None
            if share is None or share < self._share:
                kept.append(document)
                continue
            dropped += 1
            if document.ends and kept:
                kept[-1] = replace(kept[-1], ends=True)
        return Cleaned(tuple(kept), dropped, short)

    def _sequences(self, text: str) -> list[int]:
        words = _WORD.findall(text.lower())
        return [hash(tuple(words[start : start + self._words])) for start in range(len(words) - self._words + 1)]


def hold_out_tail(
    documents: Sequence[SourceDocument], *, wanted: int, fewest: int
) -> tuple[tuple[SourceDocument, ...], tuple[SourceDocument, ...]]:
    """Training documents, and the last ones, which are not trained on.

    Args:
        wanted: characters that evaluation can use; a tenth of the source is the limit, but not below `fewest`, without
            which there is no evaluation, and half the source is never exceeded.
    """
    total = sum(len(document.text) for document in documents)
    limit = min(wanted, max(0.1 * total, fewest))
    taken, start = 0, len(documents)
    while start > 1 and taken < limit and taken + len(documents[start - 1].text) <= 0.5 * total:
        start -= 1
        taken += len(documents[start].text)
    training, tail = list(documents[:start]), tuple(documents[start:])
    if tail:
        training[-1] = replace(training[-1], ends=True)
    return tuple(training), tail
