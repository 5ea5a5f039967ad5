"""Recovery methods that train the whole model on its predictions: QAT, scales alone, multipliers, PV-style codes."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptquant.core.errors import DataError, UserError
from cptquant.core.layout import Task
from cptquant.models.load import LoadedModel
from cptquant.models.losses import mask_tokens, scored_targets
from cptquant.models.stream import QuantizedSource
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.recovery.code_steps import CodeSteps
from cptquant.recovery.lesson import Lesson, Weights
from cptquant.recovery.student import Student, StudentOptions, build_student
from cptquant.recovery.training import Schedule, SequenceData, Training, TrainingText, train_student

_TIMED_STEPS = 3
_HELD_OUT = 1 / 16
_MOST_HELD_OUT = 32


@dataclass(frozen=True)
class EndToEnd:
    """A method of this kind.

    Attributes:
        name: as `--method` spells it. options: what moves. weights: of the loss. schedule: how long and how fast.
        codes: how codes without latent weights are rounded anew (PV-Tuning); None leaves them.
    """

    name: str
    options: StudentOptions
    weights: Weights
    schedule: Schedule
    codes: CodeSteps | None = None


@dataclass(frozen=True)
class Recovered:
    """What training found.

    Attributes:
        weights: quantized sites inside the blocks. kept: norms and biases that moved, in 16 bits.
        training: how it went. objective: what its losses are. moved_share: trained numbers over the model's parameters.
        step_seconds: mean of a step.
    """

    weights: Mapping[str, StoredWeight]
    kept: Mapping[str, Tensor]
    training: Training
    objective: str
    moved_share: float
    step_seconds: float


@dataclass(frozen=True)
class Material:
    """What there is to learn from.

    Attributes:
        model: the original. teacher: whose predictions are followed. start: weights that training begins with.
        kept: norms and biases that an earlier recovery changed. learned, held_out: training text, and text on which the
            iterate is chosen.
    """

    model: LoadedModel
    teacher: LoadedModel
    start: QuantizedSource
    kept: Mapping[str, Tensor]
    learned: TokenSet
    held_out: TokenSet


def split_text(tokens: TokenSet, minimum: int = 2) -> tuple[TokenSet, TokenSet]:
    """(learned on, held out): every sixteenth or so sequence is held out, evenly spread, at most 32.

    Raises:
        DataError: too few sequences to hold one out.
    """
    count = tokens.sequence_count
    held = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * count)))
    if count - held < minimum:
        raise DataError(
            f"--data gives {count} sequences; at least {minimum + held} are needed to train and to choose on"
        )
    chosen = torch.linspace(0, count - 1, held + 2)[1:-1].round().long()
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    return tokens.subset(rest.nonzero().flatten()), tokens.subset(chosen)


def run_end_to_end(
    material: Material, method: EndToEnd, folder: Path, progress: Callable[[int, int], None]
) -> Recovered:
    """Train; the result is the best iterate on held-out text, the start included.

    Args:
        folder: for the Trainer's checkpoints.

    Raises:
        DataError, OutputError: as `train_student`.
    """
    student, lesson = _prepare(material, method)
    seed = method.schedule.seed
    text = TrainingText(
        as_data(material.learned, material.model, seed), as_data(material.held_out, material.model, seed)
    )
    codes = None if method.codes is None else method.codes.start(student)
    start = time.monotonic()
    training = train_student(student, lesson, text, method.schedule, folder, progress=progress, before_step=codes)
    seconds = (time.monotonic() - start) / max(1, training.done)
    student.module.cpu()
    share = sum(p.numel() for _, p in student.trainable()) / material.model.layout.parameters
    return Recovered(student.stored(), student.kept(), training, method.weights.describe(), share, seconds)


def fit_steps(material: Material, method: EndToEnd, seconds: float) -> tuple[EndToEnd, float]:
    """The method with as many steps as fit, found by timing a few; and the seconds that one takes."""
    student, lesson = _prepare(material, method)
    rows = method.schedule.batch_sequences
    batch = as_data(material.learned, material.model, method.schedule.seed)[:rows]
    times: list[float] = []
    for _ in range(_TIMED_STEPS):
        begin = time.monotonic()
        lesson(**batch)["loss"].backward()
        times.append(time.monotonic() - begin)
    moved = sum(p.numel() for _, p in student.trainable())
    step = min(times) * (1 + _OPTIMIZER_SHARE) + moved * _SECONDS_PER_MOVED
    steps = max(1, int(seconds / step * (1 - _LOOKING_SHARE)))
    return replace(method, schedule=replace(method.schedule, steps=steps)), step


_OPTIMIZER_SHARE, _LOOKING_SHARE = 0.05, 0.08
_SECONDS_PER_MOVED = 2e-9


def as_data(tokens: TokenSet, model: LoadedModel, seed: int) -> SequenceData:
    """Tokens with what is asked of each, by the model's task.

    A masked language model's tokens are hidden once, by the seed. Rows without labels, of which only the original's
    predictions are learned, get 0.

    Raises:
        UserError: a masked language model without a mask token.
    """
    task: Task = model.layout.task
    if task == "masked_lm":
        tokenizer = model.require_tokenizer()
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"{model.layout.source}: the tokenizer has no mask token, so its predictions cannot be trained"
            )
        special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
        masked, targets = mask_tokens(
            tokens, mask_token_id=cast(int, tokenizer.mask_token_id), special_ids=special, seed=seed
        )
        return SequenceData(masked.input_ids, masked.attention_mask, targets)
    if task == "causal_lm":
        return SequenceData(tokens.input_ids, tokens.attention_mask, scored_targets(tokens, task))
    rows = torch.zeros(tokens.sequence_count, dtype=torch.int64) if tokens.labels is None else tokens.labels
    return SequenceData(tokens.input_ids, tokens.attention_mask, rows)


def _prepare(material: Material, method: EndToEnd) -> tuple[Student, Lesson]:
    student = build_student(material.model, material.start, material.kept, method.options)
    trains = method.options.trains
    if not trains.latent and not any(layer.log_steps is not None for layer in student.layers.values()):
        fixed = (
            "all are frozen"
            if method.options.frozen
            else "in this run's formats steps are fixed, or nothing is quantized"
        )
        raise UserError(f"--method {method.name} moves the steps of the grid, and {fixed}; use --method qat")
    if method.schedule.gradient_checkpointing:
        module = cast(Any, student.module)
        newer = getattr(module, "activation_checkpointing_enable", None)  # since transformers 5.22 or so
        (newer or module.gradient_checkpointing_enable)()
    teacher: nn.Module = copy.deepcopy(material.teacher.module) if method.weights.needs_teacher else nn.Module()
    lesson = Lesson(student.module, teacher.float().eval(), material.model.layout.task, method.weights, coarse=True)
    return student, lesson
