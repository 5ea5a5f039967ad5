from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.made_layouts import TRANSFORMERS, make_layout, make_table, parse_formats, table_of, typical_damage
from cptquant.allocation.allocate import allocate
from cptquant.allocation.kmeans import KMeans, rank_clusters
from cptquant.core.budget import Budget
from cptquant.core.errors import ArtifactError, BudgetError

FORMATS = parse_formats("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")


def within_cluster_squares(scores, ranks):
    return sum(((scores[ranks == rank] - scores[ranks == rank].mean()) ** 2).sum() for rank in np.unique(ranks))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.integers(0, 9).map(float), st.floats(1e-12, 1e3)), min_size=1, max_size=9))
def test_clusters_are_the_best_there_are(values):
    scores = np.array(values)
    ranks, centres = rank_clusters(scores, clusters=3)
    distinct = len(set(values))
    assert len(centres) == min(3, distinct)
    assert centres == sorted(centres, reverse=True)
    ordered = np.sort(scores)
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(ordered, cuts))
        for cuts in combinations(range(1, len(values)), min(3, distinct) - 1)
    )
    scale = (scores.max() - scores.min()) ** 2
    assert within_cluster_squares(scores, np.array(ranks)) <= best + 1e-9 * scale
    for rank, centre in enumerate(centres):
        assert np.mean(scores[np.array(ranks) == rank]) == pytest.approx(centre, rel=1e-12)


def test_equal_scores_are_never_split():
    ranks, centres = rank_clusters(np.array([5.0, 1.0, 5.0, 1.0, 1.0, 5.0, 1.0]), clusters=3)
    assert ranks == [0, 1, 0, 1, 1, 0, 1]
    assert centres == [5.0, 1.0]


def plan_of(scores, text, *, kmeans=None, formats=FORMATS):
    layout = make_layout([[(64, 64), (128, 64)]] * len(scores), embedding=(100, 64), head=True)
    table = make_table(layout, formats, typical_damage(), block_scores=scores)
    return allocate(layout, table, Budget.parse(text), TRANSFORMERS, kmeans or KMeans(), formats=formats)


def block_names(plan, count):
    return [plan.formats[f"block.{index}.0"] for index in range(count)]


SCORES = [0.1, 9.0, 1.0, 0.2, 1.1, 0.15]


def test_the_most_sensitive_blocks_get_16_bits():
    plan = plan_of(SCORES, "15bpw@sites")
    assert block_names(plan, 6) == ["int4-g64", "float16", "int8-g64", "int4-g64", "int8-g64", "int4-g64"]
    assert plan.notes[0] == (
        "k-means of 6 block scores, blocks per cluster by centre: 1 at 9 in 16 bits, 2 at 1.05 in 8 bits, "
        "3 at 0.15 in 4 bits"
    )
    assert plan.site_bytes < plan.limit_bytes  # k-means has a size of its own


def test_over_budget_it_steps_down_the_ladder_and_says_so():
    plan = plan_of(SCORES, "5.3bpw@sites")
    assert block_names(plan, 6) == ["int4-g64", "int8-g64", "int5-g64", "int4-g64", "int5-g64", "int4-g64"]
    assert "16/8/4 bits are over the budget or not offered; stepped down to 8/5/4" in plan.notes
    wider = plan_of(SCORES, "6bpw@sites")
    assert "16/8/4 bits are over the budget or not offered; stepped down to 8/6/4" in wider.notes


@pytest.mark.parametrize("names", [("int4-g64", "int8-g64"), ("int3-g64", "int4-g64")])
def test_uses_only_widths_that_are_offered(names):
    for text in ("4.6bpw@sites", "5bpw@sites", "9bpw@sites"):
        plan = plan_of(SCORES, text, formats=parse_formats(*names))
        assert set(block_names(plan, 6)) <= {*names, "float16"}


def test_reaches_one_width_for_all_blocks_at_the_end_of_the_ladder():
    plan = plan_of(SCORES, "2.3bpw@sites")
    assert set(block_names(plan, 6)) == {"int2-g64"}


@pytest.mark.parametrize(
    ("scores", "expected", "note"),
    [
        ([2.0, 2.0, 1.0, 2.0], ["float16", "float16", "int4-g64", "float16"],
         "the block scores have only 2 distinct values: 2 clusters instead of 3"),
        ([2.0] * 4, ["int8-g64"] * 4, "the block scores have only 1 distinct value: 1 cluster instead of 3"),
    ],
)  # fmt: skip
def test_fewer_than_three_distinct_scores_are_said(scores, expected, note):
    plan = plan_of(scores, "15bpw@sites")
    assert block_names(plan, 4) == expected
    assert note in plan.notes


def test_widths_are_hyper_parameters():
    plan = plan_of(SCORES, "15bpw@sites", kmeans=KMeans(ladder=((8, 5, 3),)))
    assert block_names(plan, 6) == ["int3-g64", "int8-g64", "int5-g64", "int3-g64", "int5-g64", "int3-g64"]


def test_embedding_and_head_take_the_bytes_left():
    plan = plan_of(SCORES, "9bpw")
    assert plan.formats["embedding"] == "float16"
    assert plan.size_bytes <= plan.limit_bytes


def test_refuses_missing_and_infinite_block_scores():
    layout = make_layout([[(64, 64)]] * 3)
    table = make_table(layout, FORMATS, typical_damage(), block_scores=[1.0])
    with pytest.raises(ArtifactError) as caught:
        allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, KMeans(), formats=FORMATS)
    assert str(caught.value) == (
        "sensitivity.json has no block score for block 1 (2 missing of 3), which --allocator kmeans clusters; make "
        "it anew with: cptquant measure RUN --sensitivity METHOD"
    )
    table = table_of(table.damages, [1.0, float("inf"), 2.0])
    with pytest.raises(ArtifactError, match=r"the score of block 1 is inf, expected a finite number"):
        allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, KMeans(), formats=FORMATS)


def test_says_what_it_needs_where_no_rung_fits():
    layout = make_layout([[(64, 16), (64, 512)]] * 3)
    formats = parse_formats("int2-g8", "int3-channel")
    table = make_table(layout, formats, typical_damage())
    smallest = sum(min(fmt.stored_bytes(64, columns) for fmt in formats) for columns in (16, 512)) * 3
    budget = Budget(smallest, "bytes", "sites", f"{smallest}B")
    with pytest.raises(BudgetError, match=r"the smallest plan that --allocator kmeans can make has \d+,\d+; raise"):
        allocate(layout, table, budget, TRANSFORMERS, KMeans(), formats=formats)
