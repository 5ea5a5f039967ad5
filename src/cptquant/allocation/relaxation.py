"""The linear relaxation of the multiple-choice knapsack: where every exact search starts.

Source: Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979): options off the
lower convex hull of a group never enter the relaxation, and taking hull steps by steepest descent solves it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Undominated options of every group, from few bytes to many, hence from much damage to little.

    Attributes:
        size_bytes, damage: (groups, width); a row shorter than the widest repeats its last option.
        index: (groups, width) the option's index in the caller's group. count: (groups,) real options of each row.
    """

    size_bytes: IntArray
    damage: FloatArray
    index: IntArray
    count: IntArray


@dataclass(frozen=True)
class Relaxation:
    """Solution of the relaxation, rounded down to whole options.

    Attributes:
        base: (groups,) column of each group before the step that no longer fits.
        slack_bytes: room left by `base`, at least 0.
        multiplier: damage avoided per byte at the step that no longer fits; 0 if every step fits.
            `damage(base) - multiplier * slack_bytes` bounds every choice within the limit from below.
    """

    base: IntArray
    slack_bytes: int
    multiplier: float


def undominated_options(
    size_bytes: IntArray,  # (groups, width)
    damage: FloatArray,  # (groups, width), +inf where a row has no such option
) -> Options:
    """Drop every option that another one of its group equals or beats in both bytes and damage."""
    groups, width = size_bytes.shape
    rows = np.repeat(np.arange(groups, dtype=np.int64), width)
    order = np.lexsort((damage.ravel(), size_bytes.ravel(), rows)).reshape(groups, width)
    sizes, damages = size_bytes.ravel()[order], damage.ravel()[order]
    best_before = np.minimum.accumulate(damages, axis=1)
    keep = np.isfinite(damages)
    keep[:, 1:] &= damages[:, 1:] < best_before[:, :-1]
    count = keep.sum(axis=1)
    to_front = np.argsort(~keep, axis=1, kind="stable")[:, : int(count.max())]
    # rows with fewer options repeat their last one
    columns = np.minimum(np.arange(to_front.shape[1], dtype=np.int64), count[:, None] - 1)
    picked = np.take_along_axis(to_front, columns, axis=1)
    return Options(
        size_bytes=np.take_along_axis(sizes, picked, axis=1),
        damage=np.take_along_axis(damages, picked, axis=1),
        index=np.take_along_axis(order % width, picked, axis=1),
        count=count,
    )


def solve_relaxation(options: Options, limit_bytes: int) -> Relaxation:
    """Take hull steps, steepest first, while they fit. The limit must allow every group its smallest option."""
    group, target, step_bytes, slope = hull_steps(options)
    order = np.argsort(-slope, kind="stable")
    room = limit_bytes - int(options.size_bytes[:, 0].sum())
    used = np.cumsum(step_bytes[order])
    taken = int(np.searchsorted(used, room, side="right"))
    base = np.zeros(len(options.count), dtype=np.int64)
    np.maximum.at(base, group[order[:taken]], target[order[:taken]])  # along a hull the columns only grow
    slack = room - (int(used[taken - 1]) if taken else 0)
    multiplier = float(slope[order[taken]]) if taken < len(order) else 0.0
    return Relaxation(base, slack, multiplier)


def hull_steps(options: Options) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """All steps along the lower hulls: group, column reached, bytes, damage avoided per byte."""
    sizes, damages = options.size_bytes, options.damage
    groups, width = sizes.shape
    rows = np.arange(groups, dtype=np.int64)
    column = np.zeros(groups, dtype=np.int64)
    steepest = np.full(groups, np.inf)
    parts: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
    for _ in range(width - 1):
        step = sizes - sizes[rows, column][:, None]
        avoided = damages[rows, column][:, None] - damages
        slope = np.divide(avoided, step, out=np.full(sizes.shape, -1.0), where=step > 0)
        best = slope.max(axis=1)
        furthest = width - 1 - np.argmax(slope[:, ::-1], axis=1)  # of equal slopes the longest step
        target = np.minimum(furthest, options.count - 1)
        moving = np.flatnonzero(best > 0)
        if not len(moving):
            break
        # slopes fall along a hull; rounding must not reverse them, or a step would be taken before its predecessor
        steepest = np.minimum(steepest, best)
        parts.append((moving, target[moving], step[moving, target[moving]], steepest[moving]))
        column[moving] = target[moving]
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty, np.zeros(0)
    group, reached, step_bytes, slopes = (np.concatenate(part) for part in zip(*parts, strict=True))
    return group, reached, step_bytes, slopes
