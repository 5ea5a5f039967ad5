"""Stage 1: continued pre-training on a mixture of plain text, held by a frozen teacher (Mix-CPT, arXiv 2407.10804).

    loss = mean over counted tokens of (1 - lam) CE + lam T^2 KL(p~ ‖ p_s)         (logit_swap.py)

`transformers.Trainer` brings accelerate, several processes, bf16, gradient checkpointing and checkpoints. Added here:
windows by random access in a fixed order, the loss, a mean over the tokens of the whole step however it is split,
looks at held-out text, and an end where a number is none.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from cptquant.adaptation.held_out import held_out_loss
from cptquant.adaptation.logit_swap import PLAIN, CountedLoss, LossShape, counted_loss
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.teacher import Teacher
from cptquant.core.adaptation import AdaptationLook
from cptquant.core.progress import Progress, ignore_progress
from cptquant.models.load import quiet_transformers
from cptquant.models.losses import IGNORED
from cptquant.models.processes import is_first, process_count, tell
from cptquant.models.text import TokenSet
from cptquant.models.training_checkpoints import (
    Diverged,
    check_finite_step,
    disk_errors,
    last_whole,
    mark_whole,
    read_mark,
)

_LOWEST_RATE = 0.1
"""Where a schedule ends, as a share of the learning rate."""


@dataclass(frozen=True)
class TrainingSettings:
    """How fast, and in which portions.

    Attributes:
        batch_windows: windows of a step, all processes together. micro_batch: at once in one process; None all of its
            part. Neither the micro batch nor the number of processes changes the loss.
        learning_rate: AdamW's, betas .9 and .95. schedule: "cosine" to a tenth, or "constant" with a straight line to
            a tenth over the last `anneal` of the steps (0: none, so that prefixes of a run are runs of their own).
        warm_up: share of the steps over which the rate rises.
        looks: how often held-out text is read, evenly spread; `look_steps` of `train_causal` says exactly when.
        saves: how often a checkpoint is written.
        bf16: train in mixed precision; None where a GPU can.
        gradient_checkpointing: run blocks again on the way back instead of keeping their activations.
    """

    batch_windows: int = 8
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warm_up: float = 0.05
    anneal: float = 0.2
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    micro_batch: int | None = None
    looks: int = 5
    saves: int = 5
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, as a share of `learning_rate`."""
        rising = max(1, round(self.warm_up * steps))
        if step < rising:
            return (step + 1) / rising
        if self.schedule == "cosine":
            done = (step - rising) / max(1, steps - rising)
            return _LOWEST_RATE + (1 - _LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        falling = round(self.anneal * steps)
        left = steps - step
        return 1.0 if left > falling else _LOWEST_RATE + (1 - _LOWEST_RATE) * left / (falling + 1)


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher and what is learned from it. Attributes: shape: weight, temperature, swap."""

    teacher: Teacher
    shape: LossShape


@dataclass(frozen=True)
class Looks:
    """When held-out text is read during training.

    Attributes:
        texts: name -> text. steps: after which steps; None spreads `TrainingSettings.looks` of them evenly. The start
            and the end are always among them.
    """

    texts: Mapping[str, TokenSet] = field(default_factory=dict)
    steps: Sequence[int] | None = None


NO_LOOKS = Looks()


@dataclass
class CausalTraining:
    """What a training did.

    Attributes:
        looks: in order of steps, the start first. stopped: why it ended early, or "". Then the model is the last good
            checkpoint's, at step `done`.
        seconds: of all steps on the clock; looks, saves and reading are not in it. A resumed training counts on.
        teacher_seconds: of these, in the teacher's passes.
    """

    steps: int
    looks: list[AdaptationLook] = field(default_factory=list)
    done: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    stopped: str = ""


def train_causal(
    model: PreTrainedModel,
    mixture: Mixture,
    folder: Path,
    settings: TrainingSettings,
    *,
    distillation: Distillation | None = None,
    looks: Looks = NO_LOOKS,
    progress: Progress = ignore_progress,
) -> CausalTraining:
    """Train a causal language model on a mixture; without `distillation` this is plain continued pre-training.

    Windows come in the order of the mixture; what is left of it after whole steps is not read. A killed training goes
    on from the last whole checkpoint in `folder`, with the same result bit for bit on the same machine.

    Args:
        model: changed in place; float32 (or what the caller wants to train in).
        folder: for checkpoints; removed by nobody here.

    Raises:
        OutputError: the disk is full.
    """
    steps = len(mixture) // settings.batch_windows
    if steps < 1:
        raise ValueError(f"{len(mixture)} windows do not fill a step of {settings.batch_windows}")
    if looks.steps is None:
        looks = Looks(looks.texts, [math.ceil(steps * (n + 1) / settings.looks) for n in range(settings.looks)])
    keeper = _Keeper(model, settings, CausalTraining(steps), looks, mixture, progress)
    found = tell(last_whole(folder) if is_first() else None)  # it removes what is not whole: one process does
    resumed = cast(Path | None, found)
    with quiet_transformers():
        trainer = _CausalTrainer(
            keeper, distillation, steps, model=model, args=_arguments(settings, steps, folder),
            train_dataset=_WindowData(mixture, distillation),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(keeper)
        if resumed is not None:
            keeper.resume(resumed)
        try:
            with disk_errors(folder):
                trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except Diverged as error:
            keeper.training.stopped = str(error)
            _go_back(model, folder, keeper.training)
    return keeper.training


class _WindowData(Dataset[dict[str, Tensor]]):
    """Windows of a mixture as the Trainer wants them; `labels` are aligned with the logits."""

    def __init__(self, mixture: Mixture, distillation: Distillation | None) -> None:
        self._mixture, self._distillation = mixture, distillation

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self._mixture[index]
        targets = torch.full((self._mixture.window_tokens,), IGNORED)
        targets[:-1] = torch.from_numpy(window.labels[1:])
        item = {"input_ids": torch.from_numpy(window.input_ids), "labels": targets, "shift_labels": targets}
        if window.position_ids is not None:
            item["position_ids"] = torch.from_numpy(window.position_ids)
        if self._distillation is not None:
            item |= self._distillation.teacher.stored(index)
        return item


class _CausalTrainer(Trainer):
    def __init__(self, keeper: "_Keeper", distillation: Distillation | None, steps: int, **arguments: Any) -> None:
        self._keeper, self._distillation, self._steps = keeper, distillation, steps
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = True  # so that the tokens of a whole step are counted

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(cast(_WindowData, self.train_dataset))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The schedule of the settings."""
        if self.lr_scheduler is None:
            settings, steps = self._keeper.settings, self._steps
            self.lr_scheduler = LambdaLR(
                cast(torch.optim.Optimizer, optimizer or self.optimizer), lambda step: settings.factor(step, steps)
            )
        return cast(LambdaLR, self.lr_scheduler)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The step's part of its mean over counted tokens."""
        targets = cast(Tensor, inputs["labels"])
        ids = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        shape, teaching = PLAIN, None
        if self._distillation is not None:
            shape = self._distillation.shape
            began = time.perf_counter()
            teaching = self._distillation.teacher.targets(ids, inputs)
            self._keeper.training.teacher_seconds += time.perf_counter() - began
        logits = model(**ids, use_cache=False).logits
        counted = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        scale = self.accelerator.num_processes / torch.as_tensor(counted, device=logits.device).clamp(min=1)
        loss = counted_loss(logits, targets, shape, teaching, scale=scale)
        self._keeper.note(loss)
        return loss.total

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._keeper.pause()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._keeper.save(Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}")
        self._keeper.go_on()


class _Keeper(TrainerCallback):
    """Looks at held-out text, keeps count of seconds, tells the progress, and refuses what is no number."""

    def __init__(
        self, model: PreTrainedModel, settings: TrainingSettings, training: CausalTraining, looks: Looks,
        mixture: Mixture, progress: Progress,
    ) -> None:  # fmt: skip
        self.settings, self.training = settings, training
        self._model, self._texts, self._progress = model, looks.texts, progress
        self._look_steps = {*(looks.steps or ()), training.steps}
        self._step_tokens = settings.batch_windows * mixture.window_tokens
        self._sums, self._began = torch.zeros(3, dtype=torch.float64), 0.0
        self._last = 0.0

    def note(self, loss: CountedLoss) -> None:
        """Add a part of a step to the means of the training loss."""
        self._sums += torch.tensor([loss.cross_entropy_nats, loss.divergence_nats, loss.counted], dtype=torch.float64)
        self._last = loss.cross_entropy_nats + loss.divergence_nats

    def pause(self) -> None:
        """Stop the clock."""
        self.training.seconds += time.perf_counter() - self._began

    def go_on(self) -> None:
        """Start it again."""
        self._began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start is the first look."""
        if state.global_step == 0:
            self._look(0)
        self.go_on()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step that would spoil the weights."""
        check_finite_step(self._last, self._model.named_parameters(), state.global_step + 1, self.training.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the progress; look where it is time."""
        self.training.done = state.global_step
        self._progress("train", state.global_step, self.training.steps)
        if state.global_step in self._look_steps:
            self.pause()
            self._look(state.global_step)
            self.go_on()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.pause()

    def save(self, folder: Path) -> None:
        """What a resumed training needs beside the Trainer's own state; the last file is the mark of a whole one."""
        kept = self.training
        state = {
            "looks": [look.model_dump(mode="json") for look in kept.looks],
            "sums": self._sums.tolist(),
            "seconds": kept.seconds,
            "teacher_seconds": kept.teacher_seconds,
            "done": kept.done,
        }
        mark_whole(folder, state)

    def resume(self, folder: Path) -> None:
        """Go on from what `save` left."""
        state, kept = read_mark(folder), self.training
        kept.looks = [AdaptationLook.model_validate(look) for look in state["looks"]]
        kept.seconds, kept.teacher_seconds, kept.done = state["seconds"], state["teacher_seconds"], state["done"]
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)

    def _look(self, step: int) -> None:
        if torch.distributed.is_initialized():
            shared = self._sums.to(next(self._model.parameters()).device)  # NCCL sums what is on GPUs alone
            torch.distributed.all_reduce(shared)
            self._sums = shared.cpu()
        cross_entropy, divergence, counted = self._sums.tolist()
        self._sums.zero_()
        held_out = {
            name: held_out_loss(self._model, tokens, self.settings.batch_windows)
            for name, tokens in self._texts.items()
        }
        self.training.looks.append(
            AdaptationLook(
                step=step,
                tokens=step * self._step_tokens,
                training_nats_per_token=cross_entropy / counted if counted else None,
                divergence_nats_per_token=divergence / counted if counted and divergence else None,
                held_out=held_out,
            )
        )
        for name, loss in held_out.items():
            if not math.isfinite(loss.nll_nats_per_token):
                raise Diverged(
                    f"training stopped at step {step} of {self.training.steps}: the loss on held-out {name} text is "
                    f"{loss.nll_nats_per_token}"
                )


def _go_back(model: PreTrainedModel, folder: Path, training: CausalTraining) -> None:
    """To the weights of the last whole checkpoint; without one nothing useful is left."""
    from safetensors.torch import load_file

    kept = last_whole(folder)
    training.done = 0
    if kept is not None:
        training.done = int(read_mark(kept)["done"])
        model.load_state_dict(load_file(kept / "model.safetensors"), strict=False)  # tied weights are stored once


def _arguments(settings: TrainingSettings, steps: int, folder: Path) -> TrainingArguments:
    mine = settings.batch_windows // process_count()
    micro = min(settings.micro_batch or mine, mine)
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported() if settings.bf16 is None else settings.bf16
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=mine // micro,
        learning_rate=settings.learning_rate,
        adam_beta2=0.95,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / settings.saves)),
        save_total_limit=2,  # the one before goes only when this one is marked whole
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        use_cpu=not on_gpu,
        bf16=bf16,
        ddp_find_unused_parameters=False,
    )
