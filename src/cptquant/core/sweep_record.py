"""What a sweep leaves behind: one record an evaluation, and sweep.json over all runs."""

from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.sweep import SweepPlan, SweepRun


class LossRecord(Frozen):
    """A loss on held-out text, nats per token, with the standard error over its documents; n tokens."""

    value: float
    stderr: float | None
    n: int


class QuantizedRecord(Frozen):
    """An annealed model quantized to one width, judged on one text beside itself before.

    Attributes:
        bits: of the codes; `format` in full. size_bytes: of all tensors written.
        kl_nats: KL(before ‖ after) per token. rise_nats: of the NLL, paired. Both with standard errors.
    """

    bits: int
    format: str
    text: str
    size_bytes: int
    kl_nats: float
    kl_stderr_nats: float
    rise_nats: float
    rise_stderr_nats: float


class PointRecord(Artifact):
    """One evaluation of one run (work/RUN/point-K.json).

    Attributes:
        tokens: D. branch_step, last_step: where the anneal left the trunk and where it ended; equal for an early look
            at the trunk itself, which is no observation of a law.
        losses: corpus -> loss. distinct_tokens: read at least once. epochs: corpus -> passes over it.
        step_seconds: of one training step, mean since the point before; None where none was made.
    """

    SCHEMA: ClassVar[str] = "cptquant.sweep_point"
    MADE_BY: ClassVar[str] = "cptquant sweep plan.yaml --output SWEEP"

    tokens: int
    branch_step: int
    last_step: int
    losses: dict[str, LossRecord]
    distinct_tokens: int
    epochs: dict[str, float]
    step_seconds: float | None = None
    quantized: tuple[QuantizedRecord, ...] = ()

    @property
    def annealed(self) -> bool:
        """Whether it is the end of a run of `tokens` tokens, and no look at the trunk."""
        return self.last_step > self.branch_step


class RungRecord(Frozen):
    """One size of the ladder.

    Attributes:
        parameters: N, all of them, shared tensors once. block_parameters: without embedding and positions.
        step_seconds: of one training step: timed before the sweep, then the mean of its runs.
    """

    name: str
    parameters: int
    block_parameters: int
    step_seconds: float


class TaskRecord(Frozen):
    """What became of a task.

    Attributes:
        id: of the run, or `base SIZE seed S`. attempts: how often it was begun; 0 if it never was.
        cause: why it failed, or each worker's death before it was done; "" if nothing happened.
        wall_seconds: of the attempt that ended it; None if it was finished already.
    """

    id: str
    status: Literal["finished", "failed", "open"]
    attempts: int
    cause: str = ""
    wall_seconds: float | None = None


class SweepRecord(Artifact):
    """sweep.json: the plan, the ladder, and what became of every task.

    Attributes:
        where: in this process, on local workers, or on which cluster. folders: task -> its folder below the sweep's.
        bases: SIZE-sSEED -> folder of the base model. flops: 6 N D of everything, anneals and base models included.
    """

    SCHEMA: ClassVar[str] = "cptquant.sweep"
    MADE_BY: ClassVar[str] = "cptquant sweep plan.yaml --output SWEEP"

    plan: SweepPlan
    rungs: tuple[RungRecord, ...]
    runs: tuple[SweepRun, ...]
    tasks: tuple[TaskRecord, ...]
    folders: dict[str, str]
    bases: dict[str, str]
    flops: float
    where: str
    held_tokens: dict[str, int]

    @property
    def failed(self) -> tuple[TaskRecord, ...]:
        """Tasks that failed."""
        return tuple(task for task in self.tasks if task.status == "failed")

    def rung(self, name: str) -> RungRecord:
        """A size by its name."""
        return next(rung for rung in self.rungs if rung.name == name)


class SizeEstimate(Frozen):
    """What is left to do of one size: tasks, the tokens they train on, FLOPs (6 N D), seconds on one worker."""

    name: str
    parameters: int
    tasks: int
    tokens: int
    flops: float
    seconds: float


class SweepEstimate(Frozen):
    """What is left to do of a sweep.

    Attributes:
        tasks: all of them; finished: those that stand already. points: tokens of the evaluations.
        seconds: with the workers asked for, at least as long as the longest chain of a base model and a run.
    """

    sizes: tuple[SizeEstimate, ...]
    finished: int
    tasks: int
    points: tuple[int, ...]
    flops: float
    seconds: float
