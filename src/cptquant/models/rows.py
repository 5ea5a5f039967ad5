"""Rows of JSON lines, parquet files and saved `datasets` folders, each with its place for messages."""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cptquant.core.errors import DataError


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        fields: as read; whether it is an object at all is checked by `mapping`. number: its line or row, from 1.
        place: the flag, the file and the line, for messages.
    """

    fields: Any
    number: int
    place: str

    def mapping(self, wanted: str) -> Mapping[str, Any]:
        """The fields by name.

        Args:
            wanted: the keys it should have, for the message.

        Raises:
            DataError: no object.
        """
        if not isinstance(self.fields, Mapping):
            raise DataError(f"{self.place}: a JSON {type(self.fields).__name__}, expected an object with {wanted}")
        return cast(Mapping[str, Any], self.fields)


def json_rows(path: Path, flag: str, accepted: str) -> Iterator[Row]:
    """Rows of a `.jsonl` file, optionally gzipped; empty lines are passed over.

    Args:
        accepted: what could be given instead, for messages.

    Raises:
        DataError: unreadable, or a line that is no JSON, with its number.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    row = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for row, line in enumerate(file, 1):
                if line.strip():
                    yield Row(json.loads(line.rstrip()), row, f"{flag} {path}, line {row}")
    except json.JSONDecodeError as error:
        raise DataError(f"{flag} {path}, line {row}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path} cannot be read after line {row} ({error}); {accepted}") from None


def parquet_rows(path: Path, flag: str) -> Iterator[Row]:
    """Rows of a parquet file, read in batches.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException, parquet  # optional
    except ImportError:
        raise DataError(
            f'{flag} {path} needs the package pyarrow; install it with: pip install "cptquant[adapt]", or give a .txt '
            "or .jsonl file"
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, number, f"{flag} {path}, row {number}")
    except (ArrowException, OSError) as error:
        raise DataError(f"{flag} {path} cannot be read as parquet ({error}); write it again") from None


def is_dataset_folder(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def open_dataset(path: Path, flag: str) -> Any:
    """The table that `datasets.save_to_disk` wrote, or a dict of tables by split.

    Raises:
        DataError: datasets is not installed, or the folder is damaged.
    """
    try:
        import datasets  # optional
    except ImportError:
        raise DataError(
            f'{flag} {path} needs the package datasets; install it with: pip install "cptquant[datasets]", or give a '
            ".txt or .jsonl file"
        ) from None
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - pyarrow and datasets raise many kinds for a damaged folder
        raise DataError(f"{flag} {path} cannot be read by datasets ({error}); write it again") from None


def dataset_rows(path: Path, flag: str, split: str) -> Iterator[Row]:
    """Rows of a folder that `datasets.save_to_disk` wrote.

    Args:
        split: which one, where the folder has several.

    Raises:
        DataError: datasets is not installed, the folder is damaged or lacks the split.
    """
    table = open_dataset(path, flag)
    if isinstance(table, dict):
        if split not in table:
            raise DataError(f"{flag} {path} has the splits {', '.join(map(str, table))}, but no {split}")
        table = table[split]
    for number, fields in enumerate(table, 1):
        yield Row(fields, number, f"{flag} {path}, row {number}")
