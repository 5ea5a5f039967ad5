"""Products of low rank beside the codes: exact round trips, bytes as priced, damaged tensors refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, decode, encode, join_rows, scale_shape


@st.composite
def low_rank_weights(draw) -> CorrectedWeight:
    bits, symmetric = draw(st.integers(2, 7)), draw(st.booleans())
    granularity = draw(st.sampled_from([1, 16, 64, "channel", "tensor"]))
    base = QuantFormat(code_bits=bits, granularity=granularity, symmetric=symmetric)
    rows, columns = draw(st.integers(2, 40)), draw(st.integers(2, 150))
    rank = draw(st.integers(1, min(rows, columns) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))

    def integers(shape: tuple[int, ...], width: int) -> torch.Tensor:
        half = 1 << (width - 1)
        return torch.randint(-half, half, shape, generator=generator).to(torch.int8)

    shape = scale_shape(base, rows, columns)
    codes = QuantizedWeight(
        base, integers((rows, columns), bits), torch.randn(shape, generator=generator).to(dtype),
        None if symmetric else integers(shape, bits),
    )  # fmt: skip
    scales = torch.randn(rank, generator=generator).to(dtype)
    product = LowRankCorrection(integers((rows, rank), 8), integers((rank, columns), 8), scales)
    fmt = QuantFormat.model_validate({**base.model_dump(), "storage": "low-rank", "rank": rank})
    return CorrectedWeight(fmt, codes, product)


@settings(deadline=None, max_examples=150)
@given(low_rank_weights())
def test_round_trip_bytes_and_rows(weight: CorrectedWeight) -> None:
    tensors = encode(weight)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == weight.format.stored_bytes(*weight.shape)
    assert weight.format.correction_bytes(*weight.shape) == weight.format.rank * (sum(weight.shape) + 2)
    back = decode(tensors, weight.format, weight.shape)
    assert isinstance(back, CorrectedWeight) and torch.equal(back.codes, weight.codes)
    values = weight.dequantize()
    assert torch.equal(back.dequantize(), values)
    product = weight.correction
    assert isinstance(product, LowRankCorrection)
    slow = torch.zeros(weight.shape, dtype=torch.float64)  # one product after the other: the order does not matter
    for k in reversed(range(weight.format.rank)):
        slow += product.scales[k].double() * torch.outer(product.left[:, k].double(), product.right[k].double()) / 128
    assert torch.equal(values, weight.base.dequantize() + slow.float())
    assert torch.equal(product.added(weight.base.dequantize()), values)
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight.rows(order).dequantize(), values[order])
    if weight.format.granularity != "tensor":
        middle = weight.shape[0] // 2
        joined = join_rows([weight.rows(slice(0, middle)), weight.rows(slice(middle, None))])
        assert torch.equal(joined.dequantize(), values)


@settings(deadline=None, max_examples=100)
@given(low_rank_weights())
def test_names_round_trip(weight: CorrectedWeight) -> None:
    fmt = weight.format
    assert QuantFormat.parse(fmt.name) == fmt and fmt.on_base(fmt.base) == fmt
    assert fmt.name == f"{fmt.base.name}-r{fmt.rank}" and fmt.base.base == fmt.base
    wider = fmt.on_base(QuantFormat.parse("int4-channel"))
    assert wider.name == f"int4-channel-r{fmt.rank}"


def example() -> CorrectedWeight:
    fmt = QuantFormat.parse("int3-g16-r2")
    base = QuantizedWeight(fmt.base, torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 2, dtype=torch.float16))
    left, right = torch.ones(4, 2, dtype=torch.int8), torch.ones(2, 32, dtype=torch.int8)
    return CorrectedWeight(fmt, base, LowRankCorrection(left, right, torch.ones(2, dtype=torch.float16)))


def test_damaged_tensors_are_refused() -> None:
    weight = example()
    tensors = encode(weight)
    for name in tensors:
        with pytest.raises(ArtifactError, match=rf"tensor {name} of a int3-g16(-r2)? matrix \(4, 32\) is missing"):
            decode({key: value for key, value in tensors.items() if key != name}, weight.format, (4, 32))
    for changed, message in (
        (
            {"weight_low_rank_left": torch.ones(4, 3, dtype=torch.int8)},
            r"must be torch.int8 \(4, 2\), found torch.int8",
        ),
        ({"weight_low_rank_right": torch.ones(2, 32)}, r"must be torch.int8 \(2, 32\), found torch.float32"),
        ({"weight_low_rank_scale": torch.ones(2)}, r"must be torch.float16 \(2,\), found torch.float32"),
    ):
        with pytest.raises(ArtifactError, match=message):
            decode(tensors | changed, weight.format, (4, 32))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    weight = example()
    fmt, base, product = weight.format, weight.base, weight.correction
    assert isinstance(product, LowRankCorrection)
    with pytest.raises(
        ValueError, match=r"does not fit int3-g16-r2 of a 4 x 32 matrix: .* \[\(4, 1\), \(1, 32\), \(1,"
    ):
        CorrectedWeight(fmt, base, LowRankCorrection(product.left[:, :1], product.right[:1], product.scales[:1]))
    columns = ColumnCorrection(torch.tensor([3]), torch.ones(4, 1, dtype=torch.int8), torch.ones(1).half())
    with pytest.raises(
        ValueError, match="the correction does not fit int3-g16-r2 of a 4 x 32 matrix: ColumnCorrection"
    ):
        CorrectedWeight(fmt, base, columns)
    with pytest.raises(ValueError, match=r"left codes are int8 with 2 columns, got torch.int8 \(4, 1\)"):
        LowRankCorrection(product.left[:, :1], product.right, product.scales)
    with pytest.raises(ValueError, match=r"right codes are int8 with 2 rows, got torch.float32 \(2, 32\)"):
        LowRankCorrection(product.left, product.right.float(), product.scales)
    with pytest.raises(ValueError, match=r"scales are 16-bit floats \(rank,\), got torch.float32 \(2,\)"):
        LowRankCorrection(product.left, product.right, product.scales.float())
    other = CorrectedWeight(fmt, base, LowRankCorrection(product.left, -product.right, product.scales))
    with pytest.raises(ValueError, match="can be joined where their rows and scales are the same"):
        join_rows([weight, other])
