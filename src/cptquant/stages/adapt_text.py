"""Text of an adaptation: sources cleaned and tokenised, held-out text, and the mixture.

Every source is read twice: once to check, count and know it, and once to clean and tokenise it into a file of the run
(`adaptation/token_files.py`). A later call that finds the file, or another process of the same training, reads once.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cptquant.adaptation.methods import AdaptationMethod
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.overlap import Cleaning, OverlapFilter, Survey, survey, training_part
from cptquant.adaptation.sources import Records, SourceDocument, embedded_documents, read_documents, read_records
from cptquant.adaptation.token_files import TokenSource, find_source, source_key, tokenise_source
from cptquant.core.adaptation import AdaptationRequest, SourceRecord
from cptquant.core.errors import DataError
from cptquant.core.mixture import CHAT_SOURCES, check_epochs, divide_tokens
from cptquant.models.corpus import Document, Texts
from cptquant.models.load import LoadedModel
from cptquant.models.text import MINIMUM_EVALUATION_SEQUENCES, TokenSet, tokenize

_CHARACTERS_PER_TOKEN = 6
"""Generous, so that a held-out tail has enough tokens."""


@dataclass(frozen=True)
class AdaptationText:
    """Everything that is read.

    Attributes:
        mixture: of stage 1. held_out: "domain", "general" -> windows. sources: what became of each source.
        instructions, preferences: records for stage 2. notes: what a person should know.
    """

    mixture: Mixture
    held_out: dict[str, TokenSet]
    sources: tuple[SourceRecord, ...]
    instructions: Records | None
    preferences: Records | None
    notes: tuple[str, ...]


@dataclass
class _Reading:
    """One source on its way.

    Attributes:
        read: gives all its documents, as often as it is called. tail: the last of them, not trained on.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[], Iterable[SourceDocument]]
    survey: Survey
    tail: tuple[SourceDocument, ...] = ()

    @property
    def flag(self) -> str:
        return f"--{self.name} {', '.join(self.files)}"


def read_adaptation_text(
    model: LoadedModel, request: AdaptationRequest, method: AdaptationMethod, folder: Path, asked: Sequence[str] = ()
) -> AdaptationText:
    """Read, hold out, clean, tokenise and mix.

    Args:
        folder: for the tokens of the sources, a folder each; those that stand are used again.
        asked: text of questions, which training documents must not hold either.

    Raises:
        DataError: unusable text, too little of it, or too much asked of it. OutputError: the disk is full.
    """
    tokenizer, notes = model.require_tokenizer(), list[str]()
    chat = {
        name: read_records(getattr(request, name), f"--{name}", preferences=name == "preferences")
        for name in CHAT_SOURCES if getattr(request, name)
    }  # fmt: skip
    readings = _read_sources(request, method, chat, notes)
    held_out = {name: text for name in ("domain", "general") if (text := _held_out(name, model, request, readings))}
    evaluation = [*asked, *(document.text for texts in held_out.values() for document in texts[1])]
    cleaner = OverlapFilter(evaluation, share=request.overlap)
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-sequence token: documents follow each other without a mark between")
    shares = divide_tokens(_ratio(request, method), request.chat_share if method.chat else 0.0, list(readings))
    sources = {name: _tokenise(readings[name], cleaner, tokenizer, folder) for name in shares}
    mixture = _mix(list(sources.values()), list(shares.values()), request)
    counts = {count.name: count for count in mixture.counts()}
    notes += [
        f"{name} text was read {count.epochs:.1f} times: it holds {count.held_tokens:,} tokens"
        for name, count in counts.items() if count.epochs > 1
    ]  # fmt: skip
    records = tuple(
        SourceRecord(
            name=name, files=reading.files, documents=reading.survey.documents,
            dropped=sources[name].facts["dropped"], held_out=len(reading.tail), count=counts[name],
        )
        for name, reading in readings.items() if name in counts
    )  # fmt: skip
    tokens = {name: texts[0] for name, texts in held_out.items()}
    return AdaptationText(mixture, tokens, records, chat.get("instructions"), chat.get("preferences"), tuple(notes))


def _ratio(request: AdaptationRequest, method: AdaptationMethod) -> float:
    return method.ratio if request.ratio is None else request.ratio


