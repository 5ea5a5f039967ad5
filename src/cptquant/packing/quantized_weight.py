"""A quantized weight matrix and its exact codec: integers and scales in memory, tensors of a checkpoint on disk.

The layout on disk is compressed-tensors 0.20's: `pack-quantized` (dense int32 words along each row, zero points packed
down the columns) for linear layers and `int-quantized` (one int8 a code) for embeddings. Packing itself is that
library's `pack_to_int32`; sizes are `QuantFormat.stored_bytes`, checked equal in the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.block_weight import BlockWeight, join_block_rows
from cptquant.packing.columns import ColumnCorrection, decode_correction, encode_correction
from cptquant.packing.low_rank import LowRankCorrection, decode_low_rank, encode_low_rank
from cptquant.packing.segments import SegmentedWeight, decode_segments, encode_segments, join_segmented_rows
from cptquant.packing.stored_tensors import Expected, check_tensors

SCALE_DTYPES = (torch.float16, torch.bfloat16)
Correction = ColumnCorrection | LowRankCorrection
"""What is added to the values of the codes: 8 bits on some columns, or a product of low rank."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix after quantization: value = (code - zero) * scale.

    Attributes:
        format: bits, granularity, symmetry, storage. Never a float format.
        codes: int8 (out_features, in_features), in [-2^(b-1), 2^(b-1)-1].
        scales: float16 or bfloat16; (out_features, groups), (out_features, 1) per channel, (1,) per tensor. A scale may
            be negative: with one more level below zero than above, flipping its sign is the cheaper choice for
            groups whose largest weight is positive. Never zero.
        zeros: int8, shape of `scales`, in the codes' range; None where the format is symmetric.
    """

    format: QuantFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.format.is_float:
            raise ValueError(f"{self.format.name} holds floats, not codes: keep the weight and cast it")
        if self.format.storage not in ("packed", "plain"):
            storage = self.format.storage
            raise ValueError(f"{self.format.name} is of storage {storage}: it needs more than codes and scales")
        if self.codes.ndim != 2 or self.codes.dtype is not torch.int8:
            raise ValueError(f"codes are int8 (out, in), got {self.codes.dtype} {tuple(self.codes.shape)}")
        expected = scale_shape(self.format, *self.codes.shape)
        if tuple(self.scales.shape) != expected or self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scales of {self.format.name} are 16-bit floats of shape {expected}, "
                f"got {self.scales.dtype} {tuple(self.scales.shape)}"
            )
        if (self.zeros is None) != self.format.symmetric:
            raise ValueError(f"{self.format.name} {'has no' if self.format.symmetric else 'needs'} zero points")
        if self.zeros is not None and (tuple(self.zeros.shape) != expected or self.zeros.dtype is not torch.int8):
            raise ValueError(f"zeros are int8 of shape {expected}, got {self.zeros.dtype} {tuple(self.zeros.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self) -> Tensor:
        """The matrix as float32 (out_features, in_features); the product is computed in float32."""
        values = self.codes.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros)
        return values.mul_(self._spread(self.scales))

    def rows(self, index: slice | Tensor) -> "QuantizedWeight":
        """Some rows of the matrix, in the same format."""
        if self.format.granularity == "tensor":
            return QuantizedWeight(self.format, self.codes[index], self.scales, self.zeros)
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantizedWeight(self.format, self.codes[index], self.scales[index], zeros)

    def _spread(self, per_group: Tensor) -> Tensor:
        """Scales or zeros as float32, broadcastable against the codes."""
        per_group = per_group.float()
        if not isinstance(self.format.granularity, int):
            return per_group
        return per_group.repeat_interleave(self.format.granularity, dim=1)[:, : self.codes.shape[1]]


@dataclass(frozen=True)
class CorrectedWeight:
    """One matrix whose codes have a correction: value = base + correction.

    Attributes:
        format: of storage "columns" or "low-rank".
        base: codes and scales of all columns, in `format.base`.
        correction: of the format's kind and size.
    """

    format: QuantFormat
    base: QuantizedWeight
    correction: Correction

    def __post_init__(self) -> None:
        fmt = self.format
        if not fmt.is_corrected or self.base.format != fmt.base:
            raise ValueError(f"the codes of {fmt.name} are {fmt.base.name}, got {self.base.format.name}")
        if not self.correction.fits(fmt, self.base.shape):
            raise ValueError(
                f"the correction does not fit {fmt.name} of a {self.base.shape[0]} x {self.base.shape[1]} matrix: "
                f"{type(self.correction).__name__} with tensors "
                f"{[tuple(part.shape) for part in encode_any_correction(self.correction).values()]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    @property
    def codes(self) -> Tensor:
        """int8 (out_features, in_features), of the base."""
        return self.base.codes

    def dequantize(self) -> Tensor:
        """The matrix as float32 (out_features, in_features)."""
        return self.correction.add_(self.base.dequantize())

    def rows(self, index: slice | Tensor) -> "CorrectedWeight":
        """Some rows of the matrix, in the same format."""
        return CorrectedWeight(self.format, self.base.rows(index), self.correction.rows(index))


StoredWeight = QuantizedWeight | BlockWeight | SegmentedWeight | CorrectedWeight
"""A matrix after quantization, in the form of compressed-tensors, of GGUF, with groups of mixed width, or with
a correction."""


def join_rows(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Matrices of one format, not "tensor", set one below the other.

    Raises:
        ValueError: corrections that differ from part to part in what they share.
    """
    if len(parts) == 1:
        return parts[0]
    corrected = [part for part in parts if isinstance(part, CorrectedWeight)]
    if corrected:
        return _join_corrected(corrected)
    blocks = [part for part in parts if isinstance(part, BlockWeight)]
    if blocks:
        return join_block_rows(blocks)
    segmented = [part for part in parts if isinstance(part, SegmentedWeight)]
    if segmented:
        return join_segmented_rows(segmented)
    return join_quantized([part for part in parts if isinstance(part, QuantizedWeight)])


