import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.brute_force_plan import best_columns, least_damages
from scipy.optimize import Bounds, LinearConstraint, milp

from cptquant.allocation.core_search import SearchLimits
from cptquant.allocation.knapsack import Knapsack, solve_knapsack
from cptquant.allocation.relaxation import solve_relaxation, undominated_options


@st.composite
def instances(draw, damages):
    groups, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    cells = groups * width
    sizes = draw(st.lists(st.integers(1, 40), min_size=cells, max_size=cells))
    values = draw(st.lists(damages, min_size=cells, max_size=cells))
    size_bytes = np.array(sizes, dtype=np.int64).reshape(groups, width)
    damage = np.array(values, dtype=np.float64).reshape(groups, width)
    for group in range(groups):  # some rows are shorter, as an embedding's are
        damage[group, draw(st.integers(1, width)) :] = np.inf
    usable = np.where(np.isfinite(damage), size_bytes, 10**6)
    low, high = int(usable.min(axis=1).sum()), int(size_bytes.max(axis=1).sum())
    return size_bytes, damage, draw(st.integers(low, max(low, high)))


def chosen(size_bytes, damage, columns):
    rows = np.arange(len(columns))
    return float(damage[rows, columns].sum()), int(size_bytes[rows, columns].sum())


@settings(deadline=None, max_examples=300)
@given(instances(st.one_of(st.just(0.0), st.integers(0, 12).map(float))))
def test_equals_brute_force_and_of_equal_damages_takes_fewer_bytes(instance):
    size_bytes, damage, limit = instance
    columns, excess, _ = solve_knapsack(size_bytes, damage, limit)
    best = best_columns(size_bytes, damage, limit)
    assert best is not None
    assert excess == 0
    assert chosen(size_bytes, damage, columns) == (float(best[0]), best[1])


@settings(deadline=None, max_examples=300)
@given(instances(st.floats(-12, 2).map(lambda exponent: 10.0**exponent)))
def test_equals_brute_force_over_fourteen_orders_of_magnitude(instance):
    size_bytes, damage, limit = instance
    columns, excess, _ = solve_knapsack(size_bytes, damage, limit)
    best = best_columns(size_bytes, damage, limit)
    assert best is not None
    value, size = chosen(size_bytes, damage, columns)
    assert excess == 0
    assert size <= limit
    assert value == pytest.approx(float(best[0]), rel=1e-12, abs=0)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_textbook_recursion_on_thirty_sites(seed):
    """Large enough for the search to fathom most states; damages in 64ths, so that sums are exact."""
    rng = np.random.default_rng(seed)
    groups, width = 30, int(rng.integers(2, 7))
    size_bytes = np.sort(rng.integers(1, 90, (groups, width)), axis=1)
    damage = np.floor(rng.uniform(0, 64 * 20, (groups, width)) * 0.5 ** rng.integers(0, 8, (groups, 1))) / 64
    low, high = int(size_bytes.min(axis=1).sum()), int(size_bytes.max(axis=1).sum())
    least = least_damages(size_bytes, damage, high)
    for limit in rng.integers(low, high + 1, 12):
        columns, excess, _ = solve_knapsack(size_bytes, damage, int(limit))
        value, size = chosen(size_bytes, damage, columns)
        assert excess == 0
        assert value == least[limit]
        assert size == int(np.flatnonzero(least == value)[0])  # no fewer bytes give as little damage


def test_a_large_unavoidable_damage_does_not_drown_small_ones():
    size_bytes = np.array([[1, 2], [1, 2], [1, 2]])
    damage = np.array([[1e2, 1e2 - 1e-9], [3e-12, 1e-12], [5e-12, 1e-12]])
    columns, _, _ = solve_knapsack(size_bytes, damage, 4)
    assert columns.tolist() == [1, 0, 0]
    damage[0] = 1e2
    columns, _, _ = solve_knapsack(size_bytes, damage, 4)
    assert columns.tolist() == [0, 0, 1]


