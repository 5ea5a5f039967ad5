"""Stage files: frozen, typed, versioned JSON, written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from cptquant.core.errors import ArtifactError, OutputError
from cptquant.core.provenance import Provenance


class Frozen(BaseModel):
    """A record inside an artifact: immutable, no unknown fields, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class Artifact(Frozen):
    """What a stage leaves behind.

    Attributes:
        inputs: sha256 (or other digest text) of everything the result depends on, by name. A stage whose
            file already stands with the same `inputs` is not run again.
        provenance: versions, seed, command, device, seconds, peak memory.
    """

    SCHEMA: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1
    MADE_BY: ClassVar[str]
    """The command that makes this file anew, named when a file of another version is met."""

    inputs: dict[str, str] = {}
    provenance: Provenance = Provenance()

    def to_json(self) -> str:
        """JSON text with `schema` and `schema_version` first; floats round-trip exactly."""
        head: dict[str, Any] = {"schema": self.SCHEMA, "schema_version": self.SCHEMA_VERSION}
        return json.dumps({**head, **self.model_dump(mode="json")}, indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """sha256 of the content without its provenance (wall time must not invalidate the next stage)."""
        return digest_json(self.model_dump(mode="json", exclude={"provenance"}))

    def save(self, path: Path) -> None:
        """Write to `path`; the name appears only when the content is complete.

        Raises:
            OutputError: the folder is not writable or the disk is full.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate.

        Raises:
            ArtifactError: missing, not JSON, another schema or version, or fields of a wrong type.
        """
        raw = read_json(path, made_by=cls.MADE_BY)
        found, version = raw.pop("schema", None), raw.pop("schema_version", None)
        if found != cls.SCHEMA:
            raise ArtifactError(f"{path} holds schema {found!r}, expected {cls.SCHEMA!r}; make it with: {cls.MADE_BY}")
        if version != cls.SCHEMA_VERSION or isinstance(version, bool):
            raise ArtifactError(
                f"{path} has schema_version {version!r}, this cptquant reads {cls.SCHEMA_VERSION}; "
                f"make it anew with: {cls.MADE_BY}"
            )
        try:
            return cls.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            first = error.errors()[0]
            where = f"field {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
            ours = first["type"] == "value_error"  # a validator's own sentence, which names what it received
            received = "" if ours else f", received {_shorten(first.get('input'))}"
            raise ArtifactError(
                f"{path}: {where}{first['msg'].removeprefix('Value error, ')}{received}; "
                f"mend the field or make the file anew with: {cls.MADE_BY}"
            ) from None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path, *, made_by: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: the file is missing, unreadable, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; make it with: {made_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); make it anew with: {made_by}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); make it anew with: {made_by}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a JSON {type(value).__name__}, expected an object; make it anew: {made_by}")
    return cast(dict[str, Any], value)


def write_whole(path: Path, content: bytes) -> None:
    """Write through a temporary sibling and rename, so that no half file ever bears the final name.

    Raises:
        OutputError: no permission, no space, or the folder is missing.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is missing
            partial.unlink()
        raise output_error(path, error) from None


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before time is spent on its content.

    Raises:
        OutputError: the folder is missing or not writable, or the path is a folder.
    """
    number = errno.EISDIR if path.is_dir() else errno.ENOENT if not path.parent.is_dir() else None
    if number is None and not os.access(path.parent, os.W_OK):
        number = errno.EACCES
    if number is not None:
        raise output_error(path, OSError(number, os.strerror(number)))


def output_error(path: Path, error: Exception) -> OutputError:
    """Say what the operating system's refusal means and what to do.

    Libraries such as safetensors report a refusal as text only; a full disk is recognised there too.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.ENOSPC or "os error 28" in text or "No space left on device" in text:
        return OutputError(
            f"disk full while writing {path}; finished stages are kept: free some space and run the same command again"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else text
    return OutputError(f"cannot write {path} ({reason}); choose another --output")


def digest_json(value: Mapping[str, Any] | list[Any]) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
