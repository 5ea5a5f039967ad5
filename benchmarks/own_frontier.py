"""A tool's own frontier of KL against bits, read at sizes that it did not hit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

REACH_BITS = 0.06
"""How far below a size ours may end and still be read there: its budgets are upper bounds."""


@dataclass(frozen=True)
class Point:
    """A measured or interpolated model.

    Attributes:
        bits: per weight of the quantized matrices.
        kl, stderr: nats per token.
    """

    bits: float
    kl: float
    stderr: float


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bits and KL, by rising bits."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept


def interpolate(points: Sequence[Point], bits: float) -> Point | None:
    """ln KL linear in bits between neighbours on the frontier; None outside its range, never extrapolated.

    The relative standard errors are interpolated too: neighbours are judged on the same windows, so that their errors
    go together and do not cancel.
    """
    kept = frontier(points)
    for left, right in pairwise(kept):
        if left.bits <= bits <= right.bits:
            share = (bits - left.bits) / (right.bits - left.bits)
            kl = math.exp((1 - share) * math.log(left.kl) + share * math.log(right.kl))
            relative = (1 - share) * left.stderr / left.kl + share * right.stderr / right.kl
            return Point(bits, kl, kl * relative)
    return next((point for point in kept if point.bits == bits), None)


def at_most(points: Iterable[Point], bits: float) -> Point | None:
    """The best measured point of no more bits; None where all of those end more than REACH_BITS below."""
    found = [point for point in points if point.bits <= bits + 1e-9]
    if not found or max(point.bits for point in found) < bits - REACH_BITS:
        return None
    return min(found, key=lambda point: point.kl)


def best(readings: Mapping[str, Point | None]) -> str | None:
    """The name with the least KL among those in range."""
    found = {name: point for name, point in readings.items() if point is not None}
    return min(found, key=lambda name: found[name].kl) if found else None


def ratio(mine: Point, other: Point) -> tuple[float, float]:
    """KL of one over the other, and its standard error as if the two were independent (they share windows)."""
    value = mine.kl / other.kl
    return value, value * math.hypot(mine.stderr / mine.kl, other.stderr / other.kl)