def _read_sources(
    request: AdaptationRequest, method: AdaptationMethod, chat: dict[str, Records], notes: list[str]
) -> dict[str, _Reading]:
    kept = request.eval_sequences * request.window * _CHARACTERS_PER_TOKEN

    def reading(name: str, files: tuple[str, ...], read: Callable[[], Iterable[SourceDocument]]) -> _Reading:
        return _Reading(name, files, read, survey(read(), wanted=kept))

    found: dict[str, _Reading] = {}
    if request.domain:
        found["domain"] = reading("domain", request.domain, lambda: read_documents(request.domain, "--domain"))
    if request.general:
        found["general"] = reading("general", request.general, lambda: read_documents(request.general, "--general"))
    for name, records in chat.items() if method.chat else ():
        found[name] = reading(name, getattr(request, name), _AsText(records))
    if method.general and "general" not in found and "general" in _wanted(request, method, found):
        found["general"] = reading("general", ("embedded text",), embedded_documents)
        notes.append(
            "no --general text was given: the embedded text (modules of the Python standard library) stands in for it; "
            "for a model that was trained on other text give some of that"
        )
    return found


@dataclass(frozen=True)
class _AsText:
    """Records as stage 1 reads them."""

    records: Records

    def __call__(self) -> Iterator[SourceDocument]:
        return (SourceDocument(record.text) for record in self.records)


def _tokenise(
    reading: _Reading, cleaner: OverlapFilter, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> TokenSource:
    """The part of a source that is trained on, from its file if that stands."""
    key = source_key(reading.survey.digest, tokenizer, len(reading.tail), cleaner.digest)
    found = find_source(reading.name, folder / f"{reading.name}-{key}")
    if found is not None:
        return found
    for other in folder.glob(f"{reading.name}-*"):  # of another text or tokenizer, or cut short
        shutil.rmtree(other, ignore_errors=True)
    cleaning = cleaner.clean(training_part(reading.read(), reading.survey, len(reading.tail), reading.flag))
    return tokenise_source(
        reading.name, _some(cleaning, reading.name), tokenizer, folder / f"{reading.name}-{key}",
        facts=lambda: {"dropped": cleaning.dropped, "short": cleaning.short},
    )  # fmt: skip


def _some(cleaning: Cleaning, name: str) -> Iterator[SourceDocument]:
    yield from cleaning
    if not cleaning.kept:
        raise DataError(
            f"--{name}: every document overlaps with the evaluation text; give other --eval-domain or --eval-general "
            "text"
        )


def _wanted(request: AdaptationRequest, method: AdaptationMethod, found: dict[str, _Reading]) -> list[str]:
    return list(divide_tokens(_ratio(request, method), request.chat_share, [*found, "domain", "general"]))


def _held_out(
    name: str, model: LoadedModel, request: AdaptationRequest, readings: dict[str, _Reading]
) -> tuple[TokenSet, tuple[SourceDocument, ...]] | None:
    """Windows and documents of a held-out text: a file of its own, or the source's tail, which then leaves it."""
    spec, flag = getattr(request, f"eval_{name}"), f"--eval-{name}"
    if spec is not None:
        documents, description = tuple(read_documents([spec], flag)), f"{name}: {spec}"
    elif name in readings:
        reading, window = readings[name], request.window * _CHARACTERS_PER_TOKEN
        reading.tail = reading.survey.tail(
            wanted=request.eval_sequences * window, fewest=MINIMUM_EVALUATION_SEQUENCES * window
        )
        documents, description = reading.tail, f"{name}: tail of {', '.join(reading.files)}, not trained on"
        if not documents:
            raise DataError(
                f"--{name} {', '.join(reading.files)} is too small for a held-out tail; give held-out text with {flag}"
            )
    else:
        return None
    rows = tuple(
        Document(document.text, index, index + 1, ends=document.ends) for index, document in enumerate(documents)
    )
    texts = Texts(rows, "test", flag, description, spelled=flag)
    tokens = tokenize(texts, model, sequences=request.eval_sequences, length=request.window, seed=request.seed)
    return tokens, documents


def _mix(sources: Sequence[TokenSource], shares: Sequence[float], request: AdaptationRequest) -> Mixture:
    step = request.batch * request.window
    mixture = Mixture(
        sources, shares, window_tokens=request.window, total_tokens=request.tokens // step * step, seed=request.seed,
        keep_documents_apart=request.keep_documents_apart, max_epochs=math.inf,
    )  # fmt: skip
    check_epochs(mixture.counts(), request.max_epochs)
    return mixture
