"""The trainings of stage 2: SFT on instructions, DPO on preferences, both by TRL; killed, they go on.

Checkpoints are whole or not there (`models/training_checkpoints.py`), as those of stage 1. Beside the Trainer's own
state they keep the sum of the losses and the seconds, so that what is reported does not depend on a kill either.
"""

import copy
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cptquant.adaptation.sources import Record
from cptquant.core.errors import UserError
from cptquant.core.progress import Progress, ignore_progress
from cptquant.models.load import quiet_transformers
from cptquant.models.processes import is_first, process_count, tell
from cptquant.models.training_checkpoints import disk_errors, last_whole, mark_whole, read_mark

_SAVES = 5
"""Checkpoints of a training."""


@dataclass(frozen=True)
class AlignmentSettings:
    """How both trainings run.

    Attributes:
        learning_rate: of SFT; DPO takes a tenth. epochs: over the chosen samples. beta: of DPO.
        longest: tokens of a sample; what is longer is cut at the end.
    """

    learning_rate: float = 2e-5
    epochs: float = 1.0
    batch: int = 8
    beta: float = 0.1
    longest: int = 512
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Aligned:
    """What a training did. Attributes: loss: mean over its steps. seconds: on the clock, over all calls."""

    steps: int
    loss: float
    seconds: float


def align_(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], settings: AlignmentSettings,
    folder: Path, progress: Progress = ignore_progress,
) -> Aligned:  # fmt: skip
    """Train on samples in the tokenizer's template: SFT, or DPO where the records have rejected answers.

    A killed training goes on from the last whole checkpoint in `folder`, with the same bits on the same machine.

    Args:
        model: as it was before this training, also where it goes on; changed in place.

    Raises:
        UserError: the loss is no number. OutputError: the disk is full.
    """
    preferences = records[0].rejected is not None
    found: Any = tell(last_whole(folder) if is_first() else None)  # it removes what is not whole: one process does
    with warnings.catch_warnings(), quiet_transformers(), disk_errors(folder):
        warnings.simplefilter("ignore")
        trainer = _make_trainer(model, tokenizer, records, settings, folder)
        trainer.told = progress
        if found is not None:
            trainer.go_on(read_mark(found))
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    loss = trainer.summed.item() / max(1, trainer.state.global_step)
    if not math.isfinite(loss):
        raise UserError(
            f"format alignment stopped: the loss on {'preferences' if preferences else 'instructions'} is {loss}; "
            f"model/ holds the result of stage 1; lower --align-rate {settings.learning_rate:g} and run again"
        )
    return Aligned(int(trainer.state.global_step), loss, trainer.seconds)


def _make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], settings: AlignmentSettings,
    folder: Path,
) -> Any:  # fmt: skip
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    disable_progress_bars()
    data = Dataset.from_list([_conversation(record) for record in records])
    common = _trainer_arguments(settings, len(records), folder)
    trainer: Any
    if records[0].rejected is not None:
        arguments = DPOConfig(beta=settings.beta, learning_rate=settings.learning_rate / 10, **common)
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        trainer = _resumable(DPOTrainer)(
            model=model, ref_model=frozen, args=arguments, train_dataset=data, processing_class=tokenizer
        )
    else:
        arguments = SFTConfig(learning_rate=settings.learning_rate, completion_only_loss=True, **common)
        trainer = _resumable(SFTTrainer)(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "RichProgressCallback"):
            trainer.remove_callback(callback)
    return trainer


def _resumable(base: Any) -> Any:
    """One of TRL's trainers whose checkpoints are marked when they are whole."""

    class Resumable(base):
        def __init__(self, **arguments: Any) -> None:
            self.summed, self.seconds, self.told = torch.zeros(()), 0.0, ignore_progress
            super().__init__(**arguments)

        def go_on(self, mark: dict[str, Any]) -> None:
            self.summed, self.seconds = torch.tensor(mark["loss_sum"]), mark["seconds"]

        def training_step(self, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            loss = super().training_step(*arguments, **more)
            self.summed = self.summed.to(loss.device) + loss.detach()
            self.seconds += time.perf_counter() - began
            self.told("align", self.state.global_step + 1, self.state.max_steps)
            return loss

        def _run_epoch(self, *arguments: Any, **more: Any) -> None:
            if self.state.global_step < self.state.max_steps:  # a last epoch that is cut short was done before
                super()._run_epoch(*arguments, **more)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                mark_whole(place, {"loss_sum": self.summed.item(), "seconds": self.seconds})

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None: a checkpoint is nobody's model."""

    return Resumable


def _conversation(record: Record) -> dict[str, Any]:
    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    prompt, answer = said("user", record.question), said("assistant", record.answer)
    if record.rejected is None:
        return {"prompt": prompt, "completion": answer}
    return {"prompt": prompt, "chosen": answer, "rejected": said("assistant", record.rejected)}


def _trainer_arguments(settings: AlignmentSettings, samples: int, folder: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    steps = math.ceil(samples / settings.batch) * settings.epochs
    return {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": max(1, settings.batch // process_count()),
        "max_length": settings.longest,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(0.1 * steps),
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": max(1, math.ceil(math.ceil(steps) / _SAVES)),
        "save_total_limit": 2,  # the one before goes only when this one is marked whole
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": not on_gpu,
        "bf16": settings.bf16,
    }
