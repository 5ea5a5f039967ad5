"""Every vertex of the frontier against every plan there is."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from oracles.brute_force_plan import counted_bytes, every_plan, exact_damage

from allocation.made_layouts import FUSED, TRANSFORMERS, make_layout, make_table, parse_formats, typical_damage
from allocation.test_allocate import MODEL_FORMATS, budget_of, model_layout, small_cases
from cptquant.allocation.allocate import allocate
from cptquant.allocation.choices import build_problem
from cptquant.allocation.frontier import trace_vertices
from cptquant.allocation.hull import trace_hull
from cptquant.allocation.knapsack import Knapsack
from cptquant.core.artifact import digest_json
from cptquant.core.formats import QuantFormat
from cptquant.core.frontier import DamageCalibration


def brute_force_hull(points):
    """Lower left hull of (bytes, exact damage), by the monotone chain: strict vertices, few bytes first."""
    best = {}
    for size, damage in points:
        best[size] = min(damage, best.get(size, damage))
    hull = []
    for size, damage in sorted(best.items()):
        if hull and damage >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-2][0]) >= (damage - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, damage))
    return hull


@settings(deadline=None, max_examples=60)
@given(small_cases())
def test_vertices_are_those_of_all_plans(case):
    layout, table, target, formats, scope = case
    problem = build_problem(layout, table, target, formats, scope)
    plans = list(every_plan(layout, target, formats, scope))
    points = [(counted_bytes(layout, plan, scope), exact_damage(table, plan)) for plan in plans]
    found = {vertex.counted_bytes: vertex for vertex in trace_hull(problem)}
    for size, damage in brute_force_hull(points):
        assert found[size].damage == pytest.approx(float(damage), rel=1e-14)
    for vertex in found.values():  # no plan lies below the line through a vertex with the slope that follows it
        floor = vertex.damage + vertex.gain_per_byte * vertex.counted_bytes
        least = min(float(damage) + vertex.gain_per_byte * size for size, damage in points)
        assert least == pytest.approx(floor, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("target", [TRANSFORMERS, FUSED], ids=lambda target: target.name)
@pytest.mark.parametrize("scope", ["file", "sites"])
def test_vertices_are_plans_of_the_knapsack(scope, target):
    layout = model_layout(3)
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    problem = build_problem(layout, table, target, MODEL_FORMATS, scope)
    vertices = trace_vertices(problem, target)
    assert len(vertices) > 20
    formats = {}
    for vertex in vertices:
        formats |= vertex.changes
        parsed = {name: QuantFormat.parse(fmt) for name, fmt in formats.items()}
        assert vertex.plan_digest == digest_json(formats)
        assert vertex.size_bytes == layout.plan_bytes(parsed)
        assert vertex.site_bytes == layout.block_site_bytes(parsed)
        assert vertex.damage == pytest.approx(float(exact_damage(table, parsed)), rel=1e-14)
        assert vertex.predicted is None and vertex.extrapolated
    for vertex in vertices[:: len(vertices) // 8]:
        limit = vertex.size_bytes if scope == "file" else vertex.site_bytes
        plan = allocate(layout, table, budget_of(limit, scope), target, Knapsack(), formats=MODEL_FORMATS)
        assert plan.predicted_damage == pytest.approx(vertex.damage, rel=1e-14)
        assert plan.size_bytes <= vertex.size_bytes
    for before, after in pairwise(vertices):
        step = after.size_bytes - before.size_bytes
        assert step > 0 and after.damage < before.damage
        assert before.gain_per_byte == pytest.approx((before.damage - after.damage) / step, rel=1e-6, abs=1e-18)
        assert after.gain_per_byte <= before.gain_per_byte
    assert vertices[-1].gain_per_byte == 0 and vertices[-1].damage == 0
    assert set(vertices[0].changes) == {site.name for site in layout.sites}


def test_a_calibration_turns_damage_into_a_loss():
    layout, formats = make_layout([[(64, 64), (64, 64)]]), parse_formats("int2-g64", "int4-g64")
    problem = build_problem(layout, make_table(layout, formats, typical_damage()), TRANSFORMERS, formats, "file")
    calibration = DamageCalibration(
        center=0.0, mean=(math.log(2.0), 1.0), covariance=(0.0, 0.0, 0.0), scatter=0.1, degrees=3.0, quantile=2.0,
        damages=(1e-9, 1e9), points=2, prior="made",
    )  # fmt: skip
    for vertex in trace_vertices(problem, TRANSFORMERS, calibration)[:-1]:
        assert vertex.predicted is not None and not vertex.extrapolated
        assert vertex.predicted.value == pytest.approx(2 * vertex.damage)
        assert vertex.predicted.high == pytest.approx(2 * vertex.damage * math.exp(0.2))
        assert vertex.predicted.low == pytest.approx(2 * vertex.damage / math.exp(0.2))
    last = trace_vertices(problem, TRANSFORMERS, calibration)[-1]
    assert last.predicted is not None and (last.predicted.low, last.predicted.high) == (0.0, 0.0)


def test_a_frontier_needs_a_table():
    layout, formats = make_layout([[(64, 64)]]), parse_formats("int4-g64")
    with pytest.raises(ValueError, match="a frontier needs the damages of a sensitivity table"):
        trace_hull(build_problem(layout, None, TRANSFORMERS, formats, "file"))
