"""The plan: which format each site gets, what that costs in bytes, and how sure the solver is."""

from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, cast

from cptquant.core.artifact import Artifact
from cptquant.core.formats import QuantFormat


class SolverStatus(StrEnum):
    """How good the plan is for its table."""

    OPTIMAL = "optimal"
    GAP_BOUNDED = "gap_bounded"
    HEURISTIC = "heuristic"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            SolverStatus.OPTIMAL: "proven optimal for this table and budget",
            SolverStatus.GAP_BOUNDED: "within the stated gap of the optimum for this table and budget",
            SolverStatus.HEURISTIC: "made by a rule that does not optimise the table",
        }[self]


class Plan(Artifact):
    """Result of `allocate` (plan.json).

    Attributes:
        formats: site name -> format name, for every site of the layout.
        size_bytes: bytes of all tensors of the checkpoint (the safetensors header comes on top).
        site_bytes: bytes of the blocks' linear sites alone.
        limit_bytes: what the budget allowed, in the scope of the budget.
        predicted_damage: sum of the table's damages over the plan, in the table's unit; None without a table.
        optimality_gap: relative gap to the best bound; 0 for OPTIMAL, None for HEURISTIC.
        bits_per_weight: 8 * size_bytes / parameters; bits_per_weight_sites likewise for the blocks' linear sites.
    """

    SCHEMA: ClassVar[str] = "cptquant.plan"
    MADE_BY: ClassVar[str] = "cptquant allocate RUN --budget BUDGET"

    target: str
    allocator: str
    budget: str
    budget_scope: Literal["file", "sites"]
    limit_bytes: int
    formats: dict[str, str]
    size_bytes: int
    site_bytes: int
    bits_per_weight: float
    bits_per_weight_sites: float
    sensitivity_method: str | None = None
    damage_unit: str | None = None
    predicted_damage: float | None = None
    status: SolverStatus
    optimality_gap: float | None = None
    notes: tuple[str, ...] = ()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, which would take along formats parsed before they were changed."""
        copied = super().model_copy(update=update, deep=deep)
        cast(dict[str, Any], copied.__dict__).pop("quant_formats", None)
        return copied

    @property
    def counted_bytes(self) -> int:
        """What the budget limits, in its scope."""
        return self.size_bytes if self.budget_scope == "file" else self.site_bytes

    @cached_property
    def quant_formats(self) -> dict[str, QuantFormat]:
        """Site name -> parsed format."""
        return {site: QuantFormat.parse(name) for site, name in self.formats.items()}
