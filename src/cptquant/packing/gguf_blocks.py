"""Lossless codecs of GGUF's blocks: integers and scales to bytes and back, vectorised in numpy.

Byte layouts are ggml's (`ggml-common.h`); each packer is checked byte by byte against the `gguf` package's dequantizer.
Codes come from `lowest_code` (Q4_0: -8 to 7) and are shifted to the stored unsigned form here; scales of Q3_K lie in
[-32, 31] and are stored plus 32. Everything works on (n, ...) arrays of whole blocks, a cache-sized piece at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.gguf_types import BLOCK_LAYOUTS, BlockLayout, GgufType

Bytes = NDArray[Any]
"""uint8; numpy's type stubs lose that in shifts."""
Codes = NDArray[np.int8]
Halves = NDArray[np.float16]

_CHUNK_WEIGHTS = 1 << 18
"""Weights packed at a time: their buffers stay inside the processor's second cache."""


@dataclass(frozen=True)
class Fields:
    """The numbers in n blocks of one type.

    Attributes:
        codes: int8 (n, block_columns), in the layout's code range.
        d: float16 (n,). scales: int8 (n, sub-blocks), or None where d is the scale itself.
        minimum: float16 (n,): dmin or m; None where the type is symmetric.
        minimum_codes: int8 (n, sub-blocks): mn; None without integer minima.
    """

    codes: Codes
    d: Halves
    scales: Codes | None = None
    minimum: Halves | None = None
    minimum_codes: Codes | None = None

    def part(self, rows: slice) -> "Fields":
        """Some of the blocks."""

        def cut(values: NDArray[np.generic] | None) -> NDArray[np.generic] | None:
            return None if values is None else values[rows]

        return Fields(self.codes[rows], self.d[rows], cut(self.scales), cut(self.minimum), cut(self.minimum_codes))  # type: ignore[arg-type]


