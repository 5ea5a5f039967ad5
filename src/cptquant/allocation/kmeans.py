"""The paper's allocation: three clusters of block scores, the most sensitive blocks in 16 bits, then 8, then 4.

Source: CPTQuant, arXiv 2412.03599 (k-means with k = 3 on one score per block). Changed: centres are sorted, so that
the cluster of the highest scores gets the widest codes (labels of k-means carry no order); the clustering is exact
instead of Lloyd's from a seed; fewer than three distinct scores are said instead of split; and where 16/8/4 exceeds
the budget, the widths step down a fixed ladder.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cptquant.allocation.outside import lowest_outside, outside_bytes, raise_outside
from cptquant.allocation.problem import Problem, Solution, refuse_limit
from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import SolverStatus

Widths = tuple[int, int, int]

LADDER: tuple[Widths, ...] = (
    (16, 8, 4), (8, 8, 4), (8, 6, 4), (8, 5, 4), (8, 4, 4), (8, 4, 3), (6, 4, 3), (5, 4, 3), (4, 4, 3), (4, 3, 3),
    (4, 3, 2), (3, 3, 2), (3, 2, 2),
)  # fmt: skip
"""Code widths of the high, middle and low cluster, from the paper's own downwards."""


@dataclass(frozen=True)
class KMeans:
    """Cluster the table's block scores and give each cluster one code width.

    Attributes:
        ladder: width triples, the first that fits is taken; triples with a width that is not offered are left out.
            After them one width for all blocks is tried, from wide to narrow.

    A plan below the budget is left as it is: k-means has a size of its own. Sites outside the blocks are no narrower
    than the narrowest cluster and take the bytes that are left.
    """

    name: ClassVar[str] = "kmeans"
    needs_table: ClassVar[bool] = True
    ladder: tuple[Widths, ...] = LADDER

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Cluster and choose the widths; nothing is drawn.

        Raises:
            ArtifactError: there is no table, or it has no score for a block.
            BudgetError: no rung fits.
        """
        scores = _block_scores(problem)
        rank, centres = rank_clusters(scores, clusters=3)
        offered = {fmt.code_bits: fmt for fmt in reversed(problem.block_requests)}  # of one width the smallest
        rungs = [widths for widths in self.ladder if set(widths) <= set(offered)]
        rungs += [(width, width, width) for width in sorted(offered, reverse=True) if width < 16]
        smallest: list[int] = []
        for rung in rungs:
            choice, spare = _try_rung(problem, rank, len(centres), {width: offered[width] for width in rung}, rung)
            if choice is not None:
                return Solution(choice, SolverStatus.HEURISTIC, notes=_notes(problem, rung, rank, centres, self.ladder))
            smallest.append(problem.limit_bytes - spare)
        raise refuse_limit(problem, self.name, min(smallest))


def rank_clusters(
    scores: np.ndarray[tuple[int], np.dtype[np.float64]],  # (blocks,)
    *,
    clusters: int,
) -> tuple[list[int], list[float]]:
    """Exact one-dimensional k-means.

    Returns:
        For every score the rank of its cluster, 0 for the highest centre; and the centres, descending. Fewer distinct
        scores than clusters give as many clusters as there are distinct scores.
    """
    values, inverse, weights = np.unique(scores, return_inverse=True, return_counts=True)
    count = min(clusters, len(values))
    cost = _segment_costs(values, weights)
    # least[k][j]: least cost of the first j values in k + 1 clusters; start[k][j]: where the last of them begins
    least = [np.concatenate(([0.0], cost[0]))]
    starts: list[list[int]] = [[0] * (len(values) + 1)]
    for _ in range(1, count):
        before, now, start = least[-1], np.full(len(values) + 1, np.inf), [0] * (len(values) + 1)
        for j in range(1, len(values) + 1):
            totals = before[:j] + cost[:j, j - 1]
            start[j] = int(np.argmin(totals))
            now[j] = totals[start[j]]
        least.append(now)
        starts.append(start)
    rank_of_value = np.zeros(len(values), dtype=np.int64)
    centres: list[float] = []
    end = len(values)
    for rank in range(count):
        begin = starts[count - 1 - rank][end]
        rank_of_value[begin:end] = rank
        centres.append(float(np.average(values[begin:end], weights=weights[begin:end])))
        end = begin
    return [int(rank) for rank in rank_of_value[inverse]], centres


def _segment_costs(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],  # (distinct,) ascending
    weights: np.ndarray[tuple[int], np.dtype[np.int64]],  # (distinct,)
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Weighted sum of squared deviations of values i..j from their mean, at [i, j]; inf below the diagonal."""
    cost = np.full((len(values), len(values)), np.inf)
    for i in range(len(values)):
        # relative to the first value of the segment: sums of squares would cancel for scores close together
        offset, weight = values[i:] - values[i], np.cumsum(weights[i:])
        mean = np.cumsum(weights[i:] * offset) / weight
        cost[i, i:] = np.maximum(np.cumsum(weights[i:] * offset**2) - weight * mean**2, 0.0)
    return cost


