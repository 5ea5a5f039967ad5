"""uniform, first_last and random: what they choose, not only that it is legal (test_allocate.py)."""

import statistics
from itertools import pairwise

import pytest

from allocation.made_layouts import TRANSFORMERS, make_layout, parse_formats, table_of
from cptquant.allocation.allocate import allocate
from cptquant.allocation.first_last import FirstLast
from cptquant.allocation.random_fill import RandomFill
from cptquant.allocation.uniform import Uniform
from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.sensitivity import Damage

FORMATS = parse_formats("int2-g64", "int3-g64", "int4-g64", "int6-g64", "int8-g64")
BLOCK = [(64, 64), (128, 64)]


def plan_of(allocator, text, *, layout=None, seed=0):
    layout = layout or make_layout([BLOCK] * 8, embedding=(100, 64), head=True, kept=10)
    return allocate(layout, None, Budget.parse(text), TRANSFORMERS, allocator, formats=FORMATS, seed=seed)


def block_formats(plan):
    """The format of each block, which must be one."""
    found: dict[int, set[str]] = {}
    for site, name in plan.formats.items():
        if site.startswith("block."):
            found.setdefault(int(site.split(".")[1]), set()).add(name)
    assert all(len(names) == 1 for names in found.values())
    return [next(iter(found[index])) for index in sorted(found)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.3bpw@sites", "int2-g64"), ("4bpw@sites", "int3-g64"), ("4.3bpw@sites", "int4-g64"),
     ("15.9bpw@sites", "int8-g64"), ("16bpw@sites", "float16")],
)  # fmt: skip
def test_uniform_takes_the_largest_format_that_fits(text, expected):
    plan = plan_of(Uniform(), text)
    assert set(block_formats(plan)) == {expected}
    assert plan.formats["embedding"] == plan.formats["head"] == "float16"
    assert plan.predicted_damage is None and plan.damage_unit is None


def test_uniform_gives_the_bytes_left_to_embedding_and_head_and_never_less_than_the_blocks_have():
    tight, roomy = plan_of(Uniform(), "4.6bpw"), plan_of(Uniform(), "5.5bpw")
    assert set(block_formats(tight)) == set(block_formats(roomy)) == {"int4-g64"}
    assert (tight.formats["embedding"], tight.formats["head"]) == ("int8-g64-plain", "int4-g64")
    assert (roomy.formats["embedding"], roomy.formats["head"]) == ("float16", "int8-g64")
    assert tight.notes[0] == "every site inside the blocks has int4-g64, the largest offered format that fits"
    assert tight.notes[1] == (
        "sites outside the blocks are no narrower than the blocks and take the bytes that are left, the largest site "
        "first"
    )


def test_uniform_lets_the_head_be_narrower_before_it_gives_up():
    layout = make_layout([[(16, 64)]], embedding=(200, 64), head=True)
    rows = {
        "embedding": {"int8-g64-plain": Damage(value=0.1)},
        "block.0.0": {"int4-g64": Damage(value=0.1)},
        "head": {"int2-g64": Damage(value=0.1), "int4-g64": Damage(value=0.1)},
    }
    table = table_of(rows, [1.0])
    names = ("embedding", "block.0.0", "head")
    sizes = {
        width: layout.plan_bytes(dict(zip(names, parse_formats("int8-g64-plain", "int4-g64", width), strict=True)))
        for width in ("int2-g64", "int4-g64")
    }
    for width, size_bytes in sizes.items():
        budget = Budget(size_bytes, "bytes")
        plan = allocate(layout, table, budget, TRANSFORMERS, Uniform(), formats=())
        assert plan.formats == {"embedding": "int8-g64-plain", "block.0.0": "int4-g64", "head": width}
        said = "sites outside the blocks may be narrower than the blocks, or nothing would fit" in plan.notes[1]
        assert said == (width == "int2-g64")


