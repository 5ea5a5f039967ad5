"""Exact closing of the knapsack: dynamic programming over the groups whose choice the relaxation leaves open.

Source: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995): begin at the
relaxation's choice, admit groups in order of how close their slopes lie to its multiplier, keep undominated states
only, and fathom a state by the best slope that the groups not yet admitted could still offer. Changed: states are
kept as arrays, and where they outgrow the limits the most promising are kept and the bound of the others is
remembered, so that the answer carries a proven gap instead of failing.
"""

from dataclasses import dataclass

import numpy as np

from cptquant.allocation.relaxation import FloatArray, IntArray, Options, Relaxation

_ROUNDING = 1e-14  # relative size of sums that count as equal; float64 sums of thousands of terms stay below it


@dataclass(frozen=True)
class SearchLimits:
    """Where an exact search gives way to a bounded gap.

    Attributes:
        states: partial choices kept after each group. candidates: partial choices looked at in all (about
            40 ns each, so that no table takes much longer than 0.2 s).
    """

    states: int = 20_000
    candidates: int = 4_000_000


DEFAULT_LIMITS = SearchLimits()


@dataclass(frozen=True)
class CoreResult:
    """Outcome of the search.

    Attributes:
        columns: (groups,) chosen column of every group.
        excess_damage: proven upper limit of damage(columns) - damage(optimum), 0 if optimal.
        candidate_count: partial choices looked at.
    """

    columns: IntArray
    excess_damage: float
    candidate_count: int


@dataclass
class _Moves:
    """Departures from the relaxation's choice: bytes and damage gained, and what they cost at the multiplier."""

    step_bytes: IntArray  # (groups, width)
    step_damage: FloatArray  # (groups, width)
    reduced_cost: FloatArray  # (groups, width) at least 0; +inf for the choice itself and for padding
    slope: FloatArray  # (groups, width) damage per byte


@dataclass
class _Stage:
    """How the states after one group came about: index of the parent state, and the column taken (-1: the base)."""

    group: int
    parent: IntArray
    column: IntArray


def close_core(options: Options, relaxation: Relaxation, limits: SearchLimits) -> CoreResult:
    """Find the choice of least damage within the limit, of equals the one with fewer bytes."""
    base, slack = relaxation.base, relaxation.slack_bytes
    if relaxation.multiplier == 0:  # every group already has its least damage
        return CoreResult(base, 0.0, 0)
    moves = _list_moves(options, relaxation)
    columns, best_damage = _fill_greedily(moves, base, slack)
    search = _Search(moves, relaxation, best_damage, limits)
    found = search.run()
    if found is not None:
        columns = base.copy()
        for group, column in found:
            columns[group] = column
    return CoreResult(columns, search.excess_damage, search.candidate_count)


def _list_moves(options: Options, relaxation: Relaxation) -> _Moves:
    rows = np.arange(len(options.count), dtype=np.int64)
    step_bytes = options.size_bytes - options.size_bytes[rows, relaxation.base][:, None]
    step_damage = options.damage - options.damage[rows, relaxation.base][:, None]
    real = np.arange(options.size_bytes.shape[1], dtype=np.int64) < options.count[:, None]
    moved = real & (step_bytes != 0)
    cost = np.where(moved, np.maximum(step_damage + relaxation.multiplier * step_bytes, 0.0), np.inf)
    slope = np.divide(-step_damage, step_bytes, out=np.zeros_like(step_damage), where=moved)
    return _Moves(step_bytes, step_damage, cost, slope)


def _fill_greedily(moves: _Moves, base: IntArray, slack: int) -> tuple[IntArray, float]:
    """A first feasible choice: spend the slack on the single moves that avoid most damage."""
    columns, avoided = base.copy(), 0.0
    offered = np.isfinite(moves.reduced_cost) & (moves.step_bytes > 0)
    while True:
        fits = offered & (moves.step_bytes <= slack)
        if not fits.any():
            return columns, avoided
        group, column = np.unravel_index(np.argmin(np.where(fits, moves.step_damage, np.inf)), fits.shape)
        columns[group] = column
        slack -= int(moves.step_bytes[group, column])
        avoided += float(moves.step_damage[group, column])
        offered[group] = False