def _block_scores(problem: Problem) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if problem.table is None:
        raise ArtifactError(
            "--allocator kmeans clusters the block scores of a sensitivity table and none was given; "
            "make one with: cptquant measure RUN --sensitivity METHOD, or choose --allocator uniform"
        )
    scores = {score.block_index: score.value for score in problem.table.block_scores}
    missing = [index for index in range(problem.layout.block_count) if index not in scores]
    if missing:
        raise ArtifactError(
            f"sensitivity.json has no block score for block {missing[0]} ({len(missing)} missing of "
            f"{problem.layout.block_count}), which --allocator kmeans clusters; make it anew with: "
            f"{problem.table.MADE_BY}"
        )
    values = np.array([scores[index] for index in range(problem.layout.block_count)], dtype=np.float64)
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise ArtifactError(
            f"sensitivity.json: the score of block {index} is {values[index]}, expected a finite number; "
            f"make it anew with: {problem.table.MADE_BY}"
        )
    return values


def _width_of(rank: int, cluster_count: int, rung: Widths) -> int:
    """Two clusters take the outer widths; one cluster, which says nothing, the middle one."""
    return {3: rung, 2: (rung[0], rung[2]), 1: (rung[1],)}[cluster_count][rank]


def _try_rung(
    problem: Problem, rank: list[int], cluster_count: int, offered: dict[int, QuantFormat], rung: Widths
) -> tuple[tuple[int, ...] | None, int]:
    """The choice of a rung and the bytes it leaves, or None and the bytes it lacks (negative)."""
    inside: dict[int, int] = {}
    for i in problem.block_groups:
        group = problem.groups[i]
        assert group.block_index is not None  # these are the groups inside the blocks
        fmt = offered[_width_of(rank[group.block_index], cluster_count, rung)]
        inside[i] = group.option_of[fmt.name]
    outside = lowest_outside(problem, min(rung))
    inside_bytes = sum(problem.groups[i].options[j].size_bytes for i, j in inside.items())
    spare = problem.limit_bytes - problem.fixed_bytes - inside_bytes - outside_bytes(problem, outside)
    if spare < 0:
        return None, spare
    chosen = {**inside, **raise_outside(problem, outside, spare)}
    return tuple(chosen[i] for i in range(len(problem.groups))), spare


def _notes(
    problem: Problem, rung: Widths, rank: list[int], centres: list[float], ladder: tuple[Widths, ...]
) -> tuple[str, ...]:
    sizes = [rank.count(k) for k in range(len(centres))]
    clusters = ", ".join(
        f"{size} at {centre:.4g} in {_width_of(k, len(centres), rung)} bits"
        for k, (size, centre) in enumerate(zip(sizes, centres, strict=True))
    )
    notes = [f"k-means of {len(rank)} block scores, blocks per cluster by centre: {clusters}"]
    if len(centres) < 3:
        notes.append(
            f"the block scores have only {len(centres)} distinct value{'s' if len(centres) > 1 else ''}: "
            f"{len(centres)} cluster{'s' if len(centres) > 1 else ''} instead of 3"
        )
    if ladder and rung != ladder[0]:
        first, taken = ("/".join(map(str, widths)) for widths in (ladder[0], rung))
        notes.append(f"{first} bits are over the budget or not offered; stepped down to {taken}")
    return tuple(notes)
