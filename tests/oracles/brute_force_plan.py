"""Every plan there is, one after the other: the slow reference of `allocate`."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target, candidate_formats


def every_plan(
    layout: ModelLayout, target: Target, formats: Sequence[QuantFormat], scope: str
) -> Iterator[dict[str, QuantFormat]]:
    """All plans that the target allows: tied sites ask for the same format, sites out of scope stay in 16 bits."""
    keep = layout.keep_format
    in_scope = [site for site in layout.sites if scope == "file" or site.block_index is not None]
    tied = {name: tie.sites for tie in target.ties(layout) for name in tie.sites}
    units = list(dict.fromkeys(tied.get(site.name, (site.name,)) for site in in_scope))
    offers: list[list[dict[str, QuantFormat]]] = []
    for names in units:
        offer = [dict.fromkeys(names, keep)]
        for fmt in formats:
            fitted = {name: candidate_formats(layout.site_by_name[name], layout, target, [fmt])[0] for name in names}
            if not any(found.is_float for found in fitted.values()):
                offer.append(fitted)
        offers.append(offer)
    for chosen in product(*offers):
        plan = {site.name: keep for site in layout.sites}
        for part in chosen:
            plan |= part
        yield plan


def exact_damage(table: SensitivityTable, plan: dict[str, QuantFormat]) -> Fraction:
    """Sum of the table's damages without rounding; 16 bits is 0."""
    return sum(
        (Fraction(table.damages[name][fmt.name].value) for name, fmt in plan.items() if not fmt.is_float), Fraction(0)
    )


def counted_bytes(layout: ModelLayout, plan: dict[str, QuantFormat], scope: str) -> int:
    """Bytes that a budget of this scope counts."""
    return layout.plan_bytes(plan) if scope == "file" else layout.block_site_bytes(plan)


def best_plan(
    layout: ModelLayout,
    table: SensitivityTable,
    target: Target,
    formats: Sequence[QuantFormat],
    scope: str,
    limit_bytes: int,
) -> tuple[Fraction, int] | None:
    """Least damage within the limit and the fewest bytes that have it; None if no plan fits."""
    fitting = (
        (exact_damage(table, plan), counted_bytes(layout, plan, scope))
        for plan in every_plan(layout, target, formats, scope)
        if counted_bytes(layout, plan, scope) <= limit_bytes
    )
    return min(fitting, default=None)


def best_columns(
    size_bytes: NDArray[np.int64], damage: NDArray[np.float64], limit_bytes: int
) -> tuple[Fraction, int] | None:
    """The same for bare arrays of shape (groups, width); +inf damage marks an absent option."""
    width = size_bytes.shape[1]
    fitting: list[tuple[Fraction, int]] = []
    for columns in product(range(width), repeat=len(size_bytes)):
        picked = [(int(size_bytes[i, j]), float(damage[i, j])) for i, j in enumerate(columns)]
        size = sum(part for part, _ in picked)
        if size <= limit_bytes and all(value != float("inf") for _, value in picked):
            fitting.append((sum((Fraction(value) for _, value in picked), Fraction(0)), size))
    return min(fitting, default=None)


def least_damages(size_bytes: NDArray[np.int64], damage: NDArray[np.float64], limit_bytes: int) -> NDArray[np.float64]:
    """Least damage with at most b bytes, for every b up to the limit, by the textbook recursion over bytes."""
    least = np.zeros(limit_bytes + 1)
    for sizes, damages in zip(size_bytes, damage, strict=True):
        extended = np.full(limit_bytes + 1, np.inf)
        for size, value in zip(sizes, damages, strict=True):
            if size <= limit_bytes:
                extended[size:] = np.minimum(extended[size:], least[: limit_bytes + 1 - size] + value)
        least = extended
    return least
