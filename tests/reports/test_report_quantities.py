import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.reports.quantities import (
    spell_bytes,
    spell_count,
    spell_measured,
    spell_measurement,
    spell_number,
    spell_seconds,
    spell_share,
    spell_tick,
    spell_unit,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (12.0, "12"), (123456.0, "123,456"), (0.123456, "0.123"), (0.0999999, "0.100"),
        (-2.34567, "−2.35"), (1234.56, "1,235"), (9.999, "10.0"), (0.00012345, "1.23×10⁻⁴"), (4.2e-12, "4.20×10⁻¹²"),
        (3.1e7, "3.10×10⁷"), (-3.15e-5, "−3.15×10⁻⁵"), (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "not a number"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert spell_number(value) == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (23.4567, 0.1234, "23.46 ± 0.12"),
        (0.0213419, 0.00061234, "0.02134 ± 0.00061"),
        (1234.5, 56.7, "1,234 ± 57"),  # round half to even
        (0.0, 0.0021, "0.0000 ± 0.0021"),
        (2.134e-6, 4.1e-8, "(2.134 ± 0.041)×10⁻⁶"),
        (3.0e8, 2.2e6, "(3.000 ± 0.022)×10⁸"),
        (-0.5, 0.0996, "−0.50 ± 0.10"),
        (0.81, None, "0.810"),
        (0.81234, 0.0, "0.8123 ± 0"),
    ],
)
def test_errors_have_two_digits_and_values_as_many_decimals(value: float, stderr: float | None, text: str) -> None:
    assert spell_measured(value, stderr) == text


@given(st.floats(1e-12, 1e12), st.floats(1e-3, 10))
@settings(deadline=None, max_examples=200)
def test_a_spelled_error_is_within_five_percent_of_the_error(value: float, ratio: float) -> None:
    stderr = value * ratio
    text = spell_measured(value, stderr).replace(",", "").replace("−", "-")
    power = 1.0
    if "×10" in text:
        text, spelled_power = text.split("×10")
        power = 10.0 ** int(spelled_power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    shown_value, shown_error = (float(part) * power for part in text.strip("()").split(" ± "))
    assert abs(shown_error - stderr) <= 0.051 * stderr
    assert abs(shown_value - value) <= 0.051 * stderr


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB (0.98 KiB)"), (3_120_456, "3.12 MB (2.98 MiB)"),
        (999_600, "1.00 MB (976 KiB)"), (125_829_120, "126 MB (120 MiB)"), (39_000_000_000, "39.0 GB (36.3 GiB)"),
    ],
)  # fmt: skip
def test_bytes_are_spelled_in_both_units(size_bytes: int, text: str) -> None:
    assert spell_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.417, "0.42 s"), (12.34, "12.3 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text


def test_counts_shares_and_ticks() -> None:
    assert [spell_count(n) for n in (9_999, 10_000, 2_622_976, 999_600_000)] == ["9,999", "10.0 k", "2.62 M", "1.00 B"]
    assert [spell_share(part, 1000) for part in (0, 0.5, 333, 1000)] == ["0.0 %", "< 0.1 %", "33.3 %", "100 %"]
    assert spell_share(1, 0) == "–"
    assert [spell_tick(value) for value in (0.01, 0.3, 3e-4, 1e-5, 20)] == ["0.01", "0.3", "3×10⁻⁴", "10⁻⁵", "20"]


def test_units_and_measurements_for_people() -> None:
    assert spell_unit("kl_nats_per_token") == "nats/token"
    assert spell_unit("nll_nats_per_token_times_relative_error") == "nats/token × relative error"
    assert spell_measurement("weight_bytes", 3_120_456, None) == "3.12 MB (2.98 MiB)"
    assert spell_measurement("weight_bytes", 3_120_456, None, brief=True) == "3.12 MB"
    assert spell_measurement("parameters", 2_622_976, None) == "2,622,976"
    assert spell_measurement("compression_vs_float16", 3.6041, None) == "3.60×"
    assert spell_measurement("accuracy", 0.8083, 0.0124) == "0.808 ± 0.012"
