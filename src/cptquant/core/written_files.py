"""Whether files still are what was written: they exist, have their size and their sha256.

Reading runs at about 1 GB/s, once a command and file: a file whose size and time of change are the same was not read
twice.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from cptquant.core.artifact import digest_file


def digest_folder(folder: Path) -> dict[str, str]:
    """Name relative to the folder -> sha256, of every file in it."""
    return {name: _digest(folder / name) for name in _names(folder)}


def size_folder(folder: Path) -> dict[str, int]:
    """Name relative to the folder -> bytes, of every file in it."""
    return {name: (folder / name).stat().st_size for name in _names(folder)}


def list_damage(folder: Path, digests: Mapping[str, str], sizes: Mapping[str, int]) -> list[str]:
    """What of the recorded files is missing, cut short or altered, a sentence a file; empty if all is as written.

    Args:
        digests: name relative to the folder -> sha256. sizes: the same names -> bytes; may lack some.
    """
    found: list[str] = []
    for name, digest in digests.items():
        path = folder / name
        try:
            sentence = _compare(path, digest, sizes.get(name))
        except OSError as error:
            sentence = f"{str(path)[:200]} cannot be read ({error.strerror})"
        if sentence:
            found.append(sentence)
    return found


def _compare(path: Path, digest: str, written_bytes: int | None) -> str:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if written_bytes is not None and size != written_bytes:
        return f"{path} has {size:,} bytes, {written_bytes:,} were written"
    if _digest(path) != digest:
        return f"{path} was changed after it was written (its sha256 differs)"
    return ""


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_once(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_once(path: Path, inode: int, size_bytes: int, changed_ns: int) -> str:
    return digest_file(path)
