"""Our integers in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized, without loss.

A row of `in_features` codes is cut into blocks of one scale each; codes are stored without sign (zero point 2^(b-1)
unless another is given), `8 / b` of them to a byte, the first in the lowest bits. Scales stay 16-bit floats.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import QuantizedWeight

NBITS_WIDTHS = (2, 4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 128
"""MatMulNBits takes blocks of powers of two from 16; at 256 its 2-bit kernel falls back to a slow path (measured), so
larger groups are written as several blocks with the same scale."""


@dataclass(frozen=True)
class NBitsWeight:
    """One matrix as MatMulNBits reads it: value = scale * (code - zero).

    Attributes:
        bits: 2, 4 or 8. block_size: input columns per block.
        codes: uint8 (out_features, blocks, block_size * bits / 8).
        scales: 16-bit float (out_features, groups), (out_features, 1) or (1, 1); `blocks` is a multiple of `groups`;
            consecutive blocks share a scale.
        zeros: uint8 (out_features, ceil(blocks * bits / 8)), packed like the codes; None where all are 2^(bits-1).
    """

    bits: int
    block_size: int
    codes: NDArray[np.uint8]
    scales: Tensor
    zeros: NDArray[np.uint8] | None

    @property
    def block_count(self) -> int:
        """Blocks of a row."""
        return self.codes.shape[1]


def block_size_of(fmt: QuantFormat, in_features: int) -> int:
    """Columns per block for a format: its group, or a power of two that divides it.

    Raises:
        FormatError: a width, group or row that MatMulNBits does not take.
    """
    if fmt.is_float or fmt.code_bits not in NBITS_WIDTHS:
        raise FormatError(f"{fmt.name} cannot be held by MatMulNBits: widths are 2, 4 and 8 bits")
    group = fmt.granularity if isinstance(fmt.granularity, int) else in_features
    if in_features % group:
        raise FormatError(f"{fmt.name}: groups of {group} columns do not divide a row of {in_features}")
    block = min(group & -group, LARGEST_BLOCK)  # the largest power of two that divides the group
    if block < SMALLEST_BLOCK:
        raise FormatError(f"{fmt.name} on {in_features} columns: a group must be divisible by {SMALLEST_BLOCK}")
    return block


def pack_nbits(weight: QuantizedWeight) -> NBitsWeight:
    """Codes, scales and zero points as MatMulNBits reads them; `unpack_nbits` is the exact inverse.

    Raises:
        FormatError: as `block_size_of`.
    """
    fmt = weight.format
    rows, columns = weight.codes.shape
    block = block_size_of(fmt, columns)
    offset = 1 << (fmt.code_bits - 1)
    unsigned = (weight.codes.to(torch.int16) + offset).to(torch.uint8).numpy()
    codes = _pack(unsigned, fmt.code_bits).reshape(rows, columns // block, block * fmt.code_bits // 8)
    scales = weight.scales.reshape(-1, fmt.group_count(columns))
    zeros = None
    if weight.zeros is not None:
        per_group = (weight.zeros.to(torch.int16) + offset).to(torch.uint8).numpy().reshape(scales.shape)
        spread = np.broadcast_to(per_group, (rows, per_group.shape[1]))
        zeros = _pack(np.repeat(spread, columns // block // spread.shape[1], axis=1), fmt.code_bits)
    return NBitsWeight(fmt.code_bits, block, codes, scales, zeros)


def unpack_nbits(packed: NBitsWeight, fmt: QuantFormat) -> QuantizedWeight:
    """The quantized weight that `pack_nbits` was given."""
    rows, blocks = packed.codes.shape[:2]
    offset = 1 << (fmt.code_bits - 1)
    flat = packed.codes.reshape(rows, -1)
    columns = blocks * packed.block_size
    codes = _signed(_unpack(flat, packed.bits, columns), offset)
    scales = packed.scales.reshape(-1) if fmt.granularity == "tensor" else packed.scales
    zeros = None
    if packed.zeros is not None:
        per_block = _signed(_unpack(packed.zeros, packed.bits, blocks), offset)
        zeros = per_block[:, :: blocks // packed.scales.shape[1]].contiguous()
        if fmt.granularity == "tensor":
            zeros = zeros.reshape(-1)[:1].contiguous()
    return QuantizedWeight(fmt, codes, scales, zeros)


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, n) values below 2^bits -> (rows, ceil(n * bits / 8)), the first value in the lowest bits."""
    per_byte = 8 // bits
    rows, count = values.shape
    if count % per_byte:
        values = np.pad(values, ((0, 0), (0, -count % per_byte)))
    lanes = values.reshape(rows, -1, per_byte)
    packed = np.zeros(lanes.shape[:2], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[:, :, lane] << np.uint8(lane * bits)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Inverse of `_pack`: (rows, bytes) -> (rows, count)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    lanes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return lanes.reshape(packed.shape[0], -1)[:, :count]


def _signed(values: NDArray[np.uint8], offset: int) -> Tensor:
    return torch.from_numpy((values.astype(np.int16) - offset).astype(np.int8))
