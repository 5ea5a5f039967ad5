"""What a run will take, before it is started."""

from typing import ClassVar

from cptquant.core.artifact import Artifact


class RunEstimate(Artifact):
    """Result of `quantize --dry-run`; printed, never stored.

    Attributes:
        limit_bytes: what the budget allows, in its scope; smallest_bytes, largest_bytes: the reachable range there.
        uniform_bytes: format -> bytes of the whole file with that format at every site where it is legal.
        stage_seconds: expected wall time of each stage on this machine; wall_seconds: their sum.
        peak_memory_bytes: expected largest resident set. disk_bytes: run folder with its baselines.
        flops_per_second: float32 matrix products, measured for the estimate.
    """

    SCHEMA: ClassVar[str] = "cptquant.estimate"
    MADE_BY: ClassVar[str] = "cptquant quantize MODEL --budget BUDGET --dry-run"

    model: str
    parameters: int
    source_bytes: int
    budget: str
    limit_bytes: int
    smallest_bytes: int
    largest_bytes: int
    uniform_bytes: dict[str, int]
    stage_seconds: dict[str, float]
    wall_seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    flops_per_second: float
