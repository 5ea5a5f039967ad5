"""Stage 2 of an adaptation: which samples, what was done with them, and what it changed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cptquant.adaptation.alignment_training import AlignmentSettings, align_
from cptquant.adaptation.format_alignment import (
    Scored,
    Selection,
    load_selection,
    save_selection,
    score_samples,
    select_samples,
    set_template_,
    write_selection,
)
from cptquant.adaptation.sources import Records
from cptquant.core.adaptation import AdaptationRequest, AlignmentRecord
from cptquant.core.progress import Progress
from cptquant.models.processes import in_turn, is_first

Kind = Literal["instructions", "preferences"]
_LONGEST = 512


@dataclass(frozen=True)
class AlignmentJob:
    """Attributes: tokenizer: gets the template. instructions, preferences: all there are. folder: of the run.
    work: for what a killed call leaves to the next, of this request alone."""

    request: AdaptationRequest
    tokenizer: PreTrainedTokenizerBase
    instructions: Records | None
    preferences: Records | None
    folder: Path
    work: Path


def align_stage(
    job: AlignmentJob, student: PreTrainedModel, progress: Progress
) -> tuple[str, tuple[AlignmentRecord, ...]]:
    """SFT on instructions, then DPO on preferences, as far as they were asked for; the student is changed.

    Killed, it goes on: selections and finished records stand, trainings begin at their last whole checkpoint.

    Returns:
        Which template, and a record for each training.

    Raises:
        UserError: a template that fails, too few samples, a loss that is no number.
    """
    wanted: list[tuple[Kind, int, Records | None]] = [
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
    job: AlignmentJob, student: PreTrainedModel, kind: Kind, wanted: int, records: Records, progress: Progress
) -> AlignmentRecord:
    request, work = job.request, job.work / f"align-{kind}"
    longest = min(_LONGEST, student.config.get_text_config().max_position_embeddings or _LONGEST)
    settings = AlignmentSettings(
        learning_rate=request.align_rate, epochs=request.align_epochs, batch=request.batch, longest=longest,
        bf16=bool(request.bf16), gradient_checkpointing=request.gradient_checkpointing, seed=request.seed,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)

    def select() -> Selection:
        path = work / "selection.json"
        found = load_selection(path, records)
        if found is None:
            found = select_samples(student, job.tokenizer, records, wanted, longest=longest, seed=request.seed)
            save_selection(path, found)
        return found

    selection = in_turn(select)
    file = f"alignment-{kind}.jsonl"
    if is_first():
        write_selection(job.folder / file, selection)
    student.requires_grad_(True)
    samples = [selection.records[each.index] for each in selection.chosen]
    trained = align_(student, job.tokenizer, samples, settings, work / "training", progress)
    progress(f"align on {kind}", 1, 1)

    def mean_now(samples: Sequence[Scored]) -> float | None:
        indices = [each.index for each in samples]
        return mean_score(score_samples(student, job.tokenizer, selection.records, indices, longest))

    return AlignmentRecord(
        kind=kind, candidates=selection.candidates, dropped=selection.dropped, chosen=len(selection.chosen),
        steps=trained.steps, seconds=trained.seconds, indices_file=file,
        score_before=mean_score(selection.chosen) or 0.0, score_after=mean_now(selection.chosen) or 0.0,
        held_out_before=mean_score(selection.held_out), held_out_after=mean_now(selection.held_out),
        held_out_count=len(selection.held_out), training_loss=trained.loss,
    )  # fmt: skip


def mean_score(samples: Sequence[Scored]) -> float | None:
    """Mean format score; None of none."""
    return statistics.fmean(each.score for each in samples) if samples else None
