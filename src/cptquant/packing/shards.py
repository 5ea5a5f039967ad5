"""Quantized weights on disk, one file per block, so that a killed run goes on from the last finished block."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cptquant.core.artifact import output_error
from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteRecord
from cptquant.packing.quantized_weight import StoredWeight, decode, encode

KEPT = "kept"
"""Label of the piece with norms and biases."""


class ShardFolder:
    """A folder of finished pieces of a quantized model.

    Each piece is a safetensors file with the tensors of one block (or of the sites outside the blocks) under the names
    they will have in the checkpoint, and the sites' records in its metadata. A piece appears under its name only when
    complete, and carries a digest of its content: one that was cut short or altered since is removed when the folder
    is opened, so that it is made again, and named in `damaged`. Reading is lazy: one site's tensors at a time.

    Args:
        folder: made if missing. Its name should contain the digest of everything the pieces depend on.
        formats: site name -> format, from the plan.
        shapes: site name -> (out_features, in_features).
    """

    def __init__(self, folder: Path, formats: Mapping[str, QuantFormat], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.folder, self._formats, self._shapes = folder, formats, shapes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from None
        self._piece_of: dict[str, Path] = {}
        self._records: dict[str, list[SiteRecord]] = {}
        self.damaged: list[str] = []
        for path in sorted(folder.glob("*.safetensors")):
            self._register(path)

    def _register(self, path: Path) -> None:
        state = path.stat()
        content = _read_whole(path, state.st_ino, state.st_size, state.st_mtime_ns)
        if content is None:
            path.unlink()
            self.damaged.append(f"{path} was cut short or changed after it was written")
            return
        sites, records = content
        self._records[path.stem] = [SiteRecord.model_validate_json(text) for text in records]
        self._piece_of.update(dict.fromkeys(sites, path))

    def save(self, label: str, weights: Mapping[str, StoredWeight], records: Sequence[SiteRecord]) -> None:
        """Write one piece.

        Raises:
            OutputError: disk full or not writable; earlier pieces stay.
        """
        tensors: dict[str, Tensor] = {}
        pointers: set[int] = set()
        for site, weight in weights.items():
            for name, tensor in encode(weight).items():
                stored = tensor.contiguous()
                if stored.data_ptr() in pointers:  # a head that is its embedding; safetensors wants tensors apart
                    stored = stored.clone()
                pointers.add(stored.data_ptr())
                tensors[f"{site}.{name}"] = stored
        self._write(label, tensors, tuple(weights), records)

    def _write(
        self, label: str, tensors: Mapping[str, Tensor], sites: Sequence[str], records: Sequence[SiteRecord]
    ) -> None:
        path = self.folder / f"{label}.safetensors"
        partial = path.with_name(path.name + ".partial")
        metadata = {
            "records": json.dumps([record.model_dump_json() for record in records]),
            "sites": json.dumps(list(sites)),
        }
        metadata["sha256"] = _digest(metadata, ((name, tensors[name]) for name in sorted(tensors)))
        try:
            save_file(dict(tensors), partial, metadata=metadata)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise output_error(path, error) from None
        self._records[label] = list(records)
        self._piece_of.update(dict.fromkeys(sites, path))

    def save_kept(self, tensors: Mapping[str, Tensor], part: str = "") -> None:
        """Write norms and biases that training changed, by their names in the model, as a piece of its own.

        Args:
            part: of the model, where they are written bit by bit.

        Raises:
            OutputError: disk full or not writable.
        """
        self._write(f"{KEPT}{part}", {name: tensor.contiguous() for name, tensor in tensors.items()}, (), ())

    @property
    def kept_labels(self) -> tuple[str, ...]:
        """Labels of the pieces that `save_kept` wrote."""
        return tuple(sorted(label for label in self._records if label.startswith(KEPT)))

    def kept(self, part: str | None = None) -> dict[str, Tensor]:
        """What `save_kept` wrote of a part, or (None) of all; empty without it."""
        found: dict[str, Tensor] = {}
        for label in self.kept_labels:
            if part is None or label == f"{KEPT}{part}":
                with _opened(self.folder / f"{label}.safetensors") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}
        return found

    @property
    def labels(self) -> frozenset[str]:
        """Labels of the finished pieces."""
        return frozenset(self._records)

    def piece(self, label: str) -> Mapping[str, StoredWeight]:
        """The quantized weights of a finished piece by site name, each read when asked for."""
        path = self.folder / f"{label}.safetensors"
        return _Piece(self, tuple(site for site, piece in self._piece_of.items() if piece == path))

    def records(self, label: str | None = None) -> list[SiteRecord]:
        """Records of one piece, or of all."""
        if label is not None:
            return self._records[label]
        return [record for records in self._records.values() for record in records]

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and scales of a site; None if the plan keeps it in 16 bits."""
        return self._decode(site_name) if site_name in self._piece_of else None

    def weight(self, site_name: str) -> Tensor | None:
        """Dequantized float32 weight (out_features, in_features); None if the plan keeps it in 16 bits."""
        quantized = self.quantized(site_name)
        return None if quantized is None else quantized.dequantize()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor under its checkpoint name."""
        for path in sorted(set(self._piece_of.values())):
            with _opened(path) as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)

    def _decode(self, site: str) -> StoredWeight:
        prefix = site + "."
        with _opened(self._piece_of[site]) as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            tensors = {name[len(prefix) :]: file.get_tensor(name) for name in names if "." not in name[len(prefix) :]}
        return decode(tensors, self._formats[site], self._shapes[site])


class _Piece(Mapping[str, StoredWeight]):
    def __init__(self, folder: ShardFolder, sites: tuple[str, ...]) -> None:
        self._folder, self._sites = folder, sites

    def __getitem__(self, site: str) -> StoredWeight:
        if site not in self._sites:
            raise KeyError(site)
        return self._folder._decode(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A piece that was whole when its folder was opened."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} was cut short or removed while it was in use ({error}); run the same command again: finished "
            "blocks are kept, this one is made anew"
        ) from None


@lru_cache(maxsize=4096)
def _read_whole(
    path: Path, inode: int, size_bytes: int, changed_ns: int
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(sites, records) of a piece whose content has its digest, else None; read once a process while unchanged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            wanted = metadata.pop("sha256", None)
            if wanted is None or wanted != _digest(
                metadata, ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            ):
                return None
            return tuple(json.loads(metadata["sites"])), tuple(json.loads(metadata["records"]))
    except (SafetensorError, OSError):
        return None


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over metadata, names, dtypes, shapes and bytes."""
    found = sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
