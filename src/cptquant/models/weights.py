"""The weight files of a model, read by header or one tensor at a time, never whole."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open

from cptquant.core.artifact import digest_file, read_json
from cptquant.core.errors import ArtifactError, ModelError

FloatDtype = Literal["float32", "float16", "bfloat16"]

_FLOAT_DTYPES: dict[str, FloatDtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGER_DTYPES = {"I8", "I16", "I32", "I64", "U8", "BOOL"}
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
_FLOAT16_MAX = 65504.0
_SCAN_ENTRIES = 1 << 22
"""Entries looked at in one piece: 16 MB of float32."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as the safetensors header describes it; dtype in safetensors spelling (`F32`, `BF16`, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def entry_count(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """All tensors of a checkpoint by name, without their contents."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorHeader]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(header.entry_count * _DTYPE_BITS[header.dtype] // 8 for header in self.tensors.values())

    @property
    def float_dtype(self) -> FloatDtype:
        """The dtype that holds most of the floating-point entries.

        Raises:
            ModelError: no tensor in float32, float16 or bfloat16, or most entries in another float.
        """
        counts: dict[str, int] = {}
        for header in self.tensors.values():
            if header.dtype not in _INTEGER_DTYPES:
                counts[header.dtype] = counts.get(header.dtype, 0) + header.entry_count
        most = max(counts, key=lambda dtype: counts[dtype], default=None)
        if most not in _FLOAT_DTYPES:
            raise ModelError(
                f"{self.path}: the weights are {most or 'no floating-point numbers'}; cptquant starts from float32, "
                "float16 or bfloat16: convert them with model.to(torch.bfloat16).save_pretrained(...)"
            )
        return _FLOAT_DTYPES[most]


def read_weight_files(path: Path) -> WeightFiles:
    """Read the headers of all safetensors files of a model folder.

    Raises:
        ModelError: no safetensors (only pickled weights), a missing shard, or a damaged file.
    """
    files = _list_files(path)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    piece = opened.get_slice(name)
                    tensors[name] = TensorHeader(name, piece.get_dtype(), tuple(piece.get_shape()), file)
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise _damaged(file, error) from None
    if not tensors:
        raise ModelError(f"{path}: the safetensors files hold no tensor; download or save the model again")
    return WeightFiles(path, files, tensors)


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} is damaged or truncated ({error}; {file.stat().st_size:,} bytes on disk); download or copy it again"
    )


def _list_files(path: Path) -> tuple[Path, ...]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        return _list_shards(index)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for p in path.glob(pattern))
    if pickled:
        raise ModelError(
            f"{path} holds weights as {', '.join(pickled[:3])} only; cptquant reads safetensors only, because loading "
            "a pickle can run code: convert with model.save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"{path} holds no model.safetensors (nor model.safetensors.index.json); is the download complete?")


def _list_shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = read_json(index, made_by="save_pretrained of the original model").get("weight_map")
    except ArtifactError as error:
        raise ModelError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map is no table of tensor name to file; download or save the model again")
    names = sorted(set(cast(dict[str, str], weight_map).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}; "
            "complete the download"
        )
    return tuple(index.parent / name for name in names)


@dataclass(frozen=True)
class WeightScan:
    """What one pass over all floating-point entries showed.

    Attributes:
        largest: largest magnitude among finite entries.
        non_finite: tensor name -> number of NaN or infinite entries; empty in a healthy model.
    """

    largest: float
    non_finite: dict[str, int]

    @property
    def fits_float16(self) -> bool:
        """No entry exceeds float16's range."""
        return self.largest <= _FLOAT16_MAX


def scan_weights(weights: WeightFiles) -> WeightScan:
    """Look at every floating-point entry once, a few MB at a time.

    Raises:
        ModelError: the file cannot be read.
    """
    return _scan(tuple(_identity(file) for file in weights.files))


def check_finite(scan: WeightScan, source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: naming the tensors and how many entries are not finite.
    """
    if scan.non_finite:
        named = ", ".join(f"{name} ({count:,})" for name, count in list(scan.non_finite.items())[:5])
        rest = len(scan.non_finite) - 5
        more = f" and {rest} more" if rest > 0 else ""
        raise ModelError(
            f"{source}: weights are NaN or infinite in {named}{more} (entries in brackets); such a model cannot be "
            "measured or quantized: get a sound copy of it"
        )


@lru_cache(maxsize=8)
def _scan(identities: tuple[tuple[Path, int, int], ...]) -> WeightScan:
    largest, non_finite = 0.0, {}
    for file, _, _ in identities:
        for name, piece in _float_pieces(file):
            if not math.isfinite(_largest(piece)):
                finite = torch.isfinite(piece)
                non_finite[name] = non_finite.get(name, 0) + int(piece.numel() - finite.sum().item())
                piece = piece[finite]
            largest = max(largest, _largest(piece))
    return WeightScan(largest, non_finite)


def _largest(piece: torch.Tensor) -> float:
    """Largest magnitude; NaN if there is one, 0 of nothing. Reads the piece once and copies nothing."""
    if not piece.numel():
        return 0.0
    low, high = torch.aminmax(piece)
    return max(abs(low.item()), abs(high.item()))


def _float_pieces(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                piece = opened.get_slice(name)
                if piece.get_dtype() in _FLOAT_DTYPES:
                    yield from ((name, part) for part in _row_pieces(opened, name, piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _row_pieces(opened: safe_open, name: str, shape: list[int]) -> Iterator[torch.Tensor]:
    if len(shape) < 1 or math.prod(shape) <= _SCAN_ENTRIES:
        yield opened.get_tensor(name)
        return
    rows = max(1, _SCAN_ENTRIES // math.prod(shape[1:]))
    piece = opened.get_slice(name)
    for start in range(0, shape[0], rows):
        yield piece[start : start + rows]


def digest_source(path: Path, weights: WeightFiles) -> str:
    """sha256 over config.json and all weight files, in a fixed order; each file is hashed once per process."""
    total = hashlib.sha256()
    for file in (path / "config.json", *weights.files):
        total.update(f"{file.name}:{_digest(_identity(file))}\n".encode())
    return total.hexdigest()


def _identity(file: Path) -> tuple[Path, int, int]:
    stat = file.stat()
    return (file.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(identity: tuple[Path, int, int]) -> str:
    return digest_file(identity[0])
