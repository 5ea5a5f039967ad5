"""How text was read when all of it was held in memory: slow and plain, what streaming must equal."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cptquant.adaptation.overlap import OverlapFilter
from cptquant.adaptation.sources import SourceDocument
from cptquant.adaptation.token_files import TokenSource


def pieces(text: str) -> Iterator[SourceDocument]:
    start = 0
    blank = re.compile(r"\n[ \t]*\n\s*")
    while start < len(text):
        end = len(text)
        if start + 1000 < end:
            limit = min(end, start + 8000)
            found = blank.search(text, start + 1000, limit)
            line = text.find("\n", start + 1000, limit)
            end = found.end() if found else line + 1 if line >= 0 else limit
        yield SourceDocument(text[start:end], ends=end == len(text))
        start = end


def clean(cleaner: OverlapFilter, documents: Sequence[SourceDocument], share: float) -> list[SourceDocument]:
    kept: list[SourceDocument] = []
    for document in documents:
        overlap = cleaner.overlap(document.text)
        if overlap is None or overlap < share:
            kept.append(document)
        elif document.ends and kept:
            kept[-1] = replace(kept[-1], ends=True)
    return kept


def hold_out_tail(
    documents: Sequence[SourceDocument], *, wanted: int, fewest: int
) -> tuple[list[SourceDocument], list[SourceDocument]]:
    total = sum(len(document.text) for document in documents)
    limit = min(wanted, max(0.1 * total, fewest))
    taken, start = 0, len(documents)
    while start > 1 and taken < limit and taken + len(documents[start - 1].text) <= 0.5 * total:
        start -= 1
        taken += len(documents[start].text)
    training, tail = list(documents[:start]), list(documents[start:])
    if tail:
        training[-1] = replace(training[-1], ends=True)
    return training, tail


def tokenise(name: str, documents: Sequence[SourceDocument], tokenizer: Any) -> TokenSource:
    ids: list[int] = []
    starts, open_document = [0], False
    for document in documents:
        if not document.text.strip():
            continue
        ids += tokenizer([document.text], add_special_tokens=False, verbose=False)["input_ids"][0]
        open_document = not document.ends
        if document.ends:
            ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            starts.append(len(ids))
    if open_document:
        starts.append(len(ids))
    return TokenSource.build(name, np.asarray(ids, dtype=np.int32), np.asarray(starts, dtype=np.int64))
