import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.formats import block_format
from cptquant.core.gguf_types import BLOCK_LAYOUTS
from cptquant.packing.block_weight import BlockWeight, join_block_rows
from cptquant.packing.gguf_blocks import pack_blocks, unpack_blocks

NAMES = sorted(BLOCK_LAYOUTS)


def random_weight(name, rows, blocks, seed):
    layout, generator = BLOCK_LAYOUTS[name], torch.Generator().manual_seed(seed)
    columns = blocks * layout.block_columns
    subs = columns // layout.sub_block

    def integers(low, high, shape):
        return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)

    def halves():
        return (torch.randn(rows, blocks, generator=generator) * 0.01).half()

    return BlockWeight(
        block_format(name),
        integers(layout.lowest_code, layout.highest_code, (rows, columns)),
        halves(),
        integers(*layout.scale_range, (rows, subs)) if layout.scale_range else None,
        None if layout.symmetric else halves(),
        integers(*layout.minimum_range, (rows, subs)) if layout.minimum_range else None,
    )


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_numbers_are_those_of_ggml(name):
    layout, kind = BLOCK_LAYOUTS[name], gguf.GGMLQuantizationType[name]
    assert (layout.block_columns, layout.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert layout.type_id == kind.value


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_packed_rows_mean_what_we_say_bit_for_bit(name, rows, blocks, seed):
    weight = random_weight(name, rows, blocks, seed)
    packed = weight.pack()
    assert packed.numel() == weight.format.stored_bytes(*weight.shape)
    theirs = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs.view(np.uint32), weight.dequantize().numpy().view(np.uint32))
    again = BlockWeight.unpack(weight.format, packed, weight.shape[1])
    for field in ("codes", "d", "scales", "minimum", "minimum_codes"):
        ours, read = getattr(weight, field), getattr(again, field)
        assert (ours is None and read is None) or torch.equal(ours, read)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_bytes_survive_unpacking_and_packing(name, data):
    size = BLOCK_LAYOUTS[name].block_bytes
    raw = np.frombuffer(data.draw(st.binary(min_size=3 * size, max_size=3 * size)), np.uint8).reshape(3, size)
    assert np.array_equal(pack_blocks(name, unpack_blocks(name, raw)), raw)


@pytest.mark.parametrize("name", NAMES)
def test_rows_move_and_join_freely(name):
    weight = random_weight(name, 6, 2, seed=1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(weight.rows(order).pack(), weight.pack()[order])
    halves = [weight.rows(slice(0, 2)), weight.rows(slice(2, 6))]
    assert torch.equal(join_block_rows(halves).pack(), weight.pack())


@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_scale_exactly(name):
    weight = random_weight(name, 4, 2, seed=2)
    assert torch.equal(weight.scaled(1024.0).dequantize(), weight.dequantize() * 1024)
    with pytest.raises(ValueError, match="do not fit float16: largest"):
        weight.scaled(2.0**30)


def test_wrong_fields_are_refused():
    weight = random_weight("Q4_K", 2, 1, seed=3)
    with pytest.raises(ValueError, match=r"scales of a Q4_K matrix must be \(torch.int8, \(2, 8\)\), got None"):
        BlockWeight(weight.format, weight.codes, weight.d, None, weight.minimum, weight.minimum_codes)
    with pytest.raises(ValueError, match="Q4_K has blocks of 256 columns, the row has 255"):
        BlockWeight(weight.format, weight.codes[:, :255], weight.d)
