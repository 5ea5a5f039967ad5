"""What llama.cpp makes of an exported file; `core.engine_export` holds the record of every engine."""

from cptquant.core.artifact import Frozen


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