def typical_instance(rng, groups, width=8):
    """Matrices of many sizes at 2..16 bits, damage falling about fourfold per bit."""
    code_bits = np.array([2, 3, 4, 5, 6, 7, 8, 16])[:width]
    weights = rng.integers(500, 5000, groups) * rng.integers(500, 5000, groups)
    size_bytes = (weights[:, None] * code_bits // 8 + weights[:, None] // 64 * 2).astype(np.int64)
    fragility = 10.0 ** rng.uniform(-4, 1, (groups, 1))
    damage = fragility * 4.0 ** (-code_bits) * rng.uniform(0.7, 1.3, (groups, width))
    limit = int(0.7 * size_bytes.min(axis=1).sum() + 0.3 * size_bytes.max(axis=1).sum())
    return size_bytes, damage, limit


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_highs_on_forty_sites(seed):
    size_bytes, damage, limit = typical_instance(np.random.default_rng(seed), 40, 6)
    columns, excess, _ = solve_knapsack(size_bytes, damage, limit)
    groups, width = damage.shape
    one_each = np.kron(np.eye(groups), np.ones(width))
    scale = damage.max()
    answer = milp(
        damage.ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size_bytes.ravel()[None, :] / limit, ub=1),
        ],
        integrality=np.ones(groups * width),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    value, size = chosen(size_bytes, damage, columns)
    assert answer.success
    assert excess == 0 and size <= limit
    assert value == pytest.approx(answer.fun * scale, rel=1e-6)


def test_solves_a_thousand_sites_with_eight_formats_in_a_fifth_of_a_second():
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(5):
        size_bytes, damage, limit = typical_instance(rng, 1000)
        begin = time.process_time()
        columns, excess, _ = solve_knapsack(size_bytes, damage, limit)
        seconds.append(time.process_time() - begin)
        assert excess == 0
        assert chosen(size_bytes, damage, columns)[1] <= limit
    assert statistics.median(seconds) < 0.2


@pytest.mark.parametrize("limits", [SearchLimits(states=3), SearchLimits(candidates=20)])
@pytest.mark.parametrize("seed", range(4))
def test_a_cut_search_proves_its_gap(limits, seed):
    """Damages nearly linear in the bytes are the hard case: every choice is nearly as good as every other."""
    rng = np.random.default_rng(seed)
    size_bytes = np.sort(rng.integers(1000, 100_000, (25, 4)), axis=1)
    damage = (size_bytes.max(axis=1)[:, None] - size_bytes) + rng.uniform(0, 50, (25, 4))
    limit = int(size_bytes.mean(axis=1).sum())
    exact, zero, _ = solve_knapsack(size_bytes, damage, limit)
    cut, excess, _ = solve_knapsack(size_bytes, damage, limit, limits)
    best, found = chosen(size_bytes, damage, exact)[0], chosen(size_bytes, damage, cut)
    assert zero == 0
    assert found[1] <= limit
    assert excess > 0
    assert best <= found[0] <= best + excess * (1 + 1e-9)


def test_refuses_a_limit_below_the_smallest_choice():
    with pytest.raises(ValueError, match="the smallest choice has 3 bytes, limit 2"):
        solve_knapsack(np.array([[1, 5], [2, 4]]), np.array([[1.0, 0.0], [1.0, 0.0]]), 2)


def test_takes_the_least_damage_everywhere_where_all_of_it_fits():
    size_bytes = np.array([[1, 5, 9], [2, 4, 4]])
    columns, excess, looked_at = solve_knapsack(size_bytes, np.array([[3.0, 0.0, 0.0], [1.0, 0.5, 0.2]]), 9)
    assert (columns.tolist(), excess, looked_at) == ([1, 2], 0.0, 0)


def test_options_keep_only_what_is_better_in_bytes_or_damage():
    options = undominated_options(
        np.array([[4, 2, 3, 2], [1, 9, 9, 9]]), np.array([[1.0, 3.0, 3.0, 5.0], [2.0, 2.0, np.inf, 0.5]])
    )
    assert options.index.tolist() == [[1, 0], [0, 3]]
    assert options.count.tolist() == [2, 2]


def test_relaxation_bounds_every_choice_from_below():
    rng = np.random.default_rng(3)
    for _ in range(50):
        size_bytes, damage = rng.integers(1, 30, (4, 4)), rng.uniform(0, 1, (4, 4))
        limit = int(size_bytes.min(axis=1).sum() + rng.integers(0, 40))
        options = undominated_options(size_bytes, damage)
        relaxation = solve_relaxation(options, limit)
        base = options.damage[np.arange(4), relaxation.base].sum()
        best = best_columns(size_bytes, damage, limit)
        assert best is not None
        assert relaxation.slack_bytes >= 0
        assert base - relaxation.multiplier * relaxation.slack_bytes <= float(best[0]) + 1e-12


def test_is_a_value_with_its_paper_name():
    assert Knapsack() == Knapsack() and Knapsack.name == "knapsack" and Knapsack.needs_table
