"""End-to-end training of a student by `transformers.Trainer`: resumable, data parallel where launched so.

The Trainer brings accelerate, checkpoints and the order of the data; added here are the rates of each kind of
parameter, looks at held-out text that choose the iterate, checkpoints that hold only what moves, and an end where the
loss is no number. Weight decay is zero: it would pull latent weights and steps to where no grid is.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from cptquant.models.load import quiet_transformers
from cptquant.models.processes import process_count
from cptquant.models.training_checkpoints import (
    Diverged,
    check_finite_step,
    disk_errors,
    last_whole,
    mark_whole,
    read_mark,
)
from cptquant.recovery.grid_optimizer import GridAdam
from cptquant.recovery.lesson import Lesson
from cptquant.recovery.student import Student

_MOVED = "moved.safetensors"
_BEST = "best.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimizer steps. batch_sequences: sequences in each, all processes together.
        latent_rate: Adam's rate of a latent weight, in steps of its group's grid.
        step_rate: of a grid's step, relative. zero_rate: of a zero point, in codes. other_rate: of norms and biases.
        left_rate: of the left factor of a product of low rank, in steps of the grid (the mean).
        warm_up: share of the steps over which rates rise; then they fall along a cosine to a tenth.
        checks: how often held-out text is looked at. saves: how often a checkpoint is written.
        gradient_checkpointing: run blocks again on the way back instead of keeping their activations.
    """

    steps: int
    batch_sequences: int = 8
    latent_rate: float = 0.001
    step_rate: float = 5e-4
    zero_rate: float = 0.01
    other_rate: float = 1e-3
    left_rate: float = 0.015
    warm_up: float = 0.05
    checks: int = 10
    saves: int = 5
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Look:
    """One look at held-out text: the training loss is the mean since the look before; nan before the first step."""

    step: int
    training_loss: float
    held_out_loss: float


@dataclass
class Training:
    """What a training did so far; `best` is what `Student.snapshot` gave at the best look."""

    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    done: int = 0
    stopped: str = ""

    @property
    def best_loss(self) -> float:
        """Held-out loss of the best look."""
        return min((look.held_out_loss for look in self.looks), default=math.inf)


_RATES = {"latent": "latent_rate", "log_steps": "step_rate", "zeros": "zero_rate", "left": "left_rate"}
"""Last part of a parameter's name -> its rate in `Schedule`; norms and biases have the other one."""


