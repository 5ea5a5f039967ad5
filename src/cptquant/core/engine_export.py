"""What was written for an engine, and how it compared there with our own model (export.json)."""

import math
from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen

KL_BOUND_NATS = 1e-3
"""Largest mean KL(ours ‖ engine) per token that an export may have where the engine computes with float activations."""


class SiteRoundTrip(Frozen):
    """One site read back from the engine's file.

    Attributes:
        largest_error: max |read back - ours| over the dequantized matrix; 0 where nothing was lost.
    """

    site: str
    format: str
    largest_error: float


class EngineComparison(Frozen):
    """The engine's outputs on held-out text beside our own in float32, both with the same weights.

    Attributes:
        arithmetic: how the engine computed: "float activations", "int8 activations", "16-bit activations".
        weights: "quantized": what was exported; "original": the unquantized model's, for what the engine's own rounding
            of activations costs apart from any plan.
        kl_nats: mean KL(ours ‖ engine), of a token or, for a classifier, an example; None for bare encoders.
        top1_agreement: share with the same most likely answer; None for bare encoders.
        cosine, cosine_lowest: of pooled embeddings, mean and minimum; None for other tasks.
        n: tokens, examples or sentences compared. stderr: of kl_nats or cosine, clustered by document.
        bound: what kl_nats may not exceed (1 - cosine for encoders); None where it is only stated.
    """

    arithmetic: str
    weights: Literal["quantized", "original"] = "quantized"
    kl_nats: float | None = None
    top1_agreement: float | None = None
    cosine: float | None = None
    cosine_lowest: float | None = None
    n: int
    stderr: float | None = None
    bound: float | None = None

    @property
    def distance(self) -> float:
        """What is held against the bound; not a number, which no bound allows, where nothing was compared."""
        if self.kl_nats is not None:
            return self.kl_nats
        return math.nan if self.cosine is None else 1 - self.cosine


class MemoryUse(Frozen):
    """Bytes an engine takes with a cache for `context` tokens filled to its end.

    Attributes:
        base_bytes: of the process with the engine's library and no model.
        weight_bytes, cache_bytes, overhead_bytes: the parts of the prediction on top.
        predicted_bytes: their sum. measured_bytes: peak resident set of the engine's process; None if not run.
        limit_bytes: what `--memory` allows; None without it.
    """

    context: int
    base_bytes: int
    weight_bytes: int
    cache_bytes: int
    overhead_bytes: int
    predicted_bytes: int
    measured_bytes: int | None = None
    limit_bytes: int | None = None

    @property
    def excess_bytes(self) -> int:
        """By how much the measured peak is above the limit; 0 where it is not, or one of the two is unknown."""
        if self.measured_bytes is None or self.limit_bytes is None:
            return 0
        return max(0, self.measured_bytes - self.limit_bytes)


class ExportRecord(Artifact):
    """Result of `export` (export.json beside the engine's files).

    Attributes:
        target: spelling of `--target`. entry: name of the file or folder an engine is given.
        files: name -> sha256. file_sizes: the same names -> bytes.
        tensor_bytes: of all tensors; file_bytes: of the files that hold them.
        context: longest sequence the files were written for; None where they set no limit.
        round_trip: one record per quantized site.
        tokens_equal: the engine's own tokenizer gives Hugging Face's ids on mixed text; None where it has none or was
            not run. tokens_note: where the engine cannot but cut text otherwise, with an example.
        comparisons: in the engine; empty if it was not run. engine: its name and version, or why it was not run.
    """

    SCHEMA: ClassVar[str] = "cptquant.export"
    MADE_BY: ClassVar[str] = "cptquant export RUN --target TARGET"

    target: str
    entry: str
    files: dict[str, str]
    file_sizes: dict[str, int] = {}
    tensor_bytes: int
    file_bytes: int
    context: int | None = None
    round_trip: tuple[SiteRoundTrip, ...]
    tokens_equal: bool | None = None
    tokens_note: str = ""
    comparisons: tuple[EngineComparison, ...] = ()
    engine: str
    memory: MemoryUse | None = None
