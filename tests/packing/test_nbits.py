"""Our codes in MatMulNBits' layout: exact round trips, and the layout itself against a reader written out in full."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.packing.nbits import block_size_of, pack_nbits, unpack_nbits
from cptquant.packing.quantized_weight import QuantizedWeight, scale_shape

GRANULARITIES = ["g16", "g32", "g48", "g64", "g256", "channel", "tensor"]


def draw_weight(name: str, rows: int, columns: int, seed: int) -> QuantizedWeight:
    fmt = QuantFormat.parse(name)
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (fmt.code_bits - 1)
    shape = scale_shape(fmt, rows, columns)
    codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.randn(shape, generator=generator).to(torch.bfloat16 if seed % 2 else torch.float16)
    zeros = None if fmt.symmetric else torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight(fmt, codes, torch.where(scales == 0, 1, scales).to(scales.dtype), zeros)


def read_entry(packed, row: int, column: int) -> float:
    """One weight by the documented layout, with no shared code: low bits first, zero point 2^(b-1) by default."""
    bits, block = packed.bits, packed.block_size
    index, inside = divmod(column, block)
    byte, lane = divmod(inside * bits, 8)
    code = (int(packed.codes[row, index, byte]) >> lane) & ((1 << bits) - 1)
    zero = 1 << (bits - 1)
    if packed.zeros is not None:
        byte, lane = divmod(index * bits, 8)
        zero = (int(packed.zeros[row, byte]) >> lane) & ((1 << bits) - 1)
    scales = packed.scales.float()
    scale = scales[min(row, len(scales) - 1), index // (packed.block_count // scales.shape[1])]
    return (code - zero) * scale.item()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 4, 8]), st.sampled_from(GRANULARITIES), st.booleans(), st.integers(1, 5), st.integers(0, 10**6)
)
def test_round_trip_is_exact(bits, granularity, asymmetric, rows, seed):
    name = f"int{bits}-{granularity}{'-asym' if asymmetric else ''}"
    weight = draw_weight(name, rows, 768, seed)
    packed = pack_nbits(weight)
    found = unpack_nbits(packed, weight.format)
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.scales, weight.scales)
    assert (found.zeros is None) == (weight.zeros is None)
    if weight.zeros is not None:
        assert torch.equal(found.zeros, weight.zeros)
    dense = weight.dequantize()
    for column in (0, 1, 17, 255, 767):
        assert read_entry(packed, rows - 1, column) == dense[rows - 1, column].item()


def test_large_groups_become_blocks_that_share_a_scale():
    packed = pack_nbits(draw_weight("int2-g256", 2, 512, 0))
    assert (packed.block_size, packed.block_count, packed.scales.shape[1]) == (128, 4, 2)
    assert packed.codes.shape == (2, 4, 32) and packed.codes.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("int3-g64", 128, "int3-g64 cannot be held by MatMulNBits: widths are 2, 4 and 8 bits"),
        ("float16", 128, "float16 cannot be held by MatMulNBits: widths are 2, 4 and 8 bits"),
        ("int4-g64", 96, "int4-g64: groups of 64 columns do not divide a row of 96"),
        ("int4-g24", 96, "int4-g24 on 96 columns: a group must be divisible by 16"),
        ("int4-channel", 100, "int4-channel on 100 columns: a group must be divisible by 16"),
    ],
)
def test_illegal_formats_are_refused(name, columns, message):
    with pytest.raises(FormatError) as error:
        block_size_of(QuantFormat.parse(name), columns)
    assert str(error.value) == message