def pack_blocks(block: GgufType, fields: Fields) -> Bytes:
    """Blocks as bytes.

    Returns:
        uint8 (n, block_bytes).
    """
    layout = BLOCK_LAYOUTS[block]
    count = fields.codes.shape[0]
    packed = np.empty((count, layout.block_bytes), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // layout.block_columns)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        _PACKERS[block](layout, fields.part(rows), packed[rows])
    return packed


def unpack_blocks(
    block: GgufType,
    packed: Bytes,  # (n, block_bytes)
) -> Fields:
    """Inverse of `pack_blocks`, exact for any bytes."""
    return _UNPACKERS[block](BLOCK_LAYOUTS[block], packed)


# Pieces that several types share.


def _halves(values: Halves | None) -> Bytes:
    assert values is not None  # the layout has this field
    return np.ascontiguousarray(values, np.dtype("<f2")).view(np.uint8).reshape(-1, 2)


def _read_half(packed: Bytes, offset: int) -> Halves:
    return np.ascontiguousarray(packed[:, offset : offset + 2]).view("<f2").reshape(-1).astype(np.float16, copy=False)


def _stored(layout: BlockLayout, codes: Codes) -> Bytes:
    """Codes as the unsigned numbers in the file."""
    unsigned = codes.view(np.uint8)
    return unsigned if layout.lowest_code == 0 else unsigned + np.uint8(-layout.lowest_code)


def _codes(layout: BlockLayout, stored: Bytes) -> Codes:
    return (stored - np.uint8(-layout.lowest_code)).view(np.int8) if layout.lowest_code else stored.view(np.int8)


def _pack_nibbles(stored: Bytes, half: int, out: Bytes) -> None:
    """Low nibble: weight i, high nibble: weight i + half, in runs of 2 * half weights."""
    runs = stored.reshape(stored.shape[0], -1, 2, half)
    np.bitwise_or(runs[:, :, 0] & 15, runs[:, :, 1] << 4, out=out.reshape(stored.shape[0], -1, half))


def _unpack_nibbles(packed: Bytes, half: int) -> Bytes:
    runs = packed.reshape(packed.shape[0], -1, 1, half)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(packed.shape[0], -1)


def _pack_pairs(two_bits: Bytes) -> Bytes:
    """Four 2-bit numbers a byte: weight i of 128 at bits 2 * (i // 32) of byte i % 32."""
    runs = two_bits.reshape(two_bits.shape[0], -1, 4, 32)
    packed = runs[:, :, 0] | (runs[:, :, 1] << 2)
    packed |= runs[:, :, 2] << 4
    packed |= runs[:, :, 3] << 6
    return packed.reshape(two_bits.shape[0], -1)


def _unpack_pairs(packed: Bytes) -> Bytes:
    runs = packed.reshape(packed.shape[0], -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((runs >> shifts) & 3).reshape(packed.shape[0], -1)


def _pack_planes(bits: Bytes) -> Bytes:
    """One bit a weight: weight i of 256 at bit i // 32 of byte i % 32."""
    runs = bits.reshape(bits.shape[0], 8, 32)
    packed = runs[:, 0].copy()
    for plane in range(1, 8):
        packed |= runs[:, plane] << plane
    return packed


def _unpack_planes(packed: Bytes) -> Bytes:
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return ((packed[:, None, :] >> shifts) & 1).reshape(packed.shape[0], -1)


# Blocks of 32.


def _pack_simple(layout: BlockLayout, fields: Fields, out: Bytes) -> None:
    out[:, :2] = _halves(fields.d)
    offset = 2
    if layout.minimum == "float":
        out[:, 2:4] = _halves(fields.minimum)
        offset = 4
    stored = _stored(layout, fields.codes)
    if layout.code_bits == 8:
        out[:, offset:] = fields.codes.view(np.uint8)
        return
    if layout.code_bits == 5:
        out[:, offset : offset + 4] = np.packbits(stored >> 4, axis=1, bitorder="little")
        offset += 4
    nibbles = np.empty((stored.shape[0], 16), np.uint8)
    _pack_nibbles(stored, 16, nibbles)
    out[:, offset:] = nibbles


def _unpack_simple(layout: BlockLayout, packed: Bytes) -> Fields:
    d = _read_half(packed, 0)
    offset, minimum = 2, None
    if layout.minimum == "float":
        minimum, offset = _read_half(packed, 2), 4
    if layout.code_bits == 8:
        return Fields(np.ascontiguousarray(packed[:, offset:]).view(np.int8), d)
    high: Bytes | None = None
    if layout.code_bits == 5:
        high = np.unpackbits(packed[:, offset : offset + 4], axis=1, bitorder="little")
        offset += 4
    stored = _unpack_nibbles(packed[:, offset:], 16)
    if high is not None:
        stored |= high << 4
    return Fields(_codes(layout, stored), d, minimum=minimum)


# Super-blocks of 256.


def _pack_q2_k(layout: BlockLayout, fields: Fields, out: Bytes) -> None:
    assert fields.scales is not None and fields.minimum_codes is not None
    out[:, :16] = fields.scales.view(np.uint8) | (fields.minimum_codes.view(np.uint8) << 4)
    out[:, 16:80] = _pack_pairs(fields.codes.view(np.uint8))
    out[:, 80:82], out[:, 82:84] = _halves(fields.d), _halves(fields.minimum)


def _unpack_q2_k(layout: BlockLayout, packed: Bytes) -> Fields:
    both = packed[:, :16]
    return Fields(
        _unpack_pairs(packed[:, 16:80]).view(np.int8),
        _read_half(packed, 80),
        (both & 15).view(np.int8),
        _read_half(packed, 82),
        (both >> 4).view(np.int8),
    )


def _pack_q3_k(layout: BlockLayout, fields: Fields, out: Bytes) -> None:
    assert fields.scales is not None
    stored = _stored(layout, fields.codes)
    out[:, :32] = _pack_planes(stored >> 2)
    out[:, 32:96] = _pack_pairs(stored & 3)
    scales = fields.scales.view(np.uint8) + np.uint8(32)
    out[:, 96:104] = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    high = (scales >> 4).reshape(-1, 4, 4)
    out[:, 104:108] = high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)
    out[:, 108:110] = _halves(fields.d)


def _unpack_q3_k(layout: BlockLayout, packed: Bytes) -> Fields:
    stored = _unpack_pairs(packed[:, 32:96]) | (_unpack_planes(packed[:, :32]) << 2)
    low = np.concatenate([packed[:, 96:104] & 15, packed[:, 96:104] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high = ((packed[:, None, 104:108] >> shifts) & 3).reshape(-1, 16)
    scales = ((low | (high << 4)) - np.uint8(32)).view(np.int8)
    return Fields(_codes(layout, stored), _read_half(packed, 108), scales)


def _pack_six_bit_scales(scales: Codes, minima: Codes, out: Bytes) -> None:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes, as Q4_K and Q5_K have them."""
    sc, mn = scales.view(np.uint8), minima.view(np.uint8)
    out[:, 0:4] = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    out[:, 4:8] = mn[:, :4] | ((mn[:, 4:] >> 4) << 6)
    out[:, 8:12] = (sc[:, 4:] & 15) | ((mn[:, 4:] & 15) << 4)


def _unpack_six_bit_scales(packed: Bytes) -> tuple[Codes, Codes]:
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.view(np.int8), minima.view(np.int8)


def _pack_q4_q5_k(layout: BlockLayout, fields: Fields, out: Bytes) -> None:
    assert fields.scales is not None and fields.minimum_codes is not None
    out[:, 0:2], out[:, 2:4] = _halves(fields.d), _halves(fields.minimum)
    _pack_six_bit_scales(fields.scales, fields.minimum_codes, out[:, 4:16])
    stored = fields.codes.view(np.uint8)
    offset = 16
    if layout.code_bits == 5:
        out[:, 16:48] = _pack_planes(stored >> 4)
        offset = 48
    nibbles = np.empty((stored.shape[0], 128), np.uint8)
    _pack_nibbles(stored, 32, nibbles)
    out[:, offset:] = nibbles


def _unpack_q4_q5_k(layout: BlockLayout, packed: Bytes) -> Fields:
    scales, minima = _unpack_six_bit_scales(packed[:, 4:16])
    offset = 48 if layout.code_bits == 5 else 16
    stored = _unpack_nibbles(packed[:, offset:], 32)
    if layout.code_bits == 5:
        stored |= _unpack_planes(packed[:, 16:48]) << 4
    return Fields(stored.view(np.int8), _read_half(packed, 0), scales, _read_half(packed, 2), minima)


def _pack_q6_k(layout: BlockLayout, fields: Fields, out: Bytes) -> None:
    assert fields.scales is not None
    stored = _stored(layout, fields.codes)
    low = np.empty((stored.shape[0], 128), np.uint8)
    _pack_nibbles(stored, 64, low)
    out[:, :128] = low
    out[:, 128:192] = _pack_pairs(stored >> 4)
    out[:, 192:208] = fields.scales.view(np.uint8)
    out[:, 208:210] = _halves(fields.d)


def _unpack_q6_k(layout: BlockLayout, packed: Bytes) -> Fields:
    stored = _unpack_nibbles(packed[:, :128], 64) | (_unpack_pairs(packed[:, 128:192]) << 4)
    scales = np.ascontiguousarray(packed[:, 192:208]).view(np.int8)
    return Fields(_codes(layout, stored), _read_half(packed, 208), scales)


_PACKERS: dict[GgufType, Callable[[BlockLayout, Fields, Bytes], None]] = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_q5_k,
    "Q5_K": _pack_q4_q5_k,
    "Q6_K": _pack_q6_k,
    "Q8_0": _pack_simple,
    "Q4_0": _pack_simple,
    "Q4_1": _pack_simple,
    "Q5_0": _pack_simple,
    "Q5_1": _pack_simple,
}
_UNPACKERS: dict[GgufType, Callable[[BlockLayout, Bytes], Fields]] = {
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_q5_k,
    "Q5_K": _unpack_q4_q5_k,
    "Q6_K": _unpack_q6_k,
    "Q8_0": _unpack_simple,
    "Q4_0": _unpack_simple,
    "Q4_1": _unpack_simple,
    "Q5_0": _unpack_simple,
    "Q5_1": _unpack_simple,
}
