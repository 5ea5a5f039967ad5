"""Embedding, head and other sites outside the blocks, for rules that speak of blocks only."""

from cptquant.allocation.problem import Problem


def lowest_outside(problem: Problem, floor_bits: int) -> dict[int, int]:
    """The smallest options outside the blocks that are no narrower than `floor_bits`: group index -> option index."""
    lowest: dict[int, int] = {}
    for i in problem.outside_groups:
        options = problem.groups[i].options
        allowed = [j for j, option in enumerate(options) if option.narrowest_bits >= floor_bits]
        lowest[i] = min(allowed, key=lambda j: (options[j].size_bytes, options[j].damage, j))
    return lowest


def raise_outside(problem: Problem, outside: dict[int, int], spare_bytes: int) -> dict[int, int]:
    """Give spare bytes to the groups outside the blocks, the largest group first, each the largest option that fits.

    Baselines must not leave on the table what the embedding could use; greedy by size is exact enough there, since
    there are one to four such groups.
    """
    raised = dict(outside)
    by_size = sorted(outside, key=lambda i: (-max(option.size_bytes for option in problem.groups[i].options), i))
    for i in by_size:
        options = problem.groups[i].options
        held = options[raised[i]]
        allowed = [
            j
            for j, option in enumerate(options)
            if option.narrowest_bits >= held.narrowest_bits
            and held.size_bytes <= option.size_bytes <= held.size_bytes + spare_bytes
        ]
        best = max(allowed, key=lambda j: (options[j].size_bytes, options[j].narrowest_bits, -j))
        spare_bytes -= options[best].size_bytes - held.size_bytes
        raised[i] = best
    return raised


def outside_bytes(problem: Problem, outside: dict[int, int]) -> int:
    """Stored bytes of a choice outside the blocks."""
    return sum(problem.groups[i].options[j].size_bytes for i, j in outside.items())
