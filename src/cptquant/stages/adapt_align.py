"""Stage 2 of an adaptation: which samples, what was done with them, and what it changed."""

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cptquant.adaptation.format_alignment import (
    AlignmentSettings,
    Scored,
    align_,
    score_samples,
    select_samples,
    set_template_,
    write_selection,
)
from cptquant.adaptation.sources import Records
from cptquant.core.adaptation import AdaptationRequest, AlignmentRecord
from cptquant.core.progress import Progress
from cptquant.models.processes import is_first

_LONGEST = 512


@dataclass(frozen=True)
class AlignmentJob:
    """Attributes: tokenizer: gets the template. instructions, preferences: all there are. folder: of the run."""

    request: AdaptationRequest
    tokenizer: PreTrainedTokenizerBase
    instructions: Records | None
    preferences: Records | None
    folder: Path


def align_stage(
    job: AlignmentJob, student: PreTrainedModel, progress: Progress
) -> tuple[str, tuple[AlignmentRecord, ...]]:
    """SFT on instructions, then DPO on preferences, as far as they were asked for; the student is changed.

    Returns:
        Which template, and a record for each training.

    Raises:
        UserError: a template that fails, too few samples, a loss that is no number.
    """
    wanted: list[tuple[Literal["instructions", "preferences"], int, Records | None]] = [
        ("instructions", job.request.align_instructions, job.instructions),
        ("preferences", job.request.align_preferences, job.preferences),
    ]
    if not any(count for _, count, _ in wanted):
        return "", ()
    template = set_template_(job.tokenizer, job.request.chat_template)
    return template, tuple(
        _align(job, student, kind, count, records, progress)
        for kind, count, records in wanted if count and records is not None
    )  # fmt: skip


def _align(
    job: AlignmentJob, student: PreTrainedModel, kind: Literal["instructions", "preferences"], wanted: int,
    every: Records, progress: Progress,
) -> AlignmentRecord:  # fmt: skip
    request = job.request
    longest = min(_LONGEST, student.config.get_text_config().max_position_embeddings or _LONGEST)
    settings = AlignmentSettings(
        learning_rate=request.align_rate, epochs=request.align_epochs, batch=request.batch, longest=longest,
        bf16=bool(request.bf16), gradient_checkpointing=request.gradient_checkpointing, seed=request.seed,
    )  # fmt: skip
    selection = select_samples(student, job.tokenizer, every, wanted, longest=longest, seed=request.seed)
    records = selection.records
    file = f"alignment-{kind}.jsonl"
    if is_first():
        write_selection(job.folder / file, selection)
    folder, began = job.folder / "work" / f"align-{kind}", time.perf_counter()
    student.requires_grad_(True)
    steps, loss = align_(
        student, job.tokenizer, [records[each.index] for each in selection.chosen], settings, folder
    )  # fmt: skip
    seconds = time.perf_counter() - began
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"align on {kind}", 1, 1)

    def mean_now(samples: Sequence[Scored]) -> float | None:
        indices = [each.index for each in samples]
        return mean_score(score_samples(student, job.tokenizer, records, indices, longest))

    return AlignmentRecord(
        kind=kind, candidates=selection.candidates, dropped=selection.dropped, chosen=len(selection.chosen),
        steps=steps, seconds=seconds, indices_file=file, score_before=mean_score(selection.chosen) or 0.0,
        score_after=mean_now(selection.chosen) or 0.0, held_out_before=mean_score(selection.held_out),
        held_out_after=mean_now(selection.held_out), held_out_count=len(selection.held_out), training_loss=loss,
    )  # fmt: skip


def mean_score(samples: Sequence[Scored]) -> float | None:
    """Mean format score; None of none."""
    return statistics.fmean(each.score for each in samples) if samples else None
