import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_frontier import Point, at_most, best, frontier, interpolate, ratio


def exponential(bits: float) -> Point:
    """A tool whose ln KL is exactly linear in bits."""
    kl = math.exp(1 - 1.7 * bits)
    return Point(bits, kl, 0.02 * kl)


def test_points_that_another_beats_in_both_are_dropped():
    good, worse, same_bits = Point(3, 0.1, 0), Point(3.5, 0.2, 0), Point(3, 0.3, 0)
    assert frontier([worse, Point(4, 0.05, 0), same_bits, good]) == [good, Point(4, 0.05, 0)]


@given(st.lists(st.tuples(st.floats(1, 8), st.floats(1e-4, 1)), min_size=1, max_size=12))
def test_the_frontier_falls_and_beats_every_point(pairs: list[tuple[float, float]]):
    points = [Point(bits, kl, 0) for bits, kl in pairs]
    kept = frontier(points)
    assert all(left.bits < right.bits and left.kl > right.kl for left, right in pairwise(kept))
    assert all(any(other.bits <= point.bits and other.kl <= point.kl for other in kept) for point in points)


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.0, 3.4, 4.25])
def test_an_exponential_is_read_exactly(bits: float):
    read = interpolate([exponential(4.25), exponential(2.25), exponential(3.25)], bits)
    assert read is not None
    assert read.kl == pytest.approx(exponential(bits).kl)
    assert read.stderr == pytest.approx(0.02 * read.kl)


def test_nothing_is_extrapolated():
    points = [exponential(2.25), exponential(4.25)]
    assert interpolate(points, 2.24) is None
    assert interpolate(points, 4.26) is None
    assert interpolate([], 3) is None
    assert interpolate([exponential(3)], 3) == exponential(3)
    assert interpolate([exponential(3)], 3.1) is None


def test_a_beaten_neighbour_is_not_interpolated_with():
    beaten = Point(2.9, 0.9, 0.01)
    points = [exponential(2.25), exponential(4.25)]
    assert interpolate([*points, beaten], 3) == interpolate(points, 3)


def test_ours_is_read_at_no_more_bits_and_not_far_below():
    points = [Point(2.4987, 0.04, 0.001), Point(2.9990, 0.02, 0.001)]
    assert at_most(points, 2.5) == points[0]
    assert at_most(points, 3.0) == points[1]
    assert at_most(points, 2.49) is None
    assert at_most(points, 3.5) is None


def test_the_best_is_sought_among_those_in_range():
    assert best({"a": Point(3, 0.2, 0), "b": None, "c": Point(3, 0.1, 0)}) == "c"
    assert best({"a": None}) is None


def test_the_ratio_and_its_error():
    value, error = ratio(Point(3, 0.06, 0.006), Point(3, 0.1, 0.01))
    assert value == pytest.approx(0.6)
    assert error == pytest.approx(0.6 * math.hypot(0.1, 0.1))