class _Search:
    """State lists by group. Damages and bytes are relative to the relaxation's choice."""

    def __init__(self, moves: _Moves, relaxation: Relaxation, best_damage: float, limits: SearchLimits) -> None:
        self._moves, self._limits = moves, limits
        self._slack, self._multiplier = relaxation.slack_bytes, relaxation.multiplier
        self._best_damage = best_damage
        self._root_bound = -self._multiplier * self._slack
        self._dropped_bound = np.inf
        self._stages: list[_Stage] = []
        self._bytes: IntArray = np.zeros(1, dtype=np.int64)
        self._damage: FloatArray = np.zeros(1)
        self._tolerance = _ROUNDING * self._scale()
        self.candidate_count = 0

    def _scale(self) -> float:
        """Largest damage among the moves that could still matter."""
        open_moves = self._moves.reduced_cost <= self._best_damage - self._root_bound
        largest = np.abs(self._moves.step_damage[open_moves]).max(initial=0.0)
        return float(max(largest, -self._root_bound))

    @property
    def excess_damage(self) -> float:
        """How far the best choice may lie above the optimum."""
        excess = self._best_damage - self._dropped_bound
        return float(excess) if excess > self._tolerance else 0.0

    def run(self) -> list[tuple[int, int]] | None:
        """Search; the moves (group, column) of the best choice, or None if the first choice could not be beaten."""
        order, slope_up, slope_down = self._order_groups()
        for position, group in enumerate(order):
            gap = self._best_damage - self._root_bound
            if gap <= self._tolerance:
                break
            if self.candidate_count > self._limits.candidates:
                bound = self._lower_bound(self._bytes, self._damage, slope_up[position], slope_down[position])
                self._dropped_bound = min(self._dropped_bound, float(bound.min(initial=np.inf)))
                break
            cost = self._moves.reduced_cost[group]
            columns = np.flatnonzero(cost <= gap + self._tolerance)
            if len(columns):
                self._admit(int(group), columns, float(slope_up[position + 1]), float(slope_down[position + 1]))
        return self._trace()

    def _order_groups(self) -> tuple[IntArray, FloatArray, FloatArray]:
        """Open groups, slopes nearest the multiplier first, and the best slopes that remain after each of them."""
        moves = self._moves
        usable = moves.reduced_cost <= self._best_damage - self._root_bound + self._tolerance
        distance = np.where(usable, np.abs(moves.slope - self._multiplier), np.inf).min(axis=1)
        widens = (usable & (moves.step_bytes > 0)).any(axis=1)
        turn = np.where(widens, np.cumsum(widens), np.cumsum(~widens))  # at equal slopes let both directions alternate
        order = np.lexsort((turn, distance))[: int(np.isfinite(distance).sum())]
        up = np.where(usable & (moves.step_bytes > 0), moves.slope, 0.0).max(axis=1)[order]
        down = np.where(usable & (moves.step_bytes < 0), moves.slope, np.inf).min(axis=1)[order]
        up_left = np.append(np.maximum.accumulate(up[::-1])[::-1], 0.0)
        down_left = np.append(np.minimum.accumulate(down[::-1])[::-1], np.inf)
        return order, up_left, down_left

    def _admit(self, group: int, columns: IntArray, slope_up: float, slope_down: float) -> None:
        """Extend every state by every move of the group, or by none."""
        held = len(self._bytes)
        step_bytes = np.concatenate(([0], self._moves.step_bytes[group, columns]))
        step_damage = np.concatenate(([0.0], self._moves.step_damage[group, columns]))
        sizes = (self._bytes + step_bytes[:, None]).ravel()
        damages = (self._damage + step_damage[:, None]).ravel()
        self.candidate_count += len(sizes)
        keep = self._lower_bound(sizes, damages, slope_up, slope_down) <= self._best_damage + self._tolerance
        origin = np.flatnonzero(keep)
        sizes, damages = sizes[origin], damages[origin]
        order = np.lexsort((damages, sizes))
        sizes, damages, origin = sizes[order], damages[order], origin[order]
        undominated = np.ones(len(sizes), dtype=bool)
        undominated[1:] = damages[1:] < np.minimum.accumulate(damages)[:-1]
        chosen = np.flatnonzero(undominated)
        if len(chosen) > self._limits.states:
            chosen = self._most_promising(sizes, damages, chosen, slope_up, slope_down)
        self._bytes, self._damage, origin = sizes[chosen], damages[chosen], origin[chosen]
        taken = np.concatenate(([-1], columns))[origin // held]
        self._stages.append(_Stage(group, origin % held, taken))
        last = int(np.searchsorted(self._bytes, self._slack, side="right")) - 1
        if last >= 0:  # along the list bytes rise and damages fall: the last one within the limit is the best
            self._best_damage = min(self._best_damage, float(self._damage[last]))

    def _lower_bound(self, sizes: IntArray, damages: FloatArray, slope_up: float, slope_down: float) -> FloatArray:
        """Least damage of any completion: room is filled, or excess is paid, at the best slope that remains."""
        room = self._slack - sizes
        over = room < 0
        bound = damages - slope_up * np.maximum(room, 0)
        if np.isinf(slope_down):
            bound[over] = np.inf
        else:
            bound[over] = damages[over] - slope_down * room[over]
        return bound

    def _most_promising(
        self, sizes: IntArray, damages: FloatArray, chosen: IntArray, slope_up: float, slope_down: float
    ) -> IntArray:
        bound = self._lower_bound(sizes[chosen], damages[chosen], slope_up, slope_down)
        ranked = np.lexsort((np.abs(sizes[chosen] - self._slack), bound))  # of equal bounds those nearest the limit
        self._dropped_bound = min(self._dropped_bound, float(bound[ranked[self._limits.states]]))
        return np.sort(chosen[ranked[: self._limits.states]])

    def _trace(self) -> list[tuple[int, int]] | None:
        state = int(np.searchsorted(self._bytes, self._slack, side="right")) - 1
        if state < 0 or self._damage[state] > self._best_damage + self._tolerance:
            return None
        found: list[tuple[int, int]] = []
        for stage in reversed(self._stages):
            if stage.column[state] >= 0:
                found.append((stage.group, int(stage.column[state])))
            state = int(stage.parent[state])
        return found
