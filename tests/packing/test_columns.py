"""Corrected columns: exact round trips, bytes as priced, damaged tensors refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, decode, encode, join_rows, scale_shape


@st.composite
def corrected_weights(draw) -> CorrectedWeight:
    bits, symmetric = draw(st.integers(2, 7)), draw(st.booleans())
    granularity = draw(st.sampled_from([1, 16, 64, "channel", "tensor"]))
    base = QuantFormat(code_bits=bits, granularity=granularity, symmetric=symmetric)
    fmt = base.with_columns(draw(st.integers(1, 250)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 150))
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
    count = fmt.column_count(columns)
    numbers = torch.randperm(columns, generator=generator)[:count].sort().values
    scales = torch.randn(count, generator=generator).to(dtype)
    return CorrectedWeight(fmt, codes, ColumnCorrection(numbers, integers((rows, count), 8), scales))


@settings(deadline=None, max_examples=150)
@given(corrected_weights())
def test_round_trip_bytes_and_rows(weight: CorrectedWeight) -> None:
    tensors = encode(weight)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == weight.format.stored_bytes(*weight.shape)
    back = decode(tensors, weight.format, weight.shape)
    assert isinstance(back, CorrectedWeight)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.correction.codes, weight.correction.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())
    slow = weight.base.dequantize()
    for place, column in enumerate(weight.correction.columns.tolist()):
        slow[:, column] += weight.correction.codes[:, place].float() * weight.correction.scales[place].float()
    assert torch.equal(weight.dequantize(), slow)
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight.rows(order).dequantize(), slow[order])
    if weight.format.granularity != "tensor":
        middle = weight.shape[0] // 2
        joined = join_rows([weight.rows(slice(0, middle)), weight.rows(slice(middle, None))])
        assert torch.equal(joined.dequantize(), slow)


@settings(deadline=None, max_examples=100)
@given(corrected_weights())
def test_names_round_trip(weight: CorrectedWeight) -> None:
    fmt = weight.format
    assert QuantFormat.parse(fmt.name) == fmt and fmt.base.with_columns(fmt.column_share) == fmt
    assert fmt.name.startswith(f"{fmt.base.name}-c") and fmt.base.base == fmt.base


def example() -> CorrectedWeight:
    fmt = QuantFormat.parse("int3-g16-c10")
    base = QuantizedWeight(fmt.base, torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 2, dtype=torch.float16))
    scales = torch.ones(3, dtype=torch.float16)
    return CorrectedWeight(
        fmt, base, ColumnCorrection(torch.tensor([1, 7, 30]), torch.ones(2, 3, dtype=torch.int8), scales)
    )


def test_damaged_tensors_are_refused() -> None:
    weight = example()
    tensors = encode(weight)
    for name in tensors:
        with pytest.raises(ArtifactError, match=rf"tensor {name} of a int3-g16(-c10)? matrix \(2, 32\) is missing"):
            decode({key: value for key, value in tensors.items() if key != name}, weight.format, (2, 32))
    for changed, message in (
        ({"weight_correction": torch.ones(2, 4, dtype=torch.int8)}, r"must be torch.int8 \(2, 3\), found torch.int8"),
        ({"weight_correction_scale": torch.ones(3)}, r"must be torch.float16 \(3,\), found torch.float32"),
        ({"weight_correction_columns": torch.tensor([1, 7, 32]).to(torch.uint16)}, "does not name 3 of its columns in"),
        ({"weight_correction_columns": torch.tensor([7, 7, 30]).to(torch.uint16)}, "does not name 3 of its columns in"),
    ):
        with pytest.raises(ArtifactError, match=message):
            decode(tensors | changed, weight.format, (2, 32))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    weight = example()
    fmt, base, columns = weight.format, weight.base, weight.correction.columns
    codes, scales = weight.correction.codes, weight.correction.scales
    with pytest.raises(ValueError, match=r"^the codes of int3-g16-c10 are int3-g16, got int3-channel$"):
        channel = QuantFormat.parse("int3-channel")
        CorrectedWeight(fmt, QuantizedWeight(channel, base.codes, base.scales[:, :1]), weight.correction)
    with pytest.raises(ValueError, match=r"does not fit int3-g16-c10 of a 2 x 32 matrix: .* \[\(2, 2\), \(2,"):
        CorrectedWeight(fmt, base, ColumnCorrection(columns[:2], codes[:, :2], scales[:2]))
    with pytest.raises(ValueError, match="columns are int64 numbers, at least one, ascending"):
        ColumnCorrection(columns.flip(0), codes, scales)
    with pytest.raises(ValueError, match=r"codes are int8 \(out, 3\)"):
        ColumnCorrection(columns, codes[:, :2], scales)
    with pytest.raises(ValueError, match=r"scales are 16-bit floats \(3,\)"):
        ColumnCorrection(columns, codes, scales.float())
    with pytest.raises(ValueError, match="is of storage columns: it needs more than codes and scales"):
        QuantizedWeight(fmt, base.codes, base.scales)
    other = CorrectedWeight(fmt, base, ColumnCorrection(columns + 1, codes, scales))
    with pytest.raises(ValueError, match="can be joined where the same columns are corrected alike"):
        join_rows([weight, other])
