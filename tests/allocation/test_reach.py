import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.made_layouts import TRANSFORMERS, make_layout, parse_formats
from cptquant.allocation.allocate import allocate
from cptquant.allocation.reach import Reach, check_budget, find_reach, spell_budget
from cptquant.allocation.uniform import Uniform
from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError, FormatError

FORMATS = parse_formats("int2-g64", "int4-g64")
LAYOUT = make_layout([[(64, 64)] * 2] * 3, embedding=(100, 64), head=True, kept=100)
# blocks: 6 x 64 rows of (16 + 2) bytes + 16 in 2 bits, 49,152 in 16; embedding 12,800; head 1,816; kept 200


def message_of(text):
    with pytest.raises(BudgetError) as caught:
        check_budget(LAYOUT, Budget.parse(text), TRANSFORMERS, FORMATS)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "allowed", "low", "high"),
    [
        ("2bpw", "9,369", "4.6588bpw", "16bpw"),
        ("9%", "13,491", "14.5587%", "50%"),
        ("20kB", "20,000", "21824B", "74952B"),
    ],
)
def test_too_small_for_the_file(text, allowed, low, high):
    message = message_of(text)
    assert message == (
        f"--budget {text} allows {allowed} bytes, too few; reachable for the whole file under --target transformers: "
        f"{low} (21,824 bytes) to {high} (74,952 bytes); raise --budget, or offer narrower --formats; 13,000 bytes are "
        "tensors that stay in 16 bits whatever the plan"
    )


def test_too_small_for_the_sites():
    assert message_of("2.2bpw@sites") == (
        "--budget 2.2bpw@sites allows 6,758 bytes, too few; reachable for the blocks' linear sites under --target "
        "transformers: 2.2813bpw@sites (7,008 bytes) to 16bpw@sites (49,152 bytes); raise --budget, or offer narrower "
        "--formats"
    )


def test_more_than_everything_in_16_bits():
    assert message_of("17bpw") == (
        "--budget 17bpw allows 79,636 bytes, more than every weight in 16 bits takes, so nothing would be quantized; "
        "reachable for the whole file under --target transformers: 4.6588bpw (21,824 bytes) to 16bpw (74,952 bytes); "
        "lower --budget"
    )


def test_a_model_without_block_sites_has_no_site_budget():
    layout = make_layout([], embedding=(10, 64), head=True)
    with pytest.raises(BudgetError, match="--budget 4bpw@sites: made has no site in the scope of this budget"):
        check_budget(layout, Budget.parse("4bpw@sites"), TRANSFORMERS, FORMATS)


def test_the_ends_of_the_range_are_reachable():
    assert find_reach(LAYOUT, Budget.parse("4bpw"), TRANSFORMERS, FORMATS) == Reach(21_824, 74_952)
    assert find_reach(LAYOUT, Budget.parse("4bpw@sites"), TRANSFORMERS, FORMATS) == Reach(7_008, 49_152)
    for text in ("4.6588bpw", "16bpw", "14.5587%", "50%", "21824B", "74952B", "2.2813bpw@sites", "16bpw@sites"):
        plan = allocate(LAYOUT, None, Budget.parse(text), TRANSFORMERS, Uniform(), formats=FORMATS)
        assert plan.budget == text


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([16, 64, 80])), min_size=1, max_size=3),
    st.sampled_from(["bpw", "bpw@sites", "%", "B"]),
)
def test_the_range_in_the_message_can_be_used_as_it_stands(shapes, unit):
    layout = make_layout([shapes], embedding=(30, 32), head=True, kept=7)
    low_text = "0.01" + unit if unit != "B" else "1B"
    with pytest.raises(BudgetError) as caught:
        check_budget(layout, Budget.parse(low_text), TRANSFORMERS, FORMATS)
    span = str(caught.value).split("under --target transformers: ")[1]
    low, high = span.split(" (")[0], span.split(" to ")[1].split(" (")[0]
    for text in (low, high):
        check_budget(layout, Budget.parse(text), TRANSFORMERS, FORMATS)


def test_refused_formats_are_refused_before_the_budget_is_looked_at():
    with pytest.raises(FormatError, match="--formats int4-g64-asym is refused by --target transformers"):
        check_budget(LAYOUT, Budget.parse("1bpw"), TRANSFORMERS, parse_formats("int4-g64-asym"))


def test_budgets_made_in_code_are_spelled():
    assert spell_budget(Budget(4.5, "bpw", "sites")) == "4.5bpw@sites"
    assert spell_budget(Budget(1000, "bytes", "sites")) == "1000B@sites"
    assert spell_budget(Budget(25, "%")) == "25%"
    assert spell_budget(Budget.parse(" 1.20GB ")) == "1.20GB"
