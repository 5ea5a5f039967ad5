"""Every vertex of the trade of size against damage, exactly: the lower convex hull of all plans there are.

A plan that minimises damage + price * bytes for some price is a vertex; all of them come from taking the hull steps of
the groups, steepest first (Sinha and Zoltners, Operations Research 27, 1979), without solving anything per budget.
Plans between two vertices, which a given budget may want, are what the knapsack finds.
"""

from dataclasses import dataclass

import numpy as np

from cptquant.allocation.knapsack import option_arrays
from cptquant.allocation.problem import Problem
from cptquant.allocation.relaxation import hull_steps, undominated_options


@dataclass(frozen=True)
class HullVertex:
    """One plan on the hull.

    Attributes:
        choice: one option index per group. counted_bytes: in the scope of the problem.
        damage: in the table's unit. gain_per_byte: damage that each byte of the next step avoids; 0 at the last.
        changed: indices of the groups that differ from the vertex before; all of them at the first.
    """

    choice: tuple[int, ...]
    counted_bytes: int
    damage: float
    gain_per_byte: float
    changed: tuple[int, ...]


def trace_hull(problem: Problem) -> tuple[HullVertex, ...]:
    """From the fewest bytes to no damage.

    Returns:
        Strictly rising bytes, strictly falling damage, gains per byte that do not rise. Where steps of several groups
        have the same gain per byte, the plans between them, which lie on the hull's edge, are among the vertices.

    Raises:
        ValueError: the problem has no table, so there is nothing to trade.
    """
    if problem.table is None:
        raise ValueError("a frontier needs the damages of a sensitivity table")
    sizes, damages = option_arrays(problem)
    options = undominated_options(sizes, damages)
    group, column, _, slope = hull_steps(options)
    order = np.argsort(-slope, kind="stable")
    choice = [int(index) for index in options.index[:, 0]]
    vertices: list[HullVertex] = []
    changed = tuple(range(len(choice)))
    for step in (*order.tolist(), None):
        gain = 0.0 if step is None else float(slope[step])
        vertices.append(HullVertex(tuple(choice), problem.counted_bytes(choice), problem.damage(choice), gain, changed))
        if step is not None:
            choice[int(group[step])] = int(options.index[group[step], column[step]])
            changed = (int(group[step]),)
    return _strictly_falling(vertices)


def _strictly_falling(vertices: list[HullVertex]) -> tuple[HullVertex, ...]:
    """Drop a step whose gain vanishes in the sum's rounding; its change goes to the vertex after it."""
    kept = [vertices[0]]
    pending: tuple[int, ...] = ()
    for vertex in vertices[1:]:
        pending = tuple(dict.fromkeys((*pending, *vertex.changed)))
        if vertex.damage < kept[-1].damage:
            kept.append(HullVertex(vertex.choice, vertex.counted_bytes, vertex.damage, vertex.gain_per_byte, pending))
            pending = ()
    return tuple(kept)
