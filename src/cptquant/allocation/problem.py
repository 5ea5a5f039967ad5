"""What every allocator gets and gives: groups of sites with their options under one byte limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol

from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import SolverStatus
from cptquant.core.sensitivity import SensitivityTable


@dataclass(frozen=True)
class Option:
    """One way to hold all sites of a group.

    Attributes:
        formats: one per site of the group, in its order.
        size_bytes: stored bytes of the group. damage: sum over its sites in the table's unit; 0 without a table.
    """

    formats: tuple[QuantFormat, ...]
    size_bytes: int
    damage: float

    @property
    def narrowest_bits(self) -> int:
        """Smallest code width among the sites."""
        return min(fmt.code_bits for fmt in self.formats)


@dataclass(frozen=True)
class ChoiceGroup:
    """Sites whose formats are chosen together: one site, a tie, or a shared embedding and head.

    Attributes:
        options: what can be chosen, 16 bits for all its sites always among them.
        option_of: requested format name -> index into `options`. Two requested formats can lead to one option, since
            a group size that does not divide a row is replaced; absent where the target refuses the format.
    """

    sites: tuple[Site, ...]
    options: tuple[Option, ...]
    option_of: dict[str, int]

    @property
    def block_index(self) -> int | None:
        """Transformer block of the group, None outside the blocks (a tie lies within one block)."""
        return self.sites[0].block_index

    @cached_property
    def smallest(self) -> int:
        """Index of the option with the fewest bytes."""
        sizes = [option.size_bytes for option in self.options]
        return sizes.index(min(sizes))


Choice = Sequence[int]
"""One option index per group of a problem."""


@dataclass(frozen=True)
class Problem:
    """Choose one option per group so that `fixed_bytes` and the chosen sizes stay within `limit_bytes`.

    Attributes:
        fixed_bytes: counted bytes that no choice changes (norms and biases for scope "file", 0 for "sites").
        requested: formats as asked for, 16 bits last; the keys of every group's `option_of`.
        kept_sites: sites outside the budget's scope, left in 16 bits.
        budget_text: the budget as written, for messages.
    """

    layout: ModelLayout
    groups: tuple[ChoiceGroup, ...]
    requested: tuple[QuantFormat, ...]
    fixed_bytes: int
    limit_bytes: int
    scope: Literal["file", "sites"]
    table: SensitivityTable | None
    kept_sites: tuple[str, ...] = ()
    budget_text: str = ""

    def with_limit(self, limit_bytes: int, budget_text: str = "") -> "Problem":
        """The same choices under another limit."""
        return replace(self, limit_bytes=limit_bytes, budget_text=budget_text)

    @cached_property
    def block_groups(self) -> tuple[int, ...]:
        """Indices of the groups inside the transformer blocks."""
        return tuple(i for i, group in enumerate(self.groups) if group.block_index is not None)

    @cached_property
    def outside_groups(self) -> tuple[int, ...]:
        """Indices of the groups outside the blocks: embedding, head, pooler, projections."""
        return tuple(i for i, group in enumerate(self.groups) if group.block_index is None)

    @cached_property
    def block_requests(self) -> tuple[QuantFormat, ...]:
        """Requested formats that every group inside the blocks can take, from few block bytes to many."""
        offered = [
            fmt for fmt in self.requested if all(fmt.name in self.groups[i].option_of for i in self.block_groups)
        ]
        return tuple(sorted(offered, key=lambda fmt: (self.uniform_block_bytes(fmt), fmt.code_bits)))

    def uniform_block_bytes(self, fmt: QuantFormat) -> int:
        """Bytes of all groups inside the blocks with one requested format."""
        groups = (self.groups[i] for i in self.block_groups)
        return sum(group.options[group.option_of[fmt.name]].size_bytes for group in groups)

    def counted_bytes(self, choice: Choice) -> int:
        """Bytes that the budget counts, exact."""
        return self.fixed_bytes + sum(group.options[j].size_bytes for group, j in zip(self.groups, choice, strict=True))

    def damage(self, choice: Choice) -> float:
        """Sum of the damages, correctly rounded."""
        return math.fsum(group.options[j].damage for group, j in zip(self.groups, choice, strict=True))

    def formats(self, choice: Choice) -> dict[str, QuantFormat]:
        """Site name -> format for every site of the layout, in the layout's order."""
        chosen = dict.fromkeys(self.kept_sites, self.layout.keep_format)
        for group, j in zip(self.groups, choice, strict=True):
            chosen.update(zip((site.name for site in group.sites), group.options[j].formats, strict=True))
        return {site.name: chosen[site.name] for site in self.layout.sites}

    @cached_property
    def smallest_bytes(self) -> int:
        """Fewest bytes any choice can have."""
        return self.counted_bytes([group.smallest for group in self.groups])

    @cached_property
    def bytes_at_16_bit(self) -> int:
        """Counted bytes with every site in 16 bits."""
        keep = self.layout.keep_format.name
        return self.counted_bytes([group.option_of[keep] for group in self.groups])


@dataclass(frozen=True)
class Solution:
    """What an allocator returns.

    Attributes:
        choice: one option index per group, within the limit.
        optimality_gap: (damage - best proven lower bound) / damage; None for HEURISTIC.
        notes: how the choice was made, where a reader needs to know.
    """

    choice: tuple[int, ...]
    status: SolverStatus
    optimality_gap: float | None = None
    notes: tuple[str, ...] = ()


class Allocator(Protocol):
    """A frozen dataclass of hyper-parameters; `name` is its `--allocator` spelling."""

    name: ClassVar[str]
    needs_table: ClassVar[bool]

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        """Choose; `seed` matters only to methods that draw.

        Raises:
            BudgetError: the method has no choice within the limit.
            ArtifactError: the method needs a table and there is none, or it lacks what the method needs.
        """
        ...


def refuse_limit(problem: Problem, name: str, smallest_bytes: int) -> BudgetError:
    """The error for a rule whose smallest plan exceeds a limit that other plans could meet."""
    return BudgetError(
        f"--budget {problem.budget_text} allows {problem.limit_bytes:,} bytes, but the smallest plan that "
        f"--allocator {name} can make has {smallest_bytes:,}; raise --budget, or use --allocator knapsack, "
        f"which reaches {problem.smallest_bytes:,}"
    )
