import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_bytes import stored_bytes
from pydantic import ValidationError

from cptquant.core.errors import FormatError
from cptquant.core.formats import BFLOAT16, FLOAT16, INTEGER_CODE_BITS, QuantFormat


@st.composite
def quant_formats(draw):
    bits = draw(st.sampled_from(INTEGER_CODE_BITS))
    return QuantFormat(
        code_bits=bits,
        granularity=draw(st.one_of(st.integers(1, 70), st.sampled_from(["channel", "tensor"]))),
        symmetric=draw(st.booleans()),
        storage=draw(st.sampled_from(["packed", "plain"])) if bits == 8 else "packed",
    )


@settings(deadline=None, max_examples=300)
@given(quant_formats(), st.integers(1, 40), st.integers(1, 150))
def test_bytes_are_those_of_the_tensors_that_would_be_written(fmt, rows, columns):
    assert fmt.stored_bytes(rows, columns) == stored_bytes(fmt, rows, columns)
    assert fmt.bits_per_weight(rows, columns) == 8 * stored_bytes(fmt, rows, columns) / (rows * columns)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        ("float16", 3, 5, 30),
        ("bfloat16", 3, 5, 30),
        ("int4-g64", 128, 128, 128 * (64 + 4) + 16),
        ("int3-g64", 128, 128, 128 * (48 + 4) + 16),
        ("int3-channel", 1, 11, 8 + 2 + 16),  # 33 bits take two words
        ("int4-g64", 2, 65, 2 * (36 + 4) + 16),  # the last group has one column
        ("int8-channel-plain", 10, 16, 10 * 18),
        ("int4-tensor-asym", 4, 8, 16 + 2 + 1 + 16),
        ("int4-channel-asym", 9, 8, 36 + 18 + 8 + 16),  # nine zero points of four bits take two words
        ("int3-g64-c2", 128, 128, 128 * (48 + 4) + 16 + 3 * (128 + 2 + 2)),  # 2.56 columns are 3
        ("int3-g64-c0.1", 128, 128, 128 * (48 + 4) + 16 + 128 + 2 + 2),  # at least one column
    ],
)
def test_bytes_of_known_cases(name, rows, columns, expected):
    assert QuantFormat.parse(name).stored_bytes(rows, columns) == expected


@settings(deadline=None, max_examples=100)
@given(quant_formats())
def test_names_round_trip(fmt):
    assert QuantFormat.parse(fmt.name) == fmt
    assert str(fmt) == fmt.name


def test_floats_round_trip():
    assert (QuantFormat.parse("float16"), QuantFormat.parse("bfloat16")) == (FLOAT16, BFLOAT16)
    assert FLOAT16.is_float and BFLOAT16.is_float and not QuantFormat.parse("int8-channel").is_float


def test_scale_counts():
    grouped, channel, tensor = (QuantFormat.parse(f"int4-{name}") for name in ("g64", "channel", "tensor"))
    assert [fmt.scale_count(10, 130) for fmt in (grouped, channel, tensor)] == [30, 10, 1]
    assert [fmt.group_count(130) for fmt in (grouped, channel, tensor)] == [3, 1, 1]


@pytest.mark.parametrize(
    "name", ["", "int4", "int1-g64", "int9-g64", "float32", "int4-g64-sym", "INT4-g64", "int4-g64\n", " int4-g64",
             "int4-g-3", "int4-g٣", "int3-g64-c", "int3-g64-c2.0", "int3-g64-c100", "int8-g64-plain-c2",
             "int3-g64-r", "int3-g64-r1000", "int3-g64-c2-r2", "int8-g64-plain-r2"],
)  # fmt: skip
def test_unreadable_names(name):
    with pytest.raises(FormatError) as caught:
        QuantFormat.parse(name)
    assert str(caught.value) == (
        f"format {name!r} is not readable; write int<2..8>-g<group size>, int<2..8>-channel or int<2..8>-tensor, with "
        "-asym for a zero point (int4-g64, int8-channel, int4-tensor-asym), a block format of GGUF (Q2_K, Q3_K, Q4_K, "
        "Q5_K, Q6_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1), slim<2..7>-g<group size>[-sorted][-halves] for groups of mixed "
        "width, an int format of at most 7 bits with -c<percent> for columns corrected in 8 bits (int3-g64-c2) or "
        "-r<rank> for a product of two thin 8-bit factors beside the codes (int3-g64-r4), or float16, bfloat16"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int4-g0", "a group has at least 1 column, got 0"),
        ("int4-g64-plain", "plain storage holds 8-bit codes only, got code_bits = 4"),
        ("int8-g64-c2", "columns are corrected in 8 bits, which 8-bit codes do not need; leave -c out"),
        ("int8-g64-r2", "a low-rank correction has 8 bits, which 8-bit codes do not need; leave -r out"),
        ("int3-g64-r0", "a low-rank correction has rank 1 to 256, got 0"),
        ("int3-g64-r257", "a low-rank correction has rank 1 to 256, got 257"),
        ("int3-g64-c0", "0.1 to 25 % of the columns can be corrected, got 0"),
        ("int3-g64-c25.1", "0.1 to 25 % of the columns can be corrected, got 25.1"),
    ],
)
def test_readable_names_of_impossible_formats(name, reason):
    with pytest.raises(FormatError) as caught:
        QuantFormat.parse(name)
    assert str(caught.value) == f"format {name!r}: {reason}"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"code_bits": 1}, r"code_bits must be one of \(2, 3, 4, 5, 6, 7, 8\), got 1"),
        ({"code_bits": 8, "storage": "float16"}, "a float16 format has code_bits = 16, got 8"),
        ({"code_bits": 4, "granularity": 0}, "a group has at least 1 column, got 0"),
        ({"code_bits": "4"}, "valid integer"),
        ({"code_bits": 4, "group_size": 64}, "Extra inputs"),
        ({"code_bits": 4, "column_share": 20}, "only columns storage corrects columns, not packed storage"),
    ],
)
def test_impossible_fields(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        QuantFormat(**fields)
