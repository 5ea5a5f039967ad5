from itertools import pairwise

import pytest

from allocation.made_layouts import TRANSFORMERS, make_layout, make_table, parse_formats, typical_damage
from cptquant.allocation.allocate import allocate
from cptquant.allocation.frontier import trace_frontier
from cptquant.allocation.knapsack import Knapsack
from cptquant.core.budget import Budget
from cptquant.core.plan import SolverStatus

FORMATS = parse_formats("int2-g64", "int3-g64", "int4-g64", "int8-g64")
LAYOUT = make_layout([[(64, 64), (128, 64)]] * 6, embedding=(100, 64), head=True, shared=True)
TABLE = make_table(LAYOUT, FORMATS, typical_damage())


@pytest.mark.parametrize("scope", ["file", "sites"])
def test_every_point_is_larger_and_hurts_less_than_the_one_before(scope):
    points = trace_frontier(LAYOUT, TABLE, TRANSFORMERS, FORMATS, points=20, scope=scope)
    assert 10 < len(points) <= 20
    for before, after in pairwise(points):
        assert after.predicted_damage < before.predicted_damage
        assert (after.size_bytes if scope == "file" else after.site_bytes) > (
            before.size_bytes if scope == "file" else before.site_bytes
        )
    assert points[-1].predicted_damage == 0
    assert all(point.plan.status is SolverStatus.OPTIMAL for point in points)


def test_points_are_the_plans_that_allocate_makes():
    points = trace_frontier(LAYOUT, TABLE, TRANSFORMERS, FORMATS, points=5)
    for point in points:
        budget = Budget(point.plan.limit_bytes, "bytes")
        plan = allocate(LAYOUT, TABLE, budget, TRANSFORMERS, Knapsack(), formats=FORMATS)
        assert (plan.formats, plan.size_bytes) == (point.plan.formats, point.size_bytes)
        assert plan.inputs == point.plan.inputs


def test_a_frontier_has_two_ends():
    with pytest.raises(ValueError, match="a frontier has at least 2 points, got 1"):
        trace_frontier(LAYOUT, TABLE, TRANSFORMERS, FORMATS, points=1)
