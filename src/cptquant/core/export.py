"""What the engine makes of an exported file (export.json)."""

from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen


class TensorCheck(Frozen):
    """One site's weight in the file against ours: largest difference after dequantizing; 0 is bit for bit."""

    site: str
    tensor: str
    largest_difference: float


class EngineComparison(Frozen):
    """The engine's next-token distributions against our dequantized model's on the same held-out tokens.

    Attributes:
        weights: which weights the engine ran: "dequantized" (ours in float32: activations stay floats), "file" (the
            exported file: the engine may round activations too) or "original" (unquantized, in the file's float types).
        kl_nats_per_token: mean KL(reference || engine); for encoders 1 - cosine of the embeddings.
        top1_agreement: share of tokens with the same most likely successor; None for encoders.
    """

    weights: str
    kl_nats_per_token: float
    kl_stderr: float | None
    top1_agreement: float | None
    n: int


class ExportReport(Artifact):
    """Result of `export`.

    Attributes:
        file, file_bytes, tensor_bytes: what was written.
        tensors: round trip of every site through the file and the `gguf` package's dequantizer.
        engine: name and version, None where none is installed; then `note` says so.
        tokens_equal: the engine's token ids are Hugging Face's on a text of mixed scripts; None without an engine.
        comparisons: engine against our model. bound_nats: what "dequantized" may differ by.
    """

    SCHEMA: ClassVar[str] = "cptquant.export"
    MADE_BY: ClassVar[str] = "cptquant quantize MODEL --target gguf --budget BUDGET --output RUN"

    target: str
    file: str
    file_bytes: int
    tensor_bytes: int
    tensors: tuple[TensorCheck, ...]
    engine: str | None = None
    tokens_equal: bool | None = None
    comparisons: tuple[EngineComparison, ...] = ()
    bound_nats: float
    note: str = ""
