"""A matrix whose groups of input columns have different widths (SliM-LLM), and its exact codec.

In a matrix of format `slim<N>-g<G>` every group of G input columns has N-1, N or N+1 bits in all rows, as many groups
N-1 as N+1. On disk groups of one width stand side by side, narrow before wide, so that the matrix is at most three
*segments*, each an ordinary matrix of one width; docs/segments.md describes the tensors.

One-bit groups keep their mean. Their two levels are (code + 1/2 + mean/32) * scale with code -1 or 0; scale and mean
share the 16 bits that other groups use for a scale: the scale is a float16 cut to 5 bits of mantissa (it is
positive, so its sign is free as well), the mean a signed integer of 6 bits in 1/32 of the scale. So one-bit groups take
no byte more than any others, and the size of the matrix does not depend on how many of them there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat

MEAN_STEPS = 32
"""The mean of a one-bit group is stored in this fraction of its scale: from -1 to 31/32 scales, twice the distance
between mean and level."""
LOWEST_MEAN, HIGHEST_MEAN = -MEAN_STEPS, MEAN_STEPS - 1
SMALLEST_ONE_BIT_SCALE = 2.0**-14
"""Smallest normal float16."""
LARGEST_ONE_BIT_SCALE = 64512.0
"""Largest float16 with 5 bits of mantissa."""
_SCALE_BITS, _SIGN_BIT, _LOW_BITS = 0x7FE0, 0x8000, 0x1F
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SegmentedWeight:
    """One matrix with groups of mixed width, columns in the order of the groups.

    Attributes:
        format: of storage "segments".
        widths: uint8 (groups,), N-1, N or N+1, as many of the first as of the last.
        codes: int8 (out_features, in_features), column j in group j // group size; of the group's width.
        scales: float16 or bfloat16 (out_features, groups). May be negative, but in one-bit groups.
        means: int8 (out_features, groups), means of one-bit groups in 1/32 of the scale, 0 elsewhere; None if N > 2.
        order: int64 (in_features,), the original number of each column; None where columns keep their order.
    """

    format: QuantFormat
    widths: Tensor
    codes: Tensor
    scales: Tensor
    means: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        fmt = self.format
        if fmt.storage != "segments":
            raise ValueError(f"{fmt.name} has one width, not segments")
        rows, columns = self.codes.shape
        groups = fmt.group_count(columns)
        if self.scales.shape != (rows, groups) or self.scales.dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"scales are 16-bit floats ({rows}, {groups}), got {self.scales.dtype} {self.scales.shape}"
            )
        change = self.widths.to(torch.int16) - fmt.code_bits
        if self.widths.shape != (groups,) or int(change.abs().max()) > 1 or int(change.sum()) != 0:
            raise ValueError(
                f"widths of {fmt.name} are {groups} numbers within 1 of {fmt.code_bits} that average to it"
            )
        if fmt.halves and int((change == 0).sum()):
            raise ValueError(
                f"half of the groups of {fmt.name} have {fmt.code_bits - 1} bits, half {fmt.code_bits + 1}"
            )
        if (self.means is None) != (fmt.code_bits > 2) or (self.order is None) == fmt.sorted_columns:
            raise ValueError(f"{fmt.name}: means go with one-bit groups, an order with sorted columns")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def pairs(self) -> int:
        """p: groups with one bit less, and as many with one bit more."""
        return int((self.widths > self.format.code_bits).sum())

    def dequantize(self) -> Tensor:
        """The matrix as float32 (out_features, in_features), columns in their original order."""
        values = self.codes.float()
        if self.means is not None:
            values += _spread(one_bit_offset(self.means) * (self.widths == 1), self.format)
        values *= _spread(self.scales.float(), self.format)
        if self.order is None:
            return values
        original = torch.empty_like(values)
        original[:, self.order] = values
        return original

    def rows(self, index: slice | Tensor) -> "SegmentedWeight":
        """Some rows of the matrix, in the same format."""
        means = None if self.means is None else self.means[index]
        return SegmentedWeight(self.format, self.widths, self.codes[index], self.scales[index], means, self.order)

    def stored_order(self) -> Tensor:
        """int64 (in_features,): the original number of each column as stored, narrow segments first."""
        columns = group_columns(torch.argsort(self.widths, stable=True), self.format)
        return columns if self.order is None else self.order[columns]


def join_segmented_rows(parts: Sequence[SegmentedWeight]) -> SegmentedWeight:
    """Pieces of one matrix set one below the other; their widths and orders are the same."""
    first = parts[0]
    return SegmentedWeight(
        first.format,
        first.widths,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        None if first.means is None else torch.cat([part.means for part in parts if part.means is not None]),
        first.order,
    )


def one_bit_offset(
    means: Tensor,  # integers, any shape
) -> Tensor:
    """What is added to the codes -1 and 0 of a one-bit group, float32: 1/2 + mean/32."""
    return means.float() / MEAN_STEPS + 0.5


def group_columns(
    groups: Tensor,  # (n,) int64
    fmt: QuantFormat,
) -> Tensor:
    """Numbers of the columns of some groups, (n * group size,) int64, group after group."""
    width = group_size(fmt)
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)


def group_size(fmt: QuantFormat) -> int:
    """Columns per group of a segments format."""
    if not isinstance(fmt.granularity, int):
        raise ValueError(f"{fmt.name} has no groups")
    return fmt.granularity


def encode_segments(weight: SegmentedWeight) -> dict[str, Tensor]:
    """Tensors to write; their bytes sum to `weight.format.stored_bytes(out, in)`.

    Returns:
        `weight_packed` int32 (out, in * N / 32): the segments of N-1, N, N+1 bits side by side, each packed along the
        row. `weight_scale` 16-bit (out, groups of more than one bit) in the same order. `weight_binary` int16
        (out, one-bit groups), scale and mean; left out if there are none. `weight_widths` uint8 (ceil(groups / 4),):
        per group 0, 1, 2 for N-1, N, N+1, four to a byte, the first in the lowest bits; original order of the groups,
        or that of the segments if columns are sorted. `weight_columns` uint16 (in,), the original number of each stored
        column, if sorted. `weight_shape` int64 (2,).
    """
    fmt, stored = weight.format, torch.argsort(weight.widths, stable=True)
    words: list[Tensor] = []
    for bits in (fmt.code_bits - 1, fmt.code_bits, fmt.code_bits + 1):
        groups = stored[weight.widths[stored] == bits]
        if len(groups):
            words.append(pack_to_int32(weight.codes[:, group_columns(groups, fmt)].contiguous(), bits))
    widths = weight.widths if weight.order is None else weight.widths[stored]
    wide = stored[weight.widths[stored] > 1]
    tensors = {
        "weight_packed": torch.cat(words, dim=1),
        "weight_scale": weight.scales[:, wide].contiguous(),
        "weight_widths": _pack_widths(widths, fmt),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if len(wide) < len(stored) and weight.means is not None:
        narrow = stored[weight.widths[stored] == 1]
        tensors["weight_binary"] = _pack_one_bit(weight.scales[:, narrow], weight.means[:, narrow])
    if weight.order is not None:
        tensors["weight_columns"] = weight.stored_order().to(torch.uint16)
    return tensors


def decode_segments(tensors: Mapping[str, Tensor], fmt: QuantFormat, shape: tuple[int, int]) -> SegmentedWeight:
    """Inverse of `encode_segments`: the same values; sorted columns come back in the order of the segments.

    Raises:
        ArtifactError: a tensor is missing or of another shape or dtype than the format implies.
    """
    rows, columns = shape
    reason = fmt.segments_refusal(columns)
    if reason is not None:
        raise ArtifactError(f"{reason}; the file does not belong to this plan: quantize again")
    stated = _take(tensors, "weight_shape", torch.int64, (2,), fmt).tolist()
    if stated != [rows, columns]:
        raise ArtifactError(
            f"tensor weight_shape of a {fmt.name} matrix says {stated}, expected {[rows, columns]}; quantize again"
        )
    groups = fmt.group_count(columns)
    bit_map = _take(tensors, "weight_widths", torch.uint8, (-(-groups // 4),), fmt)
    widths = _unpack_widths(bit_map, groups, fmt)
    stored = torch.argsort(widths, stable=True)
    one_bit = int((widths == 1).sum())
    packed = _take(tensors, "weight_packed", torch.int32, (rows, columns * fmt.code_bits // 32), fmt)
    wide_scales = _take(tensors, "weight_scale", None, (rows, groups - one_bit), fmt)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = wide_scales.new_empty(rows, groups)
    scales[:, stored[one_bit:]] = wide_scales
    means = torch.zeros(rows, groups, dtype=torch.int8) if fmt.code_bits == 2 else None
    if one_bit and means is not None:
        words = _take(tensors, "weight_binary", torch.int16, (rows, one_bit), fmt)
        found, mean = _unpack_one_bit(words)
        scales[:, stored[:one_bit]], means[:, stored[:one_bit]] = found.to(scales.dtype), mean
    start = 0
    for bits in (fmt.code_bits - 1, fmt.code_bits, fmt.code_bits + 1):
        member = group_columns(stored[widths[stored] == bits], fmt)
        if len(member):
            stop = start + len(member) * bits // 32
            part = packed[:, start:stop].contiguous()
            codes[:, member] = unpack_from_int32(part, bits, torch.Size((rows, len(member))))
            start = stop
    order = None
    if fmt.sorted_columns:
        order = _take(tensors, "weight_columns", torch.uint16, (columns,), fmt).to(torch.int64)
        if not torch.equal(order.sort().values, torch.arange(columns)):
            raise ArtifactError(
                f"tensor weight_columns of a {fmt.name} matrix does not name every column once; quantize again"
            )
    return SegmentedWeight(fmt, widths, codes, scales, means, order)


def _spread(per_group: Tensor, fmt: QuantFormat) -> Tensor:
    return per_group.repeat_interleave(group_size(fmt), dim=1)


def _take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int, ...], fmt: QuantFormat
) -> Tensor:
    """A tensor of the file; dtype None stands for a 16-bit float."""
    found = tensors.get(name)
    if found is None:
        raise ArtifactError(f"tensor {name} of a {fmt.name} matrix is missing; quantize again")
    allowed = _SCALE_DTYPES if dtype is None else (dtype,)
    if found.dtype not in allowed or tuple(found.shape) != shape:
        wanted = "a 16-bit float" if dtype is None else str(dtype)
        raise ArtifactError(
            f"tensor {name} of a {fmt.name} matrix must be {wanted} {shape}, found {found.dtype} {tuple(found.shape)}; "
            "the file does not belong to this plan: quantize again"
        )
    return found


def _pack_widths(widths: Tensor, fmt: QuantFormat) -> Tensor:
    steps = (widths.to(torch.int16) - (fmt.code_bits - 1)).to(torch.uint8)
    padded = torch.zeros(-(-len(steps) // 4) * 4, dtype=torch.uint8)
    padded[: len(steps)] = steps
    lanes = padded.view(-1, 4)
    return lanes[:, 0] | (lanes[:, 1] << 2) | (lanes[:, 2] << 4) | (lanes[:, 3] << 6)


def _unpack_widths(packed: Tensor, groups: int, fmt: QuantFormat) -> Tensor:
    steps = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1).reshape(-1)[:groups]
    change = steps.to(torch.int16) - 1
    if int(change.max()) > 1 or int(change.sum()) != 0:
        raise ArtifactError(
            f"tensor weight_widths of a {fmt.name} matrix does not average {fmt.code_bits} bits; quantize again"
        )
    return (change + fmt.code_bits).to(torch.uint8)


def round_one_bit_scale(
    scale: Tensor,  # float32, positive
) -> Tensor:
    """The scale as a one-bit group stores it: float16 with 5 bits of mantissa, from 2^-14 to 64,512; float32."""
    mantissa, exponent = torch.frexp(scale.clamp(SMALLEST_ONE_BIT_SCALE, LARGEST_ONE_BIT_SCALE))
    return torch.ldexp((mantissa * 64).round(), exponent - 6)


def _pack_one_bit(scales: Tensor, means: Tensor) -> Tensor:
    """Scale and mean of one-bit groups as int16: the mean's sign takes the sign bit, its low bits the lowest five."""
    word = scales.float().to(torch.float16).view(torch.int16).to(torch.int32) & _SCALE_BITS
    mean = means.to(torch.int32)
    word |= mean & _LOW_BITS
    word |= (mean < 0) * _SIGN_BIT
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16).contiguous()


def _unpack_one_bit(words: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse: scales float32, means int8."""
    word = words.to(torch.int32) & 0xFFFF
    mean = (word & _LOW_BITS) - MEAN_STEPS * (word >> 15)
    return (word & _SCALE_BITS).to(torch.int16).view(torch.float16).float(), mean.to(torch.int8)
