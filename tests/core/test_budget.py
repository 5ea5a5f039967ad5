from fractions import Fraction

import pytest
from allocation.made_layouts import make_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError

ALLOWED = "write --budget as 4bpw, 3.25bpw@sites, 25%, 12MB, 120MiB or 1.2GB"
LAYOUT = make_layout([[(8, 16), (4, 16)]], embedding=(10, 16), head=True, kept=6)  # 192 block weights of 518


@pytest.mark.parametrize(
    ("text", "expected", "limit_bytes"),
    [
        ("4bpw", Budget(4, "bpw", "file", "4bpw"), 259),
        ("3.25bpw@sites", Budget(3.25, "bpw", "sites", "3.25bpw@sites"), 78),
        ("25%", Budget(25, "%", "file", "25%"), 518),  # of float32
        ("12MB", Budget(12e6, "bytes", "file", "12MB"), 12_000_000),
        ("120MiB", Budget(120 * 2**20, "bytes", "file", "120MiB"), 125_829_120),
        ("1.2GB", Budget(1.2e9, "bytes", "file", "1.2GB"), 1_200_000_000),
        (".5 kb", Budget(500, "bytes", "file", ".5 kb"), 500),
        (" 4 BPW @sites ", Budget(4, "bpw", "sites", "4 BPW @sites"), 96),
    ],
)
def test_what_people_write(text, expected, limit_bytes):
    budget = Budget.parse(text)
    assert budget == expected
    assert budget.limit_bytes(LAYOUT) == limit_bytes


numbers = st.decimals(min_value="0.001", max_value="99999", places=3).map(lambda number: f"{number:f}")


@settings(deadline=None, max_examples=200)
@given(numbers, st.sampled_from(["bpw", "bpw@sites", "%", "B", "kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_every_number_and_unit_round_trips(number, unit):
    budget = Budget.parse(number + unit)
    assert budget.text == number + unit
    assert Budget.parse(budget.text) == budget
    assert budget.scope == ("sites" if unit == "bpw@sites" else "file")
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}.get(unit, 1)
    assert budget.value == pytest.approx(float(number) * factor, rel=1e-15)
    exact = Fraction(number) * {"bpw": Fraction(518, 8), "bpw@sites": Fraction(192, 8), "%": Fraction(2072, 100)}.get(
        unit, Fraction(factor)
    )
    limit = budget.limit_bytes(LAYOUT)
    assert isinstance(limit, int)
    assert exact - 1 - exact / 10**14 <= limit <= exact * (1 + Fraction(1, 10**14))  # rounded down


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=12))
def test_any_other_text_is_refused_in_one_line(text):
    try:
        budget = Budget.parse(text)
    except BudgetError as error:
        assert str(error).startswith(f"--budget {text!r}")
        assert str(error).endswith(ALLOWED)
        assert "\n" not in str(error)
        assert error.exit_code == 2
    else:
        assert budget.value > 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", " is not readable"),
        ("4", " is not readable"),
        ("bpw", " is not readable"),
        ("-4bpw", " is not readable"),
        ("1e3MB", " is not readable"),
        ("4bpw@layers", " is not readable"),
        ("٤bpw", " is not readable"),
        ("4,5bpw", " is not readable"),
        ("0bpw", " must be above zero and below 1e15"),
        ("0.0MB", " must be above zero and below 1e15"),
        ("9" * 400 + "MB", " must be above zero and below 1e15"),
        ("4bits", " has the unknown unit 'bits'"),
        ("25%@sites", ": @sites goes with bpw only"),
        ("12MB@sites", ": @sites goes with bpw only"),
    ],
)
def test_refusals(text, reason):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert str(caught.value) == f"--budget {text!r}{reason}; {ALLOWED}"