class SequenceData(Dataset[dict[str, Tensor]]):
    """Rows of tokens with what is asked of each.

    Args:
        input_ids, attention_mask: (n, T). targets: (n, T) or (n,), as `Lesson.forward` reads them.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> None:
        self._columns = {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int | slice) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


@dataclass(frozen=True)
class TrainingText:
    """What is learned on, and what chooses the iterate."""

    learned: SequenceData
    held_out: SequenceData


def train_student(
    student: Student,
    lesson: Lesson,
    text: TrainingText,
    schedule: Schedule,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    before_step: Callable[[float], None] | None = None,
) -> Training:
    """Train; afterwards the student is the best iterate on held-out text, the start included.

    A killed training goes on from the last checkpoint in `folder`, with the same result bit for bit on the same
    machine. Where the loss is no number, training stops, `stopped` says at which step and why, and the best iterate
    before counts.

    Args:
        folder: for checkpoints; removed by nobody here. before_step: called with the schedule's factor after every
            backward pass, before the optimizer moves (for methods that change codes by themselves).

    Raises:
        OutputError: the disk is full.
    """
    keeper = _Keeper(student, lesson, text.held_out, schedule, progress, before_step)
    arguments = _arguments(schedule, folder)
    with quiet_transformers():
        trainer = _StudentTrainer(student, keeper, model=lesson, args=arguments, train_dataset=text.learned)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(keeper)
        resumed = last_whole(folder)
        try:
            with disk_errors(folder):
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except Diverged as error:
            keeper.training.stopped = str(error)
    student.restore_(keeper.training.best)
    student.round_others_()
    return keeper.training


def _arguments(schedule: Schedule, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_sequences // process_count(),
        learning_rate=1.0,  # every group has its own; the scheduler's factor multiplies them
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, round(schedule.warm_up * schedule.steps)),
        max_grad_norm=0.0,  # see `_StudentTrainer.training_step`
        weight_decay=0.0,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=max(1, math.ceil(schedule.steps / schedule.saves)),
        save_total_limit=2,  # the one before goes only when this one is marked whole
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=schedule.seed,
        data_seed=schedule.seed,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        ddp_find_unused_parameters=False,
    )


class _StudentTrainer(Trainer):
    def __init__(self, student: Student, keeper: "_Keeper", **arguments: Any) -> None:
        self._student, self._keeper = student, keeper
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each rate."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._student.trainable():
            kind = name.rpartition(".")[2]
            groups.setdefault(kind if kind in _RATES and name not in self._student.others else "", []).append(parameter)
        if self.optimizer is None:
            schedule = self._keeper.schedule
            made = [
                {"params": found, "lr": getattr(schedule, _RATES.get(kind, "other_rate"))}
                for kind, found in groups.items()
            ]
            layers = self._student.layers.values()
            units = {layer.latent: layer.latent_unit for layer in layers if layer.latent is not None}
            units |= {layer.left: layer.left_unit for layer in layers if layer.left is not None}
            self.optimizer = GridAdam(made, units)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The lesson's loss.

        Raises:
            Diverged: it is no number.
        """
        loss = cast(Tensor, model(**inputs)["loss"])
        self._keeper.losses.append(loss.detach())
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass, looked through before the optimizer acts on it."""
        loss = super().training_step(*args, **kwargs)
        self._keeper.check(loss, self.state.global_step + 1)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What moves, nothing else: the rest is made from the parent run."""
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({**self._student.snapshot(), **self._student.moments()}, folder / _MOVED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._student.restore_(load_file(folder / _MOVED))
        self._keeper.resume(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._keeper.save(Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}")


class _Keeper(TrainerCallback):
    """Looks at held-out text, keeps the best iterate, tells the progress, and refuses what is no number."""

    def __init__(
        self, student: Student, lesson: Lesson, held_out: SequenceData, schedule: Schedule,
        progress: Callable[[int, int], None], before_step: Callable[[float], None] | None,
    ) -> None:  # fmt: skip
        self.schedule, self.training = schedule, Training()
        self.losses: list[Tensor] = []
        self._student, self._lesson, self._held_out = student, lesson, held_out
        self._progress, self._before_step = progress, before_step
        self._looks = {math.ceil(schedule.steps * (n + 1) / schedule.checks) for n in range(schedule.checks)}

    def check(self, loss: Tensor, step: int) -> None:
        """Refuse a loss or a gradient that is no number.

        Raises:
            Diverged: with the step.
        """
        check_finite_step(loss, self._student.trainable(), step, self.schedule.steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start is the first iterate."""
        if state.global_step == 0:
            self._look(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Methods that change codes by themselves do it here."""
        if self._before_step is not None:
            scheduler = kwargs["lr_scheduler"]
            self._before_step(float(scheduler.lr_lambdas[0](scheduler.last_epoch)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the progress; look where it is time."""
        self.training.done = state.global_step
        self._progress(state.global_step, self.schedule.steps)
        if state.global_step in self._looks:
            self._look(state.global_step)

    def save(self, folder: Path) -> None:
        """What a resumed training needs beside the Trainer's own state; the last file is the mark of a whole one."""
        save_file(self.training.best, folder / _BEST)
        state = {
            "looks": [asdict(look) for look in self.training.looks],
            "best_step": self.training.best_step,
            "losses": [float(loss) for loss in self.losses],
        }
        mark_whole(folder, state)

    def resume(self, folder: Path) -> None:
        """Go on from what `save` left."""
        state = read_mark(folder)
        self.training.looks = [Look(**look) for look in state["looks"]]
        self.training.best_step = state["best_step"]
        self.training.best = load_file(folder / _BEST)
        self.losses = [torch.tensor(loss) for loss in state["losses"]]

    @torch.no_grad()
    def _look(self, step: int) -> None:
        training_loss = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        self.losses.clear()
        before = self._student.snapshot()
        self._student.round_others_()
        loss = mean_loss(self._lesson, self._held_out, self.schedule.batch_sequences)
        better = not self.training.looks or loss < self.training.best_loss
        self.training.looks.append(Look(step, training_loss, loss))
        if better:
            self.training.best, self.training.best_step = self._student.snapshot(), step
        self._student.restore_(before)
        if not math.isfinite(loss):
            raise Diverged(f"training stopped at step {step} of {self.schedule.steps}: the held-out loss is {loss}")


@torch.no_grad()
def mean_loss(lesson: Lesson, data: SequenceData, batch_sequences: int) -> float:
    """Mean over batches, each weighing as many rows as it has."""
    device = next(lesson.parameters()).device
    total = 0.0
    for start in range(0, len(data), batch_sequences):
        batch = data[start : start + batch_sequences]
        rows = len(batch["input_ids"])
        total += rows * float(lesson(**{name: column.to(device) for name, column in batch.items()})["loss"])
    return total / len(data)
