"""First and last blocks get more bits: the depth profile that CPTQuant claims, as a rule without measurement.

Source: CPTQuant, arXiv 2412.03599, which states that the first and last 30 % of layers are more sensitive. Changed:
the number of blocks follows from the budget instead of being 30 %, so that the rule can be compared at equal bytes.
"""

from dataclasses import dataclass
from typing import ClassVar

from cptquant.allocation.outside import lowest_outside, outside_bytes, raise_outside
from cptquant.allocation.problem import ChoiceGroup, Problem, Solution, refuse_limit
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import SolverStatus


@dataclass(frozen=True)
class FirstLast:
    """The widest uniform format that fits, and the next wider code width in the first and last k blocks.

    k is the largest number whose plan fits. Sites outside the blocks are no narrower than the narrow format and take
    the bytes left over.
    """

    name: ClassVar[str] = "first_last"
    needs_table: ClassVar[bool] = False

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Choose narrow and wide format, then k.

        Raises:
            BudgetError: not even the smallest uniform plan fits.
        """
        smallest: list[int] = []
        for narrow in reversed(problem.block_requests):
            outside = lowest_outside(problem, narrow.code_bits)
            spare = problem.limit_bytes - problem.fixed_bytes - outside_bytes(problem, outside)
            spare -= problem.uniform_block_bytes(narrow)
            if spare >= 0:
                return _widen_ends(problem, narrow, outside, spare)
            smallest.append(problem.limit_bytes - spare)
        raise refuse_limit(problem, self.name, min(smallest))


def _widen_ends(problem: Problem, narrow: QuantFormat, outside: dict[int, int], spare_bytes: int) -> Solution:
    wider = [fmt for fmt in problem.block_requests if fmt.code_bits > narrow.code_bits]
    wide = min(wider, key=lambda fmt: (fmt.code_bits, problem.uniform_block_bytes(fmt)), default=narrow)
    block_count = problem.layout.block_count
    extra = [0] * block_count
    for i in problem.block_groups:
        group = problem.groups[i]
        extra[_block(group)] += _size(group, wide) - _size(group, narrow)
    ends = 0
    while 2 * (ends + 1) <= block_count:
        cost = extra[ends] + extra[block_count - 1 - ends]
        if cost > spare_bytes:
            break
        spare_bytes -= cost
        ends += 1
    if wide is narrow:
        ends = 0
    outside = raise_outside(problem, outside, spare_bytes)
    choice: list[int] = []
    for i, group in enumerate(problem.groups):
        if i in outside:
            choice.append(outside[i])
        else:
            at_end = _block(group) < ends or _block(group) >= block_count - ends
            choice.append(group.option_of[(wide if at_end else narrow).name])
    note = f"the first {ends} and the last {ends} of {block_count} blocks have {wide.name}, the others {narrow.name}"
    if ends == 0:
        note = f"all blocks have {narrow.name}: the budget leaves no room to widen the first and the last block"
    return Solution(tuple(choice), SolverStatus.HEURISTIC, notes=(note,))


def _block(group: ChoiceGroup) -> int:
    assert group.block_index is not None  # callers pass groups inside the blocks only
    return group.block_index


def _size(group: ChoiceGroup, fmt: QuantFormat) -> int:
    return group.options[group.option_of[fmt.name]].size_bytes
