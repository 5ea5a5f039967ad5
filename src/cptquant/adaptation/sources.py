"""Read what is trained on: documents (domain, general) and records of questions with answers (instructions,
preferences), which stage 1 reads as plain text without any template (arXiv 2407.10804).

Nothing is held but a piece, a row, or what the format gives at once (a parquet file's row group): files may be larger
than memory, and are read again where they are needed again.
"""

import io
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
_BLANK = re.compile(r"\n[ \t]*\n\s*")
_BLOCK_BYTES = 1 << 16
"""Read from a plain text at once."""

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


class Records:
    """Records of files, read anew at every use, in their order.

    Raises:
        DataError: missing, unreadable, of another form, none at all, or a record without the keys it needs, with its
            line: all of it when the object is made.
    """

    def __init__(self, specs: Sequence[str], flag: str, *, preferences: bool) -> None:
        self._specs, self._flag, self._preferences = tuple(specs), flag, preferences
        self._count = sum(1 for _ in self)
        if not self._count:
            raise DataError(f"{flag} {', '.join(specs)} holds no records; {_RECORDS}")

    def __iter__(self) -> Iterator[Record]:
        for path in _files(self._specs, self._flag, _ENDINGS[1:]):
            for row in _file_rows(path, self._flag, _RECORDS):
                yield _record(row, self._preferences)

    def __len__(self) -> int:
        return self._count


def read_records(specs: Sequence[str], flag: str, *, preferences: bool) -> Records:
    """Instructions (a question key and an answer key) or preferences (a question key, "chosen", "rejected").

    Raises:
        DataError: missing, unreadable, of another form, or a record without the keys it needs, with its line.
    """
    return Records(specs, flag, preferences=preferences)


def take_records(records: Iterable[Record], indices: Collection[int]) -> dict[int, Record]:
    """The records at some places, read in one pass that ends with the last of them."""
    wanted = set(indices)
    found: dict[int, Record] = {}
    for index, record in enumerate(records) if wanted else ():
        if index in wanted:
            found[index] = record
            if len(found) == len(wanted):
                break
    return found


def json_parts(lists: Iterable[Iterable[Record]]) -> Iterator[str]:
    """Canonical JSON of lists of records, piece by piece: what `digest_json` takes the digest of."""
    yield "["
    for number, records in enumerate(lists):
        yield ", [" if number else "["
        for index, record in enumerate(records):
            yield (", " if index else "") + json.dumps(asdict(record), sort_keys=True, ensure_ascii=False)
        yield "]"
    yield "]"


def _documents(specs: Sequence[str], flag: str) -> Iterator[SourceDocument]:
    for path in _files(specs, flag, _ENDINGS):
        if path.suffix == ".txt":
            yield from cut_into_pieces(_read_plain(path, flag))
        else:
            yield from (SourceDocument(_text(row)) for row in _file_rows(path, flag, _ACCEPTED))


def _read_plain(path: Path, flag: str) -> Iterator[str]:
    """The text of a file in blocks; ends of lines as Python's text files have them.

    Raises:
        DataError: unreadable, or no UTF-8, with the place of the byte.
    """
    decoder = io.IncrementalNewlineDecoder(getincrementaldecoder("utf-8")(), translate=True)
    fed = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                fed += len(block)
                yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        byte = fed - len(error.object) + error.start  # the decoder had kept bytes of an unfinished character
        raise DataError(
            f"{flag} {path} cannot be read as UTF-8 text (byte {byte}: {error.reason}); {_ACCEPTED}"
        ) from None
    except OSError as error:
        raise DataError(f"{flag} {path} cannot be read as UTF-8 text ({error}); {_ACCEPTED}") from None


def cut_into_pieces(blocks: Iterable[str]) -> Iterator[SourceDocument]:
    """Pieces of one text that comes in blocks; where it is cut does not depend on the blocks.

    A piece ends after the first empty line from its thousandth character on, else after the first end of a line, and
    has at most 8000 characters, so no more than those and a block are ever held.
    """
    source = iter(blocks)
    held, start, more = "", 0, True
    while True:
        while more and len(held) - start <= _LONGEST_PIECE:  # one more than the longest: whether the text goes on
            block = next(source, None)
            more = block is not None
            held, start = held[start:] + (block or ""), 0
        if start == len(held):
            return
        end = _piece_end(held, start)
        yield SourceDocument(held[start:end], ends=not more and end == len(held))
        start = end


def _piece_end(text: str, start: int) -> int:
    if start + _PIECE_CHARACTERS >= len(text):
        return len(text)
    limit = min(len(text), start + _LONGEST_PIECE)
    found = _BLANK.search(text, start + _PIECE_CHARACTERS, limit)
    line = text.find("\n", start + _PIECE_CHARACTERS, limit)
    return found.end() if found else line + 1 if line >= 0 else limit


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
