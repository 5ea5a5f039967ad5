"""Read what is trained on: documents (domain, general) and records of questions with answers (instructions,
preferences), which stage 1 reads as plain text without any template (arXiv 2407.10804)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptquant.core.errors import DataError
from cptquant.models.corpus import read_texts
from cptquant.models.rows import Row, dataset_rows, is_dataset_folder, json_rows, parquet_rows

_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_ACCEPTED = (
    'give UTF-8 .txt files, .jsonl or .parquet files with "text", folders of them, or a folder written by '
    "datasets.save_to_disk"
)
_RECORDS = "give .jsonl or .parquet files, folders of them, or a folder written by datasets.save_to_disk"
_PIECE_CHARACTERS = 1000
"""Plain text has no documents; it is looked through for overlap in pieces of at least this size."""
_LONGEST_PIECE = 8000

_QUESTION_KEYS = ("instruction", "question", "prompt")
_ANSWER_KEYS = ("response", "answer", "output", "completion")


@dataclass(frozen=True)
class SourceDocument:
    """A document, or a piece of a plain text that goes on in the next.

    Attributes:
        ends: whether the document ends here.
    """

    text: str
    ends: bool = True


@dataclass(frozen=True)
class Record:
    """A question with its answer, and for preferences the answer that was not wanted.

    Attributes:
        number: its line or row in the file, from 1.
    """

    question: str
    answer: str
    rejected: str | None = None
    number: int = 0

    @property
    def text(self) -> str:
        """As stage 1 reads it: question, newline, answer; no template, and never the rejected answer."""
        return f"{self.question}\n{self.answer}"


def read_documents(specs: Sequence[str], flag: str) -> Iterator[SourceDocument]:
    """Documents of files and folders, in the order given; folders in order of their names.

    A `.txt` file is one stream of text, which comes in pieces cut at empty lines (at line ends where there are none)
    whose sum is the file. Rows of other files are documents, by their "text".

    Raises:
        DataError: missing, unreadable, of another form, or without any text.
    """
    found = False
    for document in _documents(specs, flag):
        found = found or bool(document.text.strip())
        yield document
    if not found:
        raise DataError(f"{flag} {', '.join(specs)} holds no text; {_ACCEPTED}")


def embedded_documents() -> Iterator[SourceDocument]:
    """The training part of the text that comes with the package."""
    for document in read_texts(None, "training", "causal_lm").documents:
        yield SourceDocument(document.text)


def read_records(specs: Sequence[str], flag: str, *, preferences: bool) -> tuple[Record, ...]:
    """Instructions (a question key and an answer key) or preferences (a question key, "chosen", "rejected").

    Raises:
        DataError: missing, unreadable, of another form, or a record without the keys it needs, with its line.
    """
    records = tuple(_record(row, preferences) for row in _rows(specs, flag, records=True))
    if not records:
        raise DataError(f"{flag} {', '.join(specs)} holds no records; {_RECORDS}")
    return records


def _documents(specs: Sequence[str], flag: str) -> Iterator[SourceDocument]:
    for path in _files(specs, flag, _ENDINGS):
        if path.suffix == ".txt":
            yield from _pieces(_read_plain(path, flag))
        else:
            yield from (SourceDocument(_text(row)) for row in _file_rows(path, flag, _ACCEPTED))


def _read_plain(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path} cannot be read as UTF-8 text ({error}); {_ACCEPTED}") from None


def _pieces(text: str) -> Iterator[SourceDocument]:
    start = 0
    blank = re.compile(r"\n[ \t]*\n\s*")
    while start < len(text):
        end = len(text)
        if start + _PIECE_CHARACTERS < end:
            limit = min(end, start + _LONGEST_PIECE)
            found = blank.search(text, start + _PIECE_CHARACTERS, limit)
            line = text.find("\n", start + _PIECE_CHARACTERS, limit)
            end = found.end() if found else line + 1 if line >= 0 else limit
        yield SourceDocument(text[start:end], ends=end == len(text))
        start = end


def _text(row: Row) -> str:
    fields = row.mapping('"text"')
    text = fields.get("text")
    if not isinstance(text, str):
        found = f"text is {text!r}" if "text" in fields else f'no "text" among {sorted(map(str, fields))}'
        raise DataError(f'{row.place}: {found}, expected {{"text": "..."}}')
    return text


def _record(row: Row, preferences: bool) -> Record:
    fields = row.mapping('a question and an answer, e.g. "prompt", "chosen", "rejected"' if preferences else
                         'a question and an answer, e.g. "instruction", "response"')  # fmt: skip
    question = _field(row, fields, _QUESTION_KEYS)
    extra = fields.get("input")
    if isinstance(extra, str) and extra.strip():  # the form of Alpaca
        question = f"{question}\n{extra}"
    if not preferences:
        return Record(question, _field(row, fields, _ANSWER_KEYS), number=row.number)
    chosen, rejected = _field(row, fields, ("chosen",)), _field(row, fields, ("rejected",))
    return Record(question, chosen, rejected, row.number)


def _field(row: Row, fields: Mapping[str, Any], keys: Sequence[str]) -> str:
    key = next((name for name in keys if name in fields), None)
    if key is None:
        raise DataError(f'{row.place}: no "{" or ".join(keys)}" among {sorted(map(str, fields))}')
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.place}: {key} is {_short(value)}, expected a text with words in it")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(specs: Sequence[str], flag: str, *, records: bool) -> Iterator[Row]:
    for path in _files(specs, flag, _ENDINGS[1:] if records else _ENDINGS):
        yield from _file_rows(path, flag, _RECORDS)


def _file_rows(path: Path, flag: str, accepted: str) -> Iterator[Row]:
    if path.is_dir():
        return dataset_rows(path, flag, "train")
    return parquet_rows(path, flag) if path.suffix == ".parquet" else json_rows(path, flag, accepted)


def _files(specs: Sequence[str], flag: str, endings: Sequence[str]) -> Iterator[Path]:
    """Every file that is meant; a saved `datasets` folder stands for itself."""
    accepted = _ACCEPTED if ".txt" in endings else _RECORDS
    for spec in specs:
        path = Path(spec).expanduser()
        if path.is_dir() and not is_dataset_folder(path):
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(tuple(endings)))
            if not inside:
                raise DataError(f"{flag} {spec} is a folder without {', '.join(endings)} files; {accepted}")
            yield from inside
        elif not path.exists():
            raise DataError(f"{flag} {spec} does not exist; {accepted}")
        elif path.is_file() and not path.name.endswith(tuple(endings)):
            raise DataError(f"{flag} {spec} has an unknown ending {path.suffix!r}; {accepted}")
        else:
            yield path
