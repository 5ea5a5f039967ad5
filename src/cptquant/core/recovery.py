"""What was asked of `cptquant recover`, and what came of it (recovery.json in the run folder)."""

from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen

LOSSES = ("kl", "ce", "both")


class RecoveryRequest(Frozen):
    """Flags of `cptquant recover`; None leaves the choice to the method.

    Attributes:
        method: as `--method` spells it (`recovery/methods.py`).
        rounding, sharpness, clamp, gate, gate_beta, soft_forward: of the surrogate, where latent weights are trained.
        loss: against the teacher's predictions, the text's own tokens, or both. states: weight of the distance between
            hidden states. teacher: another model than the original.
        freeze: sites that keep codes and steps. norms: whether norms and biases are trained.
        steps, epochs, seconds: how long, epochs for block-wise methods; seconds are turned into steps by timing some.
        data: training text, None for the run's calibration text. sequences: how many windows of it at most.
        own_text: windows that the model writes itself beside it.
        batch_sequences: windows a step. latent_rate, step_rate, norm_rate: see `recovery/training.py`.
        activation_bits: of the inputs of quantized layers during training.
        gradient_checkpointing: run blocks again on the way back instead of keeping their activations.
    """

    method: str = "qat"
    rounding: str = "ste"
    sharpness: float = 4.0
    clamp: str = "hard"
    gate: str = "sigmoid"
    gate_beta: float = 4.0
    soft_forward: bool = False
    loss: str = "kl"
    states: float | None = None
    teacher: str | None = None
    freeze: tuple[str, ...] = ()
    norms: bool | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    data: str | None = None
    sequences: int | None = None
    own_text: int | None = None
    batch_sequences: int | None = None
    latent_rate: float | None = None
    step_rate: float | None = None
    norm_rate: float | None = None
    activation_bits: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0


class RecoveryLook(Frozen):
    """Held-out training text looked at after some steps.

    Attributes:
        training_loss: mean since the look before; None at the start.
    """

    step: int
    training_loss: float | None
    held_out_loss: float


class BlockOutcome(Frozen):
    """What became of a block that was trained by itself.

    Attributes:
        held_out_before, held_out_after: relative squared error of the block's output on held-out sequences.
        best_step: the iterate that was taken; None where the start was kept. steps: that were to be made.
        moved: numbers that were trained. norms: norms and biases that were written beside it.
        stopped: why training ended early; "" where it did not.
    """

    block_index: int
    held_out_before: float
    held_out_after: float
    best_step: int | None
    steps: int
    moved: int
    norms: int = 0
    stopped: str = ""


class RecoveryRecord(Artifact):
    """What a recovery started from and did.

    Attributes:
        parent: run folder whose weights were trained. parent_pieces, pieces: digests under work/, also the names of
            their folders. parent_norms, norms: which of their pieces hold norms and biases.
        request: what was asked for. options: what was done, every choice made, in words.
        objective: what `looks` tell, with its unit. looks: in order of steps; none of block-wise methods, which have
            `blocks`.
        best_step: the iterate that was taken; 0 is the parent.
        stopped: why training ended early; "" where it did not.
        moved_share: trained numbers over the model's parameters. codes_changed: share of all codes.
        step_seconds: of one step, mean on the clock; None where nothing was trained.
    """

    SCHEMA: ClassVar[str] = "cptquant.recovery"
    MADE_BY: ClassVar[str] = "cptquant recover PARENT --output RUN"

    parent: str
    parent_name: str
    parent_pieces: str
    pieces: str
    parent_norms: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    request: RecoveryRequest
    options: dict[str, str]
    objective: str
    looks: tuple[RecoveryLook, ...] = ()
    blocks: tuple[BlockOutcome, ...] = ()
    best_step: int = 0
    stopped: str = ""
    moved_share: float = 0.0
    codes_changed: float = 0.0
    step_seconds: float | None = None
