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
        if not path.is_file():
            found.append(f"{path} is missing")
            continue
        size, written = path.stat().st_size, sizes.get(name)
        if written is not None and size != written:
            found.append(f"{path} has {size:,} bytes, {written:,} were written")
        elif _digest(path) != digest:
            found.append(f"{path} was changed after it was written (its sha256 differs)")
    return found


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_once(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_once(path: Path, inode: int, size_bytes: int, changed_ns: int) -> str:
    return digest_file(path)