def join_quantized(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """As `join_rows`, for codes with scales."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        parts[0].format,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _join_corrected(parts: Sequence[CorrectedWeight]) -> CorrectedWeight:
    first, base = parts[0], join_quantized([part.base for part in parts])
    others = [part.correction for part in parts[1:]]
    if isinstance(first.correction, ColumnCorrection):
        alike = [other for other in others if isinstance(other, ColumnCorrection)]
        return CorrectedWeight(first.format, base, first.correction.joined(alike))
    return CorrectedWeight(
        first.format, base, first.correction.joined([other for other in others if isinstance(other, LowRankCorrection)])
    )


def encode_any_correction(correction: Correction) -> dict[str, Tensor]:
    """Tensors to write, of either kind."""
    if isinstance(correction, LowRankCorrection):
        return encode_low_rank(correction)
    return encode_correction(correction)


def scale_shape(fmt: QuantFormat, out_features: int, in_features: int) -> tuple[int, ...]:
    """Shape of the scale tensor compressed-tensors expects beside a matrix of that size."""
    return (1,) if fmt.granularity == "tensor" else (out_features, fmt.group_count(in_features))


def encode(weight: StoredWeight) -> dict[str, Tensor]:
    """Tensors to write, under compressed-tensors' names local to the module.

    Returns:
        packed: `weight_packed` int32 (out, ceil(in * b / 32)), `weight_scale`, `weight_shape` int64 (2,) and, where
        asymmetric, `weight_zero_point`: int32 (ceil(out * b / 32), groups), or int8 (1,) per tensor.
        plain: `weight` int8 (out, in), `weight_scale` and, where asymmetric, `weight_zero_point` int8.
        blocks: `weight_blocks` uint8 (out, bytes a row), as in a GGUF file.
        segments: see `encode_segments`. columns, low-rank: those of the base, packed, and `encode_correction`'s or
        `encode_low_rank`'s.
        Their bytes sum to `weight.format.stored_bytes(out, in)`.
    """
    if isinstance(weight, BlockWeight):
        return {"weight_blocks": weight.pack()}
    if isinstance(weight, SegmentedWeight):
        return encode_segments(weight)
    if isinstance(weight, CorrectedWeight):
        return encode(weight.base) | encode_any_correction(weight.correction)
    fmt = weight.format
    tensors = {"weight_scale": weight.scales.contiguous()}
    if fmt.storage == "plain":
        tensors["weight"] = weight.codes.contiguous()
    else:
        tensors["weight_packed"] = pack_to_int32(weight.codes, fmt.code_bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
    if weight.zeros is not None:
        packs_zeros = fmt.storage == "packed" and fmt.granularity != "tensor"
        zeros = pack_to_int32(weight.zeros, fmt.code_bits, packed_dim=0) if packs_zeros else weight.zeros
        tensors["weight_zero_point"] = zeros.contiguous()
    return tensors


def decode(tensors: Mapping[str, Tensor], fmt: QuantFormat, shape: tuple[int, int]) -> StoredWeight:
    """Inverse of `encode`, exact.

    Args:
        tensors: as `encode` returns them. fmt: the format they were written in.
        shape: (out_features, in_features).

    Raises:
        ArtifactError: a tensor is missing, or of another shape or dtype than the format implies.
    """
    if fmt.storage == "segments":
        return decode_segments(tensors, fmt, shape)
    if fmt.is_corrected:
        base = decode(tensors, fmt.base, shape)
        assert isinstance(base, QuantizedWeight)
        read = decode_low_rank if fmt.storage == "low-rank" else decode_correction
        return CorrectedWeight(fmt, base, read(tensors, fmt, shape))
    check_tensors(tensors, _stored_tensors(fmt, shape), fmt, shape)
    if fmt.storage == "blocks":
        return BlockWeight.unpack(fmt, tensors["weight_blocks"], shape[1])
    if fmt.storage == "packed":
        recorded = tuple(tensors["weight_shape"].tolist())
        if recorded != tuple(shape):
            raise ArtifactError(f"tensor weight_shape says {recorded}, expected {tuple(shape)}; quantize again")
    zeros = tensors.get("weight_zero_point")
    if fmt.storage == "plain":
        return QuantizedWeight(fmt, tensors["weight"], tensors["weight_scale"], zeros)
    codes = unpack_from_int32(tensors["weight_packed"], fmt.code_bits, torch.Size(shape)).contiguous()
    if zeros is not None and zeros.dtype is torch.int32:
        # Turned by a copy: the library's own packed_dim=0 views bytes of a transposed tensor and fails on one word.
        turned = zeros.t().clone(memory_format=torch.contiguous_format)
        rows, groups = scale_shape(fmt, *shape)
        zeros = unpack_from_int32(turned, fmt.code_bits, torch.Size((groups, rows))).t().contiguous()
    return QuantizedWeight(fmt, codes, tensors["weight_scale"], zeros)


def _stored_tensors(fmt: QuantFormat, shape: tuple[int, int]) -> Expected:
    """Every tensor a format writes; scales may be either 16-bit float."""
    rows, columns = shape
    if fmt.storage == "blocks":
        return {"weight_blocks": ((torch.uint8,), (rows, fmt.stored_bytes(1, columns)))}
    scales = scale_shape(fmt, rows, columns)
    stored: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {"weight_scale": (SCALE_DTYPES, scales)}
    if fmt.storage == "plain":
        stored["weight"] = ((torch.int8,), (rows, columns))
    else:
        stored["weight_packed"] = ((torch.int32,), (rows, -(-columns * fmt.code_bits // 32)))
        stored["weight_shape"] = ((torch.int64,), (2,))
    if not fmt.symmetric:
        packs_zeros = fmt.storage == "packed" and fmt.granularity != "tensor"
        packed = (-(-rows * fmt.code_bits // 32), fmt.group_count(columns))
        stored["weight_zero_point"] = ((torch.int32,), packed) if packs_zeros else ((torch.int8,), scales)
    return stored
