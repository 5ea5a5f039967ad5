"""Groups of mixed width: exact round trips, bytes as priced, one-bit groups with their mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import decode, encode, join_rows
from cptquant.packing.segments import SegmentedWeight, round_one_bit_scale


@st.composite
def segmented_weights(draw) -> SegmentedWeight:
    bits, group = draw(st.integers(2, 7)), draw(st.sampled_from([32, 64, 96]))
    is_sorted = draw(st.booleans())
    fmt = QuantFormat(code_bits=bits, granularity=group, storage="segments", sorted_columns=is_sorted)
    groups, rows = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    pairs = draw(st.integers(0, groups // 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    change = torch.tensor([-1] * pairs + [1] * pairs + [0] * (groups - 2 * pairs))[
        torch.randperm(groups, generator=generator)
    ]
    widths = (change + bits).to(torch.uint8)
    half = (1 << (widths.long() - 1)).repeat_interleave(group)
    uniform = torch.rand(rows, groups * group, generator=generator)
    codes = (uniform * 2 * half).floor().sub(half).clamp(min=-half, max=half - 1).to(torch.int8)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    scales = torch.randn(rows, groups, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    scales = torch.where(widths == 1, round_one_bit_scale(scales.abs()), scales).to(dtype)
    means = torch.randint(-32, 32, (rows, groups), generator=generator) * (widths == 1)
    return SegmentedWeight(
        fmt, widths, codes, scales, means.to(torch.int8) if bits == 2 else None,
        torch.randperm(groups * group, generator=generator) if is_sorted else None,
    )  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(segmented_weights())
def test_round_trip_and_bytes(weight: SegmentedWeight) -> None:
    tensors = encode(weight)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == weight.format.stored_bytes(*weight.shape)
    back = decode(tensors, weight.format, weight.shape)
    assert isinstance(back, SegmentedWeight)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(decode(encode(back), weight.format, weight.shape).dequantize(), weight.dequantize())
    if weight.order is None:
        assert torch.equal(back.widths, weight.widths) and torch.equal(back.codes, weight.codes)
    middle = weight.shape[0] // 2
    joined = join_rows([weight.rows(slice(0, middle)), weight.rows(slice(middle, None))])
    assert torch.equal(joined.dequantize(), weight.dequantize())


@settings(deadline=None, max_examples=100)
@given(segmented_weights())
def test_widths_average_exactly_n(weight: SegmentedWeight) -> None:
    assert int(weight.widths.sum()) == weight.format.code_bits * len(weight.widths)
    wrong = weight.widths.clone()
    wrong[0] += 1
    with pytest.raises(ValueError, match="that average to it"):
        SegmentedWeight(weight.format, wrong, weight.codes, weight.scales, weight.means, weight.order)


def test_halves_have_no_group_of_n_bits() -> None:
    fmt = QuantFormat.parse("slim3-g32-halves")
    assert fmt.halves and fmt.name == "slim3-g32-halves"
    assert QuantFormat.parse("slim3-g32-sorted-halves").name == "slim3-g32-sorted-halves"
    codes, scales = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2, dtype=torch.float16)
    weight = SegmentedWeight(fmt, torch.tensor([4, 2], dtype=torch.uint8), codes, scales)
    tensors = encode(weight)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == fmt.stored_bytes(2, 64)
    with pytest.raises(ValueError, match=r"^half of the groups of slim3-g32-halves have 2 bits, half 4$"):
        SegmentedWeight(fmt, torch.tensor([3, 3], dtype=torch.uint8), codes, scales)
    assert fmt.segments_refusal(96) == "slim3-g32-halves needs an even number of groups: a row of 96 has 3"
    with pytest.raises(ValueError, match="needs an even number of groups"):
        fmt.stored_bytes(2, 96)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-14, 1e-3, 0.013, 0.9999, 1.0, 7.77, 3e4, 65000.0, 1e6])
def test_one_bit_scales_keep_five_bits_of_mantissa(scale: float) -> None:
    stored = float(round_one_bit_scale(torch.tensor([scale])))
    assert stored == pytest.approx(min(max(scale, 2.0**-14), 64512), rel=1 / 64)
    for dtype in (torch.float16, torch.bfloat16):
        assert float(torch.tensor(stored).to(dtype)) == stored


def test_damaged_tensors_are_refused() -> None:
    fmt = QuantFormat.parse("slim2-g32")
    widths = torch.tensor([1, 3], dtype=torch.uint8)
    weight = SegmentedWeight(
        fmt, widths, torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2, dtype=torch.float16),
        torch.zeros(2, 2, dtype=torch.int8),
    )  # fmt: skip
    tensors = encode(weight)
    for name in tensors:
        with pytest.raises(ArtifactError, match=f"tensor {name} of a slim2-g32 matrix is missing; quantize again"):
            decode({key: value for key, value in tensors.items() if key != name}, fmt, (2, 64))
    with pytest.raises(ArtifactError, match=r"weight_shape of a slim2-g32 matrix says \[2, 64\], expected \[3, 64\]"):
        decode(tensors, fmt, (3, 64))
    shape = {"weight_shape": torch.tensor([3, 64])}
    with pytest.raises(ArtifactError, match=r"weight_packed of a slim2-g32 matrix must be torch.int32 \(3, 4\), found"):
        decode(tensors | shape, fmt, (3, 64))
    with pytest.raises(ArtifactError, match="32 columns do not divide a row of 48; the file does not belong"):
        decode(tensors, fmt, (2, 48))
    with pytest.raises(ArtifactError, match="weight_widths of a slim2-g32 matrix does not average 2 bits"):
        decode(tensors | {"weight_widths": torch.tensor([5], dtype=torch.uint8) * 2}, fmt, (2, 64))


@pytest.mark.parametrize("columns", [[0] * 64, [*range(63), 64]])
def test_columns_that_are_no_permutation_are_refused(columns: list[int]) -> None:
    fmt = QuantFormat.parse("slim2-g32-sorted")
    weight = SegmentedWeight(
        fmt, torch.tensor([2, 2], dtype=torch.uint8), torch.zeros(2, 64, dtype=torch.int8),
        torch.ones(2, 2, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.int8), torch.arange(64),
    )  # fmt: skip
    tensors = encode(weight) | {"weight_columns": torch.tensor(columns).to(torch.uint16)}
    with pytest.raises(ArtifactError, match="weight_columns of a slim2-g32-sorted matrix does not name every column"):
        decode(tensors, fmt, (2, 64))
