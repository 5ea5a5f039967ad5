"""Swaps: planted losses, every plan tried one after the other, and what chance alone would do."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.made_layouts import FUSED, TRANSFORMERS, make_layout, make_table, parse_formats, typical_damage
from cptquant.allocation.choices import build_problem
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.swaps import Move, SwapSearch, list_moves

FORMATS = parse_formats("int2-g32", "int3-g32", "int4-g32", "int8-g32")


class PlantedLoss:
    """Sum of single losses and of products of pairs, times a factor of each sequence, plus noise of its own."""

    def __init__(self, problem, seed, *, interaction=0.0, noise=0.0, sequences=24):
        rng = np.random.default_rng(seed)
        self.single = [
            np.array([option.damage * rng.uniform(0.3, 3) for option in group.options]) for group in problem.groups
        ]
        count = len(problem.groups)
        self.pairs = interaction * rng.normal(size=(count, count))
        self.factor = rng.uniform(0.5, 1.5, sequences)
        self.noise = noise
        self.seen: list[tuple[int, ...]] = []
        self.sequence_count = sequences

    def exact(self, choice):
        values = np.array([row[j] for row, j in zip(self.single, choice, strict=True)])
        roots = np.sqrt(values)
        return float(values.sum() + roots @ self.pairs @ roots)

    def __call__(self, choices, sequences):
        self.seen += [tuple(choice) for choice in choices]
        rows = []
        for choice in choices:
            noise = np.random.default_rng([*choice, 7]).normal(size=self.sequence_count) * self.noise
            rows.append(self.exact(choice) * self.factor + noise)
        return np.array(rows)[:, list(sequences)]


def make_problem(blocks=4, seed=0, limit=0.35, target=TRANSFORMERS, ties=(), embedding=None):
    layout = make_layout([[(64, 64), (96, 64)]] * blocks, ties=ties, embedding=embedding)
    table = make_table(layout, FORMATS, typical_damage(seed))
    problem = build_problem(layout, table, target, FORMATS, "file" if embedding else "sites")
    smallest, largest = problem.smallest_bytes, problem.bytes_at_16_bit
    return problem.with_limit(int(smallest + limit * 0.4 * (largest - smallest)))


def solve(problem):
    return Knapsack()(problem, seed=0).choice


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(0, 0.2), st.floats(0, 0.01))
def test_never_over_the_limit_and_never_worse_where_nothing_is_noisy(seed, limit, interaction, noise):
    problem = make_problem(seed=seed, limit=limit)
    loss, start = PlantedLoss(problem, seed, interaction=interaction, noise=noise), solve(problem)
    refined = SwapSearch(rounds=3)(problem, start, loss, seed=seed)
    assert problem.counted_bytes(refined.choice) <= problem.limit_bytes
    judged = SwapSearch(rounds=3).reachable(problem, start)
    for choice in loss.seen:
        assert all(j in row for j, row in zip(choice, judged, strict=True))
    if noise == 0:
        assert loss.exact(refined.choice) <= loss.exact(start) + 1e-12
        assert (refined.choice != start) == (loss.exact(refined.choice) < loss.exact(start))


@pytest.mark.parametrize("seed", range(12))
def test_ends_where_no_reachable_plan_of_two_changes_is_better(seed):
    """The oracle tries every choice that is one or two reachable steps away."""
    problem = make_problem(blocks=3, seed=seed)
    loss, start = PlantedLoss(problem, seed), solve(problem)
    search = SwapSearch(rounds=30, moves=400, first_sequences=12)
    refined = search(problem, start, loss, seed=seed)
    assert not refined.rounds[-1].taken
    here, own = loss.exact(refined.choice), list(refined.choice)
    ladders = search.reachable(problem, start)
    for i, k in product(range(len(own)), repeat=2):
        for a, b in product(ladders[i], ladders[k]):
            if max(_steps(ladders[i], own[i], a), _steps(ladders[k], own[k], b)) > 1:
                continue
            other = list(own)
            other[i], other[k] = a, b
            if problem.counted_bytes(other) <= problem.limit_bytes:
                assert loss.exact(other) >= here - 1e-12


def _steps(ladder, own, other):
    return abs(ladder.index(own) - ladder.index(other))


@pytest.mark.parametrize("seed", range(8))
def test_finds_the_best_plan_of_all_from_a_swap_away(seed):
    """Brute force over all plans of three blocks; the search starts from the best one with a swap undone."""
    problem = make_problem(blocks=2, seed=seed)
    loss = PlantedLoss(problem, seed)
    loss.single = [np.array([option.damage for option in group.options]) for group in problem.groups]
    best = min(
        (
            choice
            for choice in product(*(range(len(group.options)) for group in problem.groups))
            if problem.counted_bytes(choice) <= problem.limit_bytes
        ),
        key=loss.exact,
    )
    assert loss.exact(best) == pytest.approx(loss.exact(solve(problem)))
    search = SwapSearch(rounds=10, moves=200)
    ladders = search.reachable(problem, best)
    undone = 0
    for i, k in product(range(len(best)), repeat=2):
        worse = list(best)
        down, up = ladders[i].index(best[i]) - 1, ladders[k].index(best[k]) + 1
        if i == k or down < 0 or up >= len(ladders[k]):
            continue
        worse[i], worse[k] = ladders[i][down], ladders[k][up]
        if problem.counted_bytes(worse) <= problem.limit_bytes:
            undone += 1
            found = search(problem, worse, loss, seed=seed).choice
            assert loss.exact(found) == pytest.approx(loss.exact(best))
    assert undone


def test_two_for_one_where_no_pair_fits():
    """One up costs what two downs save."""
    steps = [Move(((0, 0),), -10, 1.0), Move(((1, 0),), -10, 1.5), Move(((2, 1),), 20, -4.0)]
    moves = list_moves(steps, 0, 8)
    assert [(move.changes, move.more_bytes) for move in moves if move.expected < 0] == [(((0, 0), (1, 0), (2, 1)), 0)]
    assert moves[0].expected == -1.5
    one_for_two = [Move(((0, 0),), -20, 1.0), Move(((1, 1),), 10, -0.9), Move(((2, 1),), 10, -0.8)]
    assert list_moves(one_for_two, 0, 8)[0].changes == ((0, 0), (1, 1), (2, 1))
    assert list_moves(one_for_two, 10, 8)[0].changes == ((1, 1),)
    bundles = list_moves(one_for_two, 20, 8)
    assert bundles[0].changes == ((1, 1),) and bundles[-1].changes == ((1, 1), (2, 1))


def test_bundles_are_disjoint_and_within_the_bytes():
    rng = np.random.default_rng(3)
    steps = [
        Move(((group, up),), int(rng.integers(5, 30)) * (1 if up else -1), float(rng.normal(-0.5 if up else 0.4)))
        for group in range(20)
        for up in (0, 1)
    ]
    moves = list_moves(steps, 12, 16)
    assert max(len(move.changes) for move in moves) > 3
    for move in moves:
        assert len(move.groups) == len(move.changes) and move.more_bytes <= 12
        by_change = {step.changes[0]: step for step in steps}
        assert move.more_bytes == sum(by_change[change].more_bytes for change in move.changes)
        assert move.expected == pytest.approx(sum(by_change[change].expected for change in move.changes))


def test_chance_alone_moves_nothing():
    """All plans are equal and every sequence is noise: at 2 standard errors few searches move."""
    problem, moved = make_problem(blocks=4), 0
    start = solve(problem)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        loss = PlantedLoss(problem, 0, sequences=48)
        noise: dict[tuple[int, ...], np.ndarray] = {}

        def judge(choices, sequences, noise=noise, rng=rng):
            return np.array([noise.setdefault(tuple(c), rng.normal(size=48))[list(sequences)] for c in choices])

        loss.__class__ = type("Noise", (), {"sequence_count": 48, "__call__": staticmethod(judge)})
        refined = SwapSearch(rounds=1)(problem, start, loss, seed=seed)
        moved += refined.choice != start
    assert moved <= 6  # the better of two at 2 standard errors: 2 * 2.3 % of 40 is 2


def test_tied_sites_and_sites_outside_the_blocks():
    ties = [[f"block.{b}.0", f"block.{b}.1"] for b in range(8)]
    problem = make_problem(blocks=8, target=FUSED, ties=ties, embedding=(128, 64))
    start = solve(problem)
    refined = SwapSearch()(problem, start, PlantedLoss(problem, 2), seed=0)
    assert refined.choice != start
    formats = problem.formats(refined.choice)
    assert formats["embedding"] == problem.formats(start)["embedding"]
    assert all(formats[f"block.{b}.0"] == formats[f"block.{b}.1"] for b in range(8))
    assert problem.counted_bytes(refined.choice) <= problem.limit_bytes


def test_every_round_says_what_it_did():
    problem = make_problem()
    loss, start = PlantedLoss(problem, 5, noise=1e-5), solve(problem)
    told = []
    refined = SwapSearch(rounds=6)(problem, start, loss, progress=lambda done, total: told.append((done, total)))
    assert told == [(number + 1, 6) for number in range(len(refined.rounds))]
    assert [found.taken for found in refined.rounds[:-1]] == [True] * (len(refined.rounds) - 1)
    choice = start
    for found in refined.rounds:
        assert found.move is not None and found.sequence_count == 12 and found.passes > found.step_count * 8
        if found.taken:
            assert found.difference + 2 * found.stderr < 0
            after = found.move.apply(choice)
            assert loss.exact(after) - loss.exact(choice) == pytest.approx(found.difference, rel=0.35)
            choice = after
    assert choice == refined.choice


def test_refusals():
    problem = make_problem()
    start = solve(problem)
    with pytest.raises(ValueError, match=r"the start has [\d]+ bytes, limit 5"):
        SwapSearch()(problem.with_limit(5), start, PlantedLoss(problem, 0))
    with pytest.raises(ValueError, match="swaps are judged on 4 sequences or more, got 3"):
        SwapSearch()(problem, start, PlantedLoss(problem, 0, sequences=3))