def test_uniform_says_how_much_its_smallest_plan_takes():
    # on short rows 2 bits in groups of 8 are smaller, on long rows 3 bits per channel: a mixed plan is the smallest
    layout = make_layout([[(64, 16), (64, 512)]])
    formats = parse_formats("int2-g8", "int3-channel")
    sizes = {(a, b): layout.block_site_bytes({"block.0.0": a, "block.0.1": b}) for a in formats for b in formats}
    mixed, floor = min(sizes.values()), min(size for (a, b), size in sizes.items() if a == b)
    assert mixed < floor
    budget = Budget(mixed, "bytes", "sites", f"{mixed}B")
    with pytest.raises(BudgetError) as caught:
        allocate(layout, None, budget, TRANSFORMERS, Uniform(), formats=formats)
    assert str(caught.value) == (
        f"--budget {mixed}B allows {mixed:,} bytes, but the smallest plan that --allocator uniform can make has "
        f"{floor:,}; raise --budget, or use --allocator knapsack, which reaches {mixed:,}"
    )


def test_first_last_widens_as_many_ends_as_fit():
    plan = plan_of(FirstLast(), "4.8bpw@sites")
    assert block_formats(plan) == ["int6-g64"] + ["int4-g64"] * 6 + ["int6-g64"]
    plan = plan_of(FirstLast(), "5.3bpw@sites")
    assert block_formats(plan) == ["int6-g64"] * 2 + ["int4-g64"] * 4 + ["int6-g64"] * 2
    assert plan.notes[0] == "the first 2 and the last 2 of 8 blocks have int6-g64, the others int4-g64"
    plan = plan_of(FirstLast(), "4.3bpw@sites")
    assert block_formats(plan) == ["int4-g64"] * 8
    assert plan.notes[0] == (
        "all blocks have int4-g64: the budget leaves no room to widen the first and the last block"
    )


@pytest.mark.parametrize("text", ["2.5bpw@sites", "3.7bpw@sites", "5.9bpw@sites", "7.5bpw@sites", "11bpw@sites"])
def test_first_last_k_is_the_largest_that_fits(text):
    layout = make_layout([BLOCK] * 8)
    plan = plan_of(FirstLast(), text, layout=layout)
    names, ladder = block_formats(plan), [*(fmt.name for fmt in FORMATS), "float16"]
    narrow = names[4]
    wide = ladder[ladder.index(narrow) + 1]
    k = names.count(wide) // 2
    assert names == [wide] * k + [narrow] * (8 - 2 * k) + [wide] * k
    more = {site.name: QuantFormat.parse(wide if _end(site, k + 1) else narrow) for site in layout.sites}
    assert layout.block_site_bytes(more) > plan.limit_bytes


def _end(site, k):
    return site.block_index < k or site.block_index >= 8 - k


def test_random_depends_on_the_seed_alone_and_fills_the_budget():
    layout = make_layout([BLOCK] * 12, embedding=(100, 64), head=True)
    plans = [plan_of(RandomFill(), "4.5bpw", layout=layout, seed=seed) for seed in range(20)]
    assert plans[3].formats == plan_of(RandomFill(), "4.5bpw", layout=layout, seed=3).formats
    assert len({tuple(plan.formats.items()) for plan in plans}) == 20
    smallest_step = min(fmt_b.stored_bytes(64, 64) - fmt_a.stored_bytes(64, 64) for fmt_a, fmt_b in pairwise(FORMATS))
    # some step may be left over, but never one that every group could still take
    assert all(0 <= plan.limit_bytes - plan.size_bytes < 8 * smallest_step for plan in plans)
    assert statistics.mean(plan.size_bytes / plan.limit_bytes for plan in plans) > 0.99
    assert plans[0].notes[0] == "random steps drawn with seed 0"


def test_random_spreads_its_bits_over_all_blocks():
    layout = make_layout([BLOCK] * 12)
    plans = [plan_of(RandomFill(), "4.5bpw@sites", layout=layout, seed=seed) for seed in range(60)]
    by_block = [
        statistics.mean(plan.quant_formats[f"block.{index}.0"].code_bits for plan in plans) for index in range(12)
    ]
    # 60 draws of a width whose spread is below 3 bits: standard error below 0.4
    assert max(by_block) - min(by_block) < 2.0
