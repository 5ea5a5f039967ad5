"""Better plans than the table's: budget-neutral swaps, judged by the loss of the whole model, by successive halving.

A knapsack believes that damages of single sites add up. Near its optimum many choices are predicted to be about equal,
and the model's own loss tells them apart (EvoPress, arXiv 2410.14649, which evolves from random swaps; successive
halving: Jamieson and Talwalkar, arXiv 1502.07943). One round:

1. Every group takes a step down and a step up, one at a time; the change of the loss is measured on a few sequences.
2. Swaps are put together from steps so that the bytes stay within the limit: one down and one up, two for one, one for
   two, and bundles of the best disjoint ones. The measured changes of their steps, added up, rank them.
3. The best are judged as they are, half of them on twice as many sequences each time.
4. The last two are judged on sequences that had no say so far; the better one is taken if its paired difference is
   negative by `confidence` standard errors. A round that takes nothing ends the search.

The search knows nothing of models: a `Judge` says what a choice loses on a sequence. Sites that must share a format are
one group, so they stay together; groups outside the blocks are left alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cptquant.allocation.problem import Choice, ChoiceGroup, Problem

FloatArray = NDArray[np.float64]


class Judge(Protocol):
    """What choices lose."""

    @property
    def sequence_count(self) -> int:
        """Sequences there are to judge on."""
        ...

    def __call__(self, choices: Sequence[Choice], sequences: Sequence[int]) -> FloatArray:
        """Loss of each choice on each of these sequences, (choices, sequences); the same sequence compares."""
        ...


@dataclass(frozen=True)
class Move:
    """Groups that change together.

    Attributes:
        changes: (group, option) pairs, by group, none twice. more_bytes: of the move, negative where it saves.
        expected: measured changes of its single steps, added up.
    """

    changes: tuple[tuple[int, int], ...]
    more_bytes: int
    expected: float

    @property
    def groups(self) -> frozenset[int]:
        """Which groups change."""
        return frozenset(group for group, _ in self.changes)

    def apply(self, choice: Choice) -> tuple[int, ...]:
        """The choice after it."""
        after = list(choice)
        for group, option in self.changes:
            after[group] = option
        return tuple(after)


@dataclass(frozen=True)
class Round:
    """What one round found.

    Attributes:
        step_count, move_count: steps measured, moves judged. passes: choices times sequences judged in all.
        move: the better of the last two; None where there was none to judge.
        difference, stderr: of its loss from the loss before, paired over `sequence_count` fresh sequences.
        taken: whether it was significant.
    """

    step_count: int
    move_count: int
    passes: int
    move: Move | None = None
    difference: float = 0.0
    stderr: float = 0.0
    sequence_count: int = 0
    taken: bool = False


@dataclass(frozen=True)
class Refined:
    """A choice within the limit, and how it came about; the start itself where no swap was significant."""

    choice: tuple[int, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class SwapSearch:
    """Hyper-parameters.

    Attributes:
        rounds: at most. moves: judged in the first rung. first_sequences: of the steps, and of the first rung, which
            are others.
        reach: steps a group may go from where it started: what `reachable` lists, and what a judge must know.
        confidence: standard errors by which a swap must be better.
    """

    rounds: int = 2
    moves: int = 32
    first_sequences: int = 4
    reach: int = 1
    confidence: float = 2.0

    def __call__(
        self,
        problem: Problem,
        start: Choice,
        judge: Judge,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Refined:
        """Search from a choice.

        Args:
            problem: groups with their bytes and the limit; its damages only order each group's options.
            seed: of the order in which sequences are used. progress: told (rounds done, rounds in all).

        Raises:
            ValueError: the start exceeds the limit, or there are fewer than four sequences.
        """
        if problem.counted_bytes(start) > problem.limit_bytes:
            raise ValueError(f"the start has {problem.counted_bytes(start)} bytes, limit {problem.limit_bytes}")
        if judge.sequence_count < 4:
            raise ValueError(f"swaps are judged on 4 sequences or more, got {judge.sequence_count}")
        ladders = [self._ladder(problem, start, group) for group in range(len(problem.groups))]
        rng, choice, rounds = np.random.default_rng(seed), tuple(start), list[Round]()
        for number in range(self.rounds):
            found = _RoundOfSwaps(self, problem, choice, ladders, judge, rng.permutation(judge.sequence_count)).run()
            rounds.append(found)
            if progress is not None:
                progress(number + 1, self.rounds)
            if not found.taken or found.move is None:
                break
            choice = found.move.apply(choice)
        return Refined(choice, tuple(rounds))

    def reachable(self, problem: Problem, start: Choice) -> tuple[tuple[int, ...], ...]:
        """For each group the options that the search may choose, its own among them, from few bytes to many."""
        return tuple(self._ladder(problem, start, group) for group in range(len(problem.groups)))

    def _ladder(self, problem: Problem, start: Choice, index: int) -> tuple[int, ...]:
        group, own = problem.groups[index], start[index]
        if group.block_index is None:
            return (own,)
        ladder = _undominated(group, own)
        position = ladder.index(own)
        return tuple(ladder[max(0, position - self.reach) : position + self.reach + 1])


def _undominated(group: ChoiceGroup, own: int) -> list[int]:
    """Options by bytes that the table does not call worse than a smaller one; the group's own always among them."""
    options = group.options
    order = sorted(range(len(options)), key=lambda j: (options[j].size_bytes, options[j].damage, j != own, j))
    ladder: list[int] = []
    least = math.inf
    for j in order:
        if j == own and ladder and options[ladder[-1]].size_bytes == options[j].size_bytes:
            ladder.pop()
        if j == own or options[j].damage < least:
            ladder.append(j)
        least = min(least, options[j].damage)
    return ladder


