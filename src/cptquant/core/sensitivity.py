"""The table every allocator reads: how much each format at each site is expected to hurt."""

from functools import cached_property
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt

from cptquant.core.artifact import Artifact, Frozen


class Damage(Frozen):
    """Expected harm of one format at one site, in the table's unit.

    Attributes:
        value: at least 0; larger is worse. stderr: standard error over the n calibration sequences (None where a
            score is exact or has no sampling model). n: how many sequences.
    """

    value: NonNegativeFloat
    stderr: NonNegativeFloat | None = None
    n: NonNegativeInt = 0


class BlockScore(Frozen):
    """A score of a whole transformer block, as the CPTQuant paper defines its methods."""

    block_index: int
    value: NonNegativeFloat
    stderr: NonNegativeFloat | None = None
    n: NonNegativeInt = 0


class SensitivityTable(Artifact):
    """Result of `measure` (sensitivity.json).

    Attributes:
        method: `cmpq`, `pmpq`, `tdmpq`, `path`, `sketch` or `ablation`.
        unit: unit of the damages, e.g. `kl_nats_per_token`, `nll_nats_per_token`, `relative`.
        damages: site name -> format name -> damage. Every candidate format of a site has an entry; 16 bits is 0.
        block_scores: one per block, the paper's granularity; what the k-means allocator clusters.
        metadata: how the number was made (options, the rule that turns block scores into damages, ...).
        curves: extra read-outs for the report, e.g. PMPQ's NLL over sparsities: name -> block index -> value.
    """

    SCHEMA: ClassVar[str] = "cptquant.sensitivity"
    MADE_BY: ClassVar[str] = "cptquant measure RUN --sensitivity METHOD"

    method: str
    unit: str
    damages: dict[str, dict[str, Damage]]
    block_scores: tuple[BlockScore, ...] = ()
    metadata: dict[str, str | int | float | bool | None] = {}
    curves: dict[str, dict[str, float]] = {}

    @cached_property
    def format_names(self) -> tuple[str, ...]:
        """Every format that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.damages.values() for name in row))
