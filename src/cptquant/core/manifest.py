"""What happened to each site when it was quantized (manifest.json in the run folder)."""

from enum import StrEnum
from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen


class SiteOutcome(StrEnum):
    """Nothing degrades silently: every site says how it went."""

    NOMINAL = "nominal"
    KEPT_BY_PLAN = "kept_by_plan"
    RANK_DEFICIENT_HESSIAN_DAMPED = "rank_deficient_hessian_damped"
    DEAD_INPUTS = "dead_inputs"
    NO_CALIBRATION_INPUT = "no_calibration_input"
    ROUNDED_TO_NEAREST = "rounded_to_nearest"
    SHARES_EMBEDDING = "shares_embedding"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            SiteOutcome.NOMINAL: "quantized as asked",
            SiteOutcome.KEPT_BY_PLAN: "kept in 16 bits, as the plan says",
            SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED: (
                "the Hessian was not positive definite at the asked damping; damping was raised until it was"
            ),
            SiteOutcome.DEAD_INPUTS: "some inputs were zero on all calibration text; their columns were rounded",
            SiteOutcome.NO_CALIBRATION_INPUT: "no calibration input reached this site; it was rounded to nearest",
            SiteOutcome.ROUNDED_TO_NEAREST: "rounded to nearest: an embedding has no input statistics for GPTQ",
            SiteOutcome.SHARES_EMBEDDING: "the head is the embedding's tensor, quantized once",
        }[self]


class LearningRecord(Frozen):
    """What learned rounding did to a site after its first solution.

    Attributes:
        objective: what was minimised. held_out_before, held_out_after: its value on calibration sequences that were not
            learned on, with the first solution and with the one taken (equal where the first was kept).
        codes_changed: share of the site's codes that differ from the first solution's; 0 where it was kept.
        stopped: why learning ended early; empty where it did not.
    """

    objective: str
    held_out_before: float
    held_out_after: float
    codes_changed: float
    stopped: str = ""


class SiteRecord(Frozen):
    """One site after quantization.

    Attributes:
        relative_weight_error: ||Q(W) - W||^2 / ||W||^2 in Frobenius norm.
        relative_output_error: ||(Q(W) - W) X||^2 / ||W X||^2 on the calibration inputs of the quantized stream; None
            without inputs.
        damping: fraction of the mean diagonal that was really added to the Hessian; None where none was used.
        learning: of learned rounding; None where nothing was learned.
    """

    site: str
    format: str
    outcome: SiteOutcome
    relative_weight_error: float
    relative_output_error: float | None = None
    damping: float | None = None
    learning: LearningRecord | None = None


class Manifest(Artifact):
    """Result of `quantize` beside checkpoint/.

    Attributes:
        quantizer: as `--quantizer` spells it, with its options in `settings`.
        sites: one record per site. tensor_bytes: bytes of all tensors of a checkpoint with these weights.
    """

    SCHEMA: ClassVar[str] = "cptquant.manifest"
    MADE_BY: ClassVar[str] = "cptquant quantize MODEL --budget BUDGET --output RUN"

    quantizer: str
    settings: dict[str, str | int | float | bool | None] = {}
    sites: tuple[SiteRecord, ...]
    tensor_bytes: int
    plan_digest: str
    parameters: int


class CheckpointRecord(Artifact):
    """What stands in checkpoint/ (checkpoint.json in the run folder).

    Attributes:
        tensor_bytes: bytes of all tensors, equal to the plan's `size_bytes`. header_bytes: safetensors headers on top.
        files: name of a file in checkpoint/ -> sha256, config and tokenizer too. file_sizes: the same names -> bytes.
    """

    SCHEMA: ClassVar[str] = "cptquant.checkpoint"
    MADE_BY: ClassVar[str] = "cptquant quantize RUN"

    tensor_bytes: int
    header_bytes: int
    files: dict[str, str]
    file_sizes: dict[str, int] = {}