class _RoundOfSwaps:
    """One round from one choice; sequences are used in the given order."""

    def __init__(
        self,
        search: SwapSearch,
        problem: Problem,
        choice: tuple[int, ...],
        ladders: Sequence[Sequence[int]],
        judge: Judge,
        order: NDArray[np.int64],
    ) -> None:
        self._search, self._problem, self._choice, self._ladders, self._judge = search, problem, choice, ladders, judge
        half = len(order) // 2
        self._choosing, self._fresh = order[:half].tolist(), order[half:].tolist()
        self._spare_bytes = problem.limit_bytes - problem.counted_bytes(choice)
        self._passes = 0

    def run(self) -> Round:
        """Measure, put together, halve, confirm."""
        first = self._choosing[: self._search.first_sequences]
        steps = self._measure(self._list_steps(), first)
        moves = list_moves(steps, self._spare_bytes, self._search.moves)
        found = Round(len(steps), len(moves), self._passes)
        finalists = self._halve(moves)
        if not finalists:
            return found
        differences = self._differences(finalists, self._fresh)
        best = int(np.argmin(differences.mean(axis=1)))
        mean, stderr = _mean_and_error(differences[best])
        return Round(
            len(steps), len(moves), self._passes, finalists[best], mean, stderr, len(self._fresh),
            taken=mean + self._search.confidence * stderr < 0,
        )  # fmt: skip

    def _list_steps(self) -> list[Move]:
        """One option down and one up, for every group that has them."""
        steps: list[Move] = []
        for index, ladder in enumerate(self._ladders):
            position, options = ladder.index(self._choice[index]), self._problem.groups[index].options
            for near in (position - 1, position + 1):
                if 0 <= near < len(ladder):
                    more = options[ladder[near]].size_bytes - options[self._choice[index]].size_bytes
                    steps.append(Move(((index, ladder[near]),), more, 0.0))
        return steps

    def _measure(self, steps: Sequence[Move], sequences: Sequence[int]) -> list[Move]:
        if not steps:
            return []
        changes = self._differences(steps, sequences).mean(axis=1)
        return [Move(step.changes, step.more_bytes, float(value)) for step, value in zip(steps, changes, strict=True)]

    def _halve(self, moves: Sequence[Move]) -> list[Move]:
        """The last two, the better half at each rung judged on twice as many sequences."""
        left: list[Move] = list(moves)
        sums: FloatArray = np.zeros(len(moves))
        # Not the steps' own sequences, unless there are no others.
        unused = self._choosing[self._search.first_sequences :] or self._choosing
        start, stop = 0, self._search.first_sequences
        while left:
            sums = sums + self._differences(left, unused[start:stop]).sum(axis=1)
            best = np.argsort(sums, kind="stable")[: max(2, len(left) // 2)]
            left, sums = [left[int(i)] for i in best], sums[best]
            start, stop = stop, 2 * stop
            if len(left) <= 2 or start >= len(unused):
                break
        return left[:2]

    def _differences(self, moves: Sequence[Move], sequences: Sequence[int]) -> FloatArray:
        """(moves, sequences): loss after each move less the loss before it."""
        losses = self._judge([self._choice, *(move.apply(self._choice) for move in moves)], sequences)
        self._passes += losses.size
        return losses[1:] - losses[0]


def list_moves(steps: Sequence[Move], spare_bytes: int, count: int) -> list[Move]:
    """The most promising moves that single steps make up and that take at most `spare_bytes` more.

    Steps alone, one down for one up, two for one and one for two, by expected change, then by bytes; beside them
    bundles of the best disjoint ones, 2, 4, 8, ... together. No step is in more than an eighth of the moves (at least
    two), so that one wrong measurement does not fill the list.
    """
    downs = sorted((s for s in steps if s.more_bytes < 0), key=lambda s: s.expected / -s.more_bytes)
    ups = sorted((s for s in steps if s.more_bytes >= 0), key=lambda s: s.expected / max(1, s.more_bytes))
    candidates = [*steps]
    candidates += (_join((down, up)) for down in downs for up in ups if not down.groups & up.groups)
    candidates += _triples(downs[:_FOR_TRIPLES], ups[:_FOR_TRIPLES])
    fitting = [move for move in candidates if move.more_bytes <= spare_bytes]
    fitting.sort(key=lambda move: (move.expected, move.more_bytes, move.changes))
    chosen, uses = list[Move](), dict[tuple[int, int], int]()
    most = max(2, count // 8)
    for move in fitting:
        if len(chosen) == count:
            break
        if all(uses.get(change, 0) < most for change in move.changes):
            chosen.append(move)
            uses.update({change: uses.get(change, 0) + 1 for change in move.changes})
    return [*chosen, *_bundles(fitting, spare_bytes)]


_FOR_TRIPLES = 24
"""Steps of each direction from which moves of three are made: their number grows with its third power."""


def _triples(downs: Sequence[Move], ups: Sequence[Move]) -> Iterable[Move]:
    for few, many in ((downs, ups), (ups, downs)):
        for one in few:
            for pair in combinations(many, 2):
                parts = (one, *pair)
                if len(frozenset[int]().union(*(part.groups for part in parts))) == 3:
                    yield _join(parts)


def _bundles(moves: Sequence[Move], spare_bytes: int) -> list[Move]:
    """The best disjoint moves that are expected to gain, put together: the first 2, 4, 8, ... of them, and all."""
    taken, groups, more_bytes = list[Move](), set[int](), 0
    for move in moves:
        if move.expected >= 0:
            break
        if not groups & move.groups and more_bytes + move.more_bytes <= spare_bytes:
            taken.append(move)
            groups |= move.groups
            more_bytes += move.more_bytes
    sizes = sorted({min(2**power, len(taken)) for power in range(1, 1 + len(taken).bit_length())})
    return [_join(taken[:size]) for size in sizes if size > 1]


def _join(parts: Sequence[Move]) -> Move:
    changes = tuple(sorted(change for part in parts for change in part.changes))
    return Move(changes, sum(part.more_bytes for part in parts), math.fsum(part.expected for part in parts))


def _mean_and_error(differences: FloatArray) -> tuple[float, float]:
    """Mean over sequences and its standard error; sequences are taken as independent."""
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
