"""The codec is exact, as large as the format says, and read alike by compressed-tensors itself."""

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import FLOAT16, QuantFormat
from cptquant.packing.quantized_weight import QuantizedWeight, decode, encode, join_rows, scale_shape


@st.composite
def formats(draw: st.DrawFn) -> QuantFormat:
    storage = draw(st.sampled_from(["packed", "packed", "plain"]))
    return QuantFormat(
        code_bits=8 if storage == "plain" else draw(st.integers(2, 8)),
        granularity=draw(st.one_of(st.sampled_from(["channel", "tensor"]), st.sampled_from([1, 3, 16, 32, 64]))),
        symmetric=draw(st.booleans()),
        storage=storage,
    )


def random_weight(fmt: QuantFormat, rows: int, columns: int, seed: int, dtype=torch.float16) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (fmt.code_bits - 1)), 2 ** (fmt.code_bits - 1)
    shape = scale_shape(fmt, rows, columns)
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.randn(shape, generator=generator).clamp(-2, 2).add(3).mul(0.01).to(dtype)
    zeros = None if fmt.symmetric else torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return QuantizedWeight(fmt, codes, scales, zeros)


@settings(deadline=None, max_examples=150)
@given(formats(), st.integers(1, 70), st.integers(1, 150), st.integers(0, 2**31), st.booleans())
def test_round_trip_is_exact_and_as_large_as_stated(fmt, rows, columns, seed, bfloat) -> None:
    weight = random_weight(fmt, rows, columns, seed, torch.bfloat16 if bfloat else torch.float16)
    tensors = encode(weight)
    assert sum(tensor.nbytes for tensor in tensors.values()) == fmt.stored_bytes(rows, columns)
    back = decode(tensors, fmt, (rows, columns))
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales) and back.scales.dtype is weight.scales.dtype
    assert (back.zeros is None) if weight.zeros is None else torch.equal(back.zeros, weight.zeros)
    assert torch.equal(back.dequantize(), weight.dequantize())


def scheme_of(fmt: QuantFormat) -> QuantizationScheme:
    strategy = "group" if isinstance(fmt.granularity, int) else fmt.granularity
    args = QuantizationArgs(
        num_bits=fmt.code_bits,
        type="int",
        symmetric=fmt.symmetric,
        strategy=strategy,
        group_size=fmt.granularity if isinstance(fmt.granularity, int) else None,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", [32, 64, "channel", "tensor"])
@pytest.mark.parametrize("code_bits", range(2, 9))
def test_compressed_tensors_reads_the_same_floats(code_bits: int, granularity: int | str, symmetric: bool) -> None:
    fmt = QuantFormat(code_bits=code_bits, granularity=granularity, symmetric=symmetric)
    weight = random_weight(fmt, 24, 192, seed=code_bits, dtype=torch.bfloat16)
    stored = encode(weight)
    # A model loaded in float32 has float32 scales; one loaded in bfloat16 rounds the product once more.
    as_float32 = {**stored, "weight_scale": stored["weight_scale"].float()}
    theirs = PackedQuantizationCompressor.decompress(as_float32, scheme_of(fmt))["weight"]
    assert theirs.dtype is torch.float32 and torch.equal(theirs, weight.dequantize())
    theirs = PackedQuantizationCompressor.decompress(stored, scheme_of(fmt))["weight"]
    assert theirs.dtype is torch.bfloat16 and torch.equal(theirs, weight.dequantize().bfloat16())


@pytest.mark.parametrize("granularity", [32, "channel", "tensor"])
def test_compressed_tensors_reads_plain_storage(granularity: int | str) -> None:
    fmt = QuantFormat(code_bits=8, granularity=granularity, storage="plain")
    weight = random_weight(fmt, 50, 96, seed=1)
    stored = encode(weight)
    theirs = IntQuantizationCompressor.decompress(
        {**stored, "weight_scale": stored["weight_scale"].float()}, scheme_of(fmt)
    )
    assert torch.equal(theirs["weight"], weight.dequantize())


def test_dequantize_spells_out_the_formula() -> None:
    fmt = QuantFormat(code_bits=4, granularity=2, symmetric=False)
    weight = QuantizedWeight(
        fmt,
        torch.tensor([[-8, 7, 3], [0, 1, -1]], dtype=torch.int8),
        torch.tensor([[0.5, 2.0], [-0.25, 1.0]], dtype=torch.float16),
        torch.tensor([[1, 0], [-2, 5]], dtype=torch.int8),
    )
    assert weight.dequantize().tolist() == [[-4.5, 3.0, 6.0], [-0.5, -0.75, -6.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "weight_packed of a int4-g32 matrix .* is missing"),
        ({"weight_scale": torch.ones(4, 3)}, "weight_scale .* must be .*found torch.float32"),
        ({"weight_packed": torch.zeros(4, 9, dtype=torch.int32)}, r"found torch.int32 \(4, 9\)"),
        ({"weight_shape": torch.tensor([4, 65])}, r"weight_shape says \(4, 65\), expected \(4, 64\)"),
    ],
    ids=["missing", "dtype", "shape", "shape record"],
)
def test_foreign_tensors_are_refused(change: dict, message: str) -> None:
    fmt = QuantFormat.parse("int4-g32")
    tensors = encode(random_weight(fmt, 4, 64, seed=0))
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(ArtifactError, match=message):
        decode(tensors, fmt, (4, 64))


def test_float_formats_and_wrong_shapes_are_no_quantized_weight() -> None:
    codes = torch.zeros(2, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="float16 holds floats"):
        QuantizedWeight(FLOAT16, codes, torch.ones(2, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        QuantizedWeight(QuantFormat.parse("int4-g2"), codes, torch.ones(2, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="needs zero points"):
        QuantizedWeight(QuantFormat.parse("int4-g2-asym"), codes, torch.ones(2, 2, dtype=torch.float16))


@pytest.mark.parametrize("name", ["int3-g32", "int4-channel-asym", "int4-tensor-asym"])
def test_rows_can_be_taken_and_joined(name: str) -> None:
    weight = random_weight(QuantFormat.parse(name), 9, 70, seed=0)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(weight.rows(index).dequantize(), weight.dequantize()[index])
    assert torch.equal(weight.rows(slice(2, 5)).dequantize(), weight.dequantize()[2:5])
    if weight.format.granularity != "tensor":
        joined = join_rows([weight.rows(slice(0, 4)), weight.rows(slice(4, 9))])
        assert torch.equal(joined.dequantize(), weight.dequantize())
        assert join_rows([weight]) is weight
