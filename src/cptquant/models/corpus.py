"""Read text: the person's own files, or the text that comes with the package.

Accepted: a `.txt` file (one stream of text; for bare encoders one example a line), `.jsonl` (optionally gzipped) with
`text`, for classifiers `label`, optionally `document` (rows that belong together; errors are clustered by it), and a
folder written by `datasets.save_to_disk` with the same columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from cptquant.core.errors import DataError
from cptquant.core.layout import Task
from cptquant.models.embedded import embedded_text_path
from cptquant.models.rows import Row, is_dataset_folder, json_rows, open_dataset

Split = Literal["calibration", "training", "validation", "test"]

CHUNK_CHARACTERS = 4096
"""Plain text has no documents; its standard errors are clustered by chunks of this size."""
PIECE_CHARACTERS = 1 << 16
"""Plain text is tokenized in pieces of about this size, cut at line ends, so that a large file costs what is used."""

_FLAGS: dict[Split, str] = {
    "calibration": "--calibration", "training": "--data", "validation": "--eval-text", "test": "--eval-text",
}  # fmt: skip
_DATASET_SPLITS: dict[Split, str] = {
    "calibration": "train", "training": "train", "validation": "validation", "test": "test",
}  # fmt: skip
_SAMPLED: tuple[Split, ...] = ("calibration", "training")
"""Splits that take a whole file; the others share one."""
_ACCEPTED = (
    'give a UTF-8 .txt file, a .jsonl file with {"text": ...} lines (and "label" for classifiers), or a folder written '
    "by datasets.save_to_disk"
)


@dataclass(frozen=True)
class Document:
    """A piece of text.

    Attributes:
        cluster: documents with one number are correlated; standard errors are taken over clusters.
        label: class name or number, for classifiers. row: its line in the file, from 1.
        ends: another document follows; False for a piece of plain text that simply continues.
        first_character: for plain text, where in the file it begins; None for documents of their own.
    """

    text: str
    cluster: int
    row: int
    label: str | int | None = None
    ends: bool = True
    first_character: int | None = None


@dataclass(frozen=True)
class Texts:
    """Text of one split, not yet tokenized.

    Attributes:
        source: file, folder or "embedded text". description: source and part, for reports.
        spelled: the flag that gives this text, where it is not the split's own.
    """

    documents: tuple[Document, ...]
    split: Split
    source: str
    description: str
    spelled: str = ""

    @property
    def flag(self) -> str:
        """The flag that names this text on the command line."""
        return self.spelled or _FLAGS[self.split]


def read_texts(spec: str | Path | None, split: Split, task: Task) -> Texts:
    """Read the text of a split.

    One file may serve both --eval-text splits: the reported test text and the validation text on which plans are
    compared. They never overlap: plain text gives its first two thirds to test and its last third to validation;
    rows are dealt by their cluster, every third cluster to validation. A `datasets` folder with splits gives train,
    validation and test; the embedded text is split by module.

    Args:
        spec: file or folder; None for the embedded text.
        split: which part. task: classifiers need labels.

    Raises:
        DataError: missing, unreadable, of another form, without labels where they are needed, or empty.
    """
    if spec is None:
        return _read_embedded(split, task)
    path = Path(spec).expanduser()
    flag = _FLAGS[split]
    if path.is_dir():
        documents, own_split = _read_dataset(path, split)
    elif not path.is_file():
        raise DataError(f"{flag} {spec} does not exist; {_ACCEPTED}")
    elif path.suffix == ".txt":
        documents, own_split = _read_plain(path, flag, task), False
    elif ".jsonl" in path.suffixes:
        documents, own_split = tuple(_read_lines(path, flag)), False
    else:
        raise DataError(f"{flag} {spec} has an unknown ending {path.suffix!r}; {_ACCEPTED}")
    documents = tuple(document for document in documents if document.text.strip() or document.label is not None)
    if not documents:
        raise DataError(f"{flag} {spec} holds no text; {_ACCEPTED}")
    _check_labels(documents, task, flag, str(spec))
    description = str(path.name)
    if not own_split and split not in _SAMPLED:
        documents, part = _deal(documents, split)
        description = f"{path.name} ({part})"
        if not documents:
            raise DataError(f"{flag} {spec} is too short to give a {split} part; it is dealt to test and validation")
    return Texts(documents, split, str(spec), description)


def _read_embedded(split: Split, task: Task) -> Texts:
    part = "calibration" if split == "training" else split
    path = embedded_text_path(part, labelled=task == "sequence_classification")
    documents = tuple(_read_lines(path, _FLAGS[split]))
    return Texts(documents, split, "embedded text", f"embedded text, {part} modules of the Python standard library")


def _read_plain(path: Path, flag: str, task: Task) -> tuple[Document, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path} cannot be read as UTF-8 text ({error}); {_ACCEPTED}") from None
    if task in ("encoder", "sequence_classification"):
        return tuple(Document(line, row, row) for row, line in enumerate(text.splitlines(), 1) if line.strip())
    pieces: list[Document] = []
    start = 0
    while start < len(text):
        end = _line_end(text, start + PIECE_CHARACTERS)
        pieces.append(Document(text[start:end], len(pieces), 1, ends=end == len(text), first_character=start))
        start = end
    return tuple(pieces)


def _line_end(text: str, position: int) -> int:
    """Just after the first line end at or after `position`, but at most one piece further."""
    if position >= len(text):
        return len(text)
    found = text.find("\n", position, position + PIECE_CHARACTERS)
    return found + 1 if found >= 0 else position


def _read_lines(path: Path, flag: str) -> Iterator[Document]:
    rows = _Rows()
    return (rows.document(row) for row in json_rows(path, flag, _ACCEPTED))


class _Rows:
    """Turns rows into documents, numbering the clusters they name."""

    def __init__(self) -> None:
        self._clusters: dict[str, int] = {}

    def document(self, row: Row) -> Document:
        fields, where = row.mapping('"text"'), row.place
        text, label = fields.get("text"), fields.get("label")
        if not isinstance(text, str):
            found = f"text is {text!r}" if "text" in fields else f'no "text" among {sorted(map(str, fields))}'
            raise DataError(f'{where}: {found}, expected {{"text": "..."}}')
        if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
            raise DataError(f"{where}: label is {label!r}, expected a class name or its number")
        name = fields.get("document", fields.get("module"))
        key = f"row {row.number}" if name is None else f"document {name}"
        return Document(text, self._clusters.setdefault(key, len(self._clusters)), row.number, label)


def _read_dataset(path: Path, split: Split) -> tuple[tuple[Document, ...], bool]:
    """Rows of a `datasets` folder, and whether it had a split of this name."""
    flag = _FLAGS[split]
    if not is_dataset_folder(path):
        raise DataError(f"{flag} {path} is a folder, but not one that datasets.save_to_disk wrote; {_ACCEPTED}")
    table = open_dataset(path, flag)
    own_split = isinstance(table, dict)
    if isinstance(table, dict):
        wanted = _DATASET_SPLITS[split]
        if wanted not in table:
            raise DataError(f"{flag} {path} has the splits {', '.join(map(str, table))}, but no {wanted}")
        table = table[wanted]
    label = table.features.get("label")
    names = getattr(label, "names", None)  # of a ClassLabel
    return tuple(_dataset_rows(cast(Iterable[dict[str, Any]], table), names, f"{flag} {path}")), own_split


def _dataset_rows(table: Iterable[dict[str, Any]], names: list[str] | None, where: str) -> Iterator[Document]:
    rows = _Rows()
    for row, fields in enumerate(table, 1):
        if names is not None and fields.get("label") is not None:
            fields = {**fields, "label": names[fields["label"]]}
        yield rows.document(Row(fields, row, f"{where}, row {row}"))


def _check_labels(documents: tuple[Document, ...], task: Task, flag: str, spec: str) -> None:
    if task != "sequence_classification":
        return
    bare = next((document for document in documents if document.label is None), None)
    if bare is not None:
        raise DataError(
            f'{flag} {spec}, line {bare.row}: no "label", which a classifier needs; give .jsonl lines '
            '{"text": ..., "label": ...}'
        )


def _deal(documents: tuple[Document, ...], split: Split) -> tuple[tuple[Document, ...], str]:
    """The part of one file that belongs to "test" or to "validation"."""
    if documents[0].first_character is None:
        wanted = [d for d in documents if (d.cluster % 3 == 2) == (split == "validation")]
        return tuple(wanted), "every third document" if split == "validation" else "two of three documents"
    text = "".join(document.text for document in documents)
    cut = _line_end(text, 2 * len(text) // 3)
    start, end = (0, cut) if split == "test" else (cut, len(text))
    part = "first two thirds" if split == "test" else "last third"
    return tuple(_clip(documents, start, end)), part


def _clip(documents: tuple[Document, ...], start: int, end: int) -> Iterator[Document]:
    """The plain-text pieces between two character positions."""
    for document in documents:
        first = document.first_character or 0
        low, high = max(first, start), min(first + len(document.text), end)
        if low < high:
            yield Document(
                document.text[low - first : high - first],
                document.cluster,
                document.row,
                ends=high == end,
                first_character=low,
            )
