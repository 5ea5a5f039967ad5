"""A folder of an engine's files that appears whole under its final name, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from cptquant.core.artifact import output_error
from cptquant.core.errors import CptquantError


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What is on disk: bytes of all tensors, bytes of everything else in the weight files, and those files."""

    folder: Path
    tensor_bytes: int
    header_bytes: int
    files: tuple[Path, ...]


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside the final name to write into; it takes the final name's place at the end of the block.

    Whatever goes wrong, nothing half-written stays, and what stood under the final name before is untouched.

    Raises:
        OutputError: disk full or not writable.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise output_error(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_size(written_bytes: int, planned_bytes: int, what: str) -> None:
    """Refuse files whose tensors have other bytes than the plan says.

    Raises:
        CptquantError: a fault of ours.
    """
    if written_bytes != planned_bytes:
        raise CptquantError(f"{what} holds {written_bytes} bytes of tensors, the plan says {planned_bytes}")
