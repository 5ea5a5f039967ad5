"""Text of an adaptation: sources cleaned and tokenised, held-out text, and the mixture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cptquant.adaptation.methods import AdaptationMethod
from cptquant.adaptation.mixture import Mixture, TokenSource, tokenise_source
from cptquant.adaptation.overlap import OverlapFilter, hold_out_tail
from cptquant.adaptation.sources import Record, SourceDocument, embedded_documents, read_documents, read_records
from cptquant.core.adaptation import AdaptationRequest, SourceRecord
from cptquant.core.errors import DataError
from cptquant.core.mixture import check_epochs, divide_tokens
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
    instructions: tuple[Record, ...]
    preferences: tuple[Record, ...]
    notes: tuple[str, ...]


@dataclass
class _Reading:
    """One source on its way."""

    name: str
    files: tuple[str, ...]
    documents: tuple[SourceDocument, ...]
    tail: tuple[SourceDocument, ...] = ()
    dropped: int = 0
    read: int = field(init=False)

    def __post_init__(self) -> None:
        self.read = len(self.documents)


def read_adaptation_text(
    model: LoadedModel, request: AdaptationRequest, method: AdaptationMethod, asked: Sequence[str] = ()
) -> AdaptationText:
    """Read, hold out, clean, tokenise and mix.

    Args:
        asked: text of questions, which training documents must not hold either.

    Raises:
        DataError: unusable text, too little of it, or too much asked of it.
    """
    tokenizer, notes = model.require_tokenizer(), list[str]()
    instructions = (
        read_records(request.instructions, "--instructions", preferences=False) if request.instructions else ()
    )
    preferences = read_records(request.preferences, "--preferences", preferences=True) if request.preferences else ()
    readings = _read_sources(request, method, instructions, preferences, notes)
    held_out = {name: text for name in ("domain", "general") if (text := _held_out(name, model, request, readings))}
    evaluation = [*asked, *(document.text for texts in held_out.values() for document in texts[1])]
    cleaner = OverlapFilter(evaluation, share=request.overlap)
    for reading in readings.values():
        cleaned = cleaner.clean(reading.documents)
        reading.documents, reading.dropped = cleaned.kept, cleaned.dropped
        if not cleaned.kept:
            raise DataError(
                f"--{reading.name}: every document overlaps with the evaluation text; give other --eval-domain or "
                "--eval-general text"
            )
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end-of-sequence token: documents follow each other without a mark between")
    shares = divide_tokens(_ratio(request, method), request.chat_share if method.chat else 0.0, list(readings))
    sources = [tokenise_source(name, readings[name].documents, tokenizer) for name in shares]
    mixture = _mix(sources, list(shares.values()), request)
    counts = {count.name: count for count in mixture.counts()}
    notes += [
        f"{name} text was read {count.epochs:.1f} times: it holds {count.held_tokens:,} tokens"
        for name, count in counts.items() if count.epochs > 1
    ]  # fmt: skip
    records = tuple(
        SourceRecord(
            name=name, files=reading.files, documents=reading.read, dropped=reading.dropped,
            held_out=len(reading.tail), count=counts[name],
        )
        for name, reading in readings.items() if name in counts
    )  # fmt: skip
    tokens = {name: texts[0] for name, texts in held_out.items()}
    return AdaptationText(mixture, tokens, records, instructions, preferences, tuple(notes))


def _ratio(request: AdaptationRequest, method: AdaptationMethod) -> float:
    return method.ratio if request.ratio is None else request.ratio


def _read_sources(
    request: AdaptationRequest, method: AdaptationMethod, instructions: Sequence[Record],
    preferences: Sequence[Record], notes: list[str],
) -> dict[str, _Reading]:  # fmt: skip
    found: dict[str, _Reading] = {}
    if request.domain:
        found["domain"] = _Reading("domain", request.domain, tuple(read_documents(request.domain, "--domain")))
    if request.general:
        found["general"] = _Reading("general", request.general, tuple(read_documents(request.general, "--general")))
    chat = {"instructions": instructions, "preferences": preferences} if method.chat else {}
    for name, records in chat.items():
        if records:
            documents = tuple(SourceDocument(record.text) for record in records)
            found[name] = _Reading(name, getattr(request, name), documents)
    if method.general and "general" not in found and "general" in _wanted(request, method, found):
        found["general"] = _Reading("general", ("embedded text",), tuple(embedded_documents()))
        notes.append(
            "no --general text was given: the embedded text (modules of the Python standard library) stands in for it; "
            "for a model that was trained on other text give some of that"
        )
    return found


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
        reading = readings[name]
        window = request.window * _CHARACTERS_PER_TOKEN
        reading.documents, reading.tail = hold_out_tail(
            reading.documents, wanted=request.eval_sequences * window, fewest=MINIMUM_EVALUATION_SEQUENCES * window
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
