"""A model and texts -> a model adapted to a domain, with what it cost the rest (adaptation.json, model/)."""

import copy
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from cptquant.adaptation.held_out import reads_documents_apart
from cptquant.adaptation.methods import AdaptationMethod
from cptquant.adaptation.mix_cpt import (
    CausalTraining,
    Distillation,
    Looks,
    TrainingSettings,
    train_causal,
)
from cptquant.adaptation.sources import json_parts
from cptquant.adaptation.teacher import CachedTeacher, LiveTeacher, build_cache, round_to_8_bits_
from cptquant.core.adaptation import AdaptationReport, AdaptationRequest, TeacherRecord
from cptquant.core.artifact import digest_file, digest_json, output_error, write_whole
from cptquant.core.errors import DataError, ModelError, OutputError, UserError
from cptquant.core.evaluation import Measurement
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.written_files import digest_folder, list_damage
from cptquant.evaluation.evaluate import evaluate_models
from cptquant.evaluation.tasks import QuestionSet, read_questions, score_questions, task_measurements
from cptquant.models.load import LoadedModel, load_any, load_model, quiet_transformers, read_layout
from cptquant.models.processes import check_launcher, in_turn, is_first, tell
from cptquant.reports.adaptation import write_adaptation_report
from cptquant.stages.adapt_align import AlignmentJob, align_stage
from cptquant.stages.adapt_check import check_adaptation, needs_teacher
from cptquant.stages.adapt_text import AdaptationText, read_adaptation_text

RECORD, MODEL, REPORT = "adaptation.json", "model", "report.html"
_MARK = "adaptation-of.json"
"""Which model's run the folder holds, from its beginning on."""
_COMPARED = ("nll_nats_per_token", "nll_increase_nats_per_token", "perplexity", "bits_per_byte", "kl_nats_per_token")


@dataclass
class _Job:
    """An adaptation on its way."""

    folder: Path
    request: AdaptationRequest
    method: AdaptationMethod
    model: LoadedModel
    text: AdaptationText
    questions: tuple[QuestionSet, ...]
    progress: Progress

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Everything the result depends on: files by what is in them, not by their names alone."""
        request, text = self.request, self.text
        template = None if request.chat_template is None else Path(request.chat_template).expanduser()
        teacher = (
            ""
            if request.teacher is None
            else read_layout(request.teacher, trust_remote_code=request.trust_remote_code).source_digest
        )
        aligned = (text.instructions if request.align_instructions else None,
                   text.preferences if request.align_preferences else None)  # fmt: skip
        samples = hashlib.sha256()
        for part in json_parts(records or () for records in aligned):
            samples.update(part.encode())
        return {
            "request": request.model_dump_json(),
            "teacher": teacher,
            "chat template": digest_file(template) if template is not None and template.is_file() else "",
            "questions": digest_json([asdict(each) for each in self.questions]),
            "samples": samples.hexdigest(),
            "model": self.model.layout.source_digest,
            "mixture": self.text.mixture.digest,
            **{f"held-out {name}": tokens.digest for name, tokens in self.text.held_out.items()},
        }

    @property
    def alignment(self) -> AlignmentJob:
        """The part of it that is stage 2."""
        tokenizer, text = self.model.require_tokenizer(), self.text
        return AlignmentJob(self.request, tokenizer, text.instructions, text.preferences, self.folder, self.work)

    @property
    def work(self) -> Path:
        """Checkpoints of this request."""
        return self.folder / "work" / digest_json(self.inputs)[:16]


def adapt_stage(
    request: AdaptationRequest, folder: Path, progress: Progress = ignore_progress
) -> AdaptationReport | None:
    """Adapt a causal language model; goes on where a killed call of the same request stopped.

    Returns:
        None in every process but the first, where several train together.

    Raises:
        UserError: anything the caller can change, before compute is spent where that can be known; or training that
            ended in a number that is none.
    """
    watch, progress = Stopwatch(), progress if is_first() else ignore_progress
    method = check_adaptation(request)
    check_launcher("cptquant adapt", "the model is read and written whole (why: docs/adaptation.md, Limits)")
    _open_folder(folder, request)
    model = load_model(request.model, trust_remote_code=request.trust_remote_code)
    _check_model(model, request)
    questions = tuple(read_questions(spec, request.task_limit) for spec in request.tasks)
    asked = [" ".join(answer) for each in questions for question in each.questions for answer in question.answers]
    if is_first():
        write_whole(folder / _MARK, json.dumps({"model": request.model}).encode())
    text = in_turn(lambda: read_adaptation_text(model, request, method, folder / "work/text", asked))
    job = _Job(folder, request, method, model, text, questions, progress)
    finished = tell(_finished(job) if is_first() else None)
    if finished is not None:
        if is_first():
            shutil.rmtree(folder / "work", ignore_errors=True)
        return finished if is_first() else None
    for note in job.text.notes:
        progress(note, 1, 1)
    distillation, record = _teacher(job)
    student = load_model(request.model, trust_remote_code=request.trust_remote_code).module
    training = train_causal(
        student.float().requires_grad_(True), job.text.mixture, job.work / "training", training_settings(request),
        distillation=distillation, looks=Looks(job.text.held_out), progress=progress,
    )  # fmt: skip
    if training.stopped:
        raise UserError(_diverged(training, job))
    _write_model(job, student)
    measured = _measured_once(job, "adapted") if is_first() else []
    template, alignment = align_stage(job.alignment, student, progress)
    if alignment:
        _write_model(job, student)
        measured += _measure(job, "aligned") if is_first() else []
    if not is_first():
        return None
    options = {**_options(job, training), **({"chat template": template} if alignment else {})}
    report = _report(job, training, record, watch).model_copy(
        update={
            "measurements": tuple(measured),
            "alignment": alignment,
            "options": options,
            "files": digest_folder(folder / MODEL),
        }
    )
    report.save(folder / RECORD)
    write_adaptation_report(folder / REPORT, report)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return report


def training_settings(request: AdaptationRequest) -> TrainingSettings:
    """The part of a request that stage 1 needs."""
    return TrainingSettings(
        batch_windows=request.batch, learning_rate=request.learning_rate, schedule=request.schedule,
        warm_up=request.warm_up, anneal=request.anneal, weight_decay=request.weight_decay,
        micro_batch=request.micro_batch, looks=request.looks, bf16=request.bf16,
        gradient_checkpointing=request.gradient_checkpointing, seed=request.seed,
    )  # fmt: skip


def _open_folder(folder: Path, request: AdaptationRequest) -> None:
    mark = folder / _MARK
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output {folder} is a file; choose a folder")
    if mark.is_file() and not _only_text(folder):
        try:
            before = json.loads(mark.read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError):
            before = request.model
        if before != request.model:
            raise OutputError(
                f"--output {folder} holds an adaptation of {before!r}, not of {request.model!r}; choose another folder "
                "or remove it"
            )
    elif not mark.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"--output {folder} is not empty and holds no adaptation; choose an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    if not os.access(folder, os.W_OK):
        raise OutputError(f"--output {folder} is not writable; choose another folder")


def _only_text(folder: Path) -> bool:
    """Whether nothing stands there but the tokens of a call that was refused: any model may have the folder."""
    inside = {path.name for path in folder.iterdir()} - {_MARK}
    return inside <= {"work"} and all(path.name == "text" for path in folder.glob("work/*"))


def _check_model(model: LoadedModel, request: AdaptationRequest) -> None:
    layout = model.layout
    if layout.task != "causal_lm":
        raise ModelError(f"{request.model} is for {layout.task}; cptquant adapt trains causal language models")
    if layout.max_positions is not None and request.window > layout.max_positions:
        raise DataError(
            f"--window {request.window} is longer than the {layout.max_positions} positions of {request.model}; give "
            "at most as many"
        )
    if request.teacher_cache > layout.vocabulary_size:
        raise UserError(
            f"--teacher-cache {request.teacher_cache} is more than the {layout.vocabulary_size:,} tokens of the "
            "vocabulary; give e.g. 64"
        )
    if request.keep_documents_apart and not reads_documents_apart(model.module):
        raise ModelError(
            f"{request.model} ({layout.architecture}) attends across documents whatever its position_ids say; leave "
            "out --keep-documents-apart"
        )


def _finished(job: _Job) -> AdaptationReport | None:
    """What stands already, if it was made from the same inputs and its model is whole."""
    path = job.folder / RECORD
    if not path.is_file():
        return None
    try:
        found = AdaptationReport.load(path)
    except UserError:
        return None
    whole = found.files and not list_damage(job.folder / MODEL, found.files, {})
    return found if whole and found.inputs == job.inputs else None


def _teacher(job: _Job) -> tuple[Distillation | None, TeacherRecord | None]:
    request = job.request
    if not needs_teacher(request, job.method):
        return None, None
    shape = job.method.shape(request.distil_weight, request.temperature)
    if not request.teacher_cache:
        teacher = LiveTeacher(_teacher_model(job).module, "live, 8 bits" if request.teacher_bits == 8 else "live")
        return Distillation(teacher, shape), TeacherRecord(kind=teacher.kind, seconds=0, share=0)
    folder = job.folder / "teacher"
    if is_first():
        loaded = _teacher_model(job)
        build_cache(
            loaded.module, job.text.mixture, shape, request.teacher_cache, folder, progress=job.progress,
            teacher_digest=f"{loaded.layout.source_digest} {request.teacher_bits} bits",
        )  # fmt: skip
        del loaded  # the cache replaces it
    tell(True)
    cache = CachedTeacher(folder, job.text.mixture)
    record = TeacherRecord(
        kind=cache.kind,
        seconds=cache.seconds,
        share=0,
        discarded_mass=cache.discarded_mass,
        cache_bytes=cache.size_bytes,
    )
    return Distillation(cache, shape), record


def _teacher_model(job: _Job) -> LoadedModel:
    request, layout = job.request, job.model.layout
    source = request.teacher or request.model
    teacher = load_model(source, trust_remote_code=request.trust_remote_code)
    if teacher.layout.task != layout.task:
        raise ModelError(f"--teacher {source} is for {teacher.layout.task}, {request.model} is for {layout.task}")
    if teacher.layout.vocabulary_size != layout.vocabulary_size:
        raise ModelError(
            f"--teacher {source} knows {teacher.layout.vocabulary_size:,} tokens, {request.model} "
            f"{layout.vocabulary_size:,}; give a teacher with the same tokenizer"
        )
    own, others = job.model.require_tokenizer().get_vocab(), teacher.require_tokenizer().get_vocab()
    if own != others:
        raise ModelError(
            f"--teacher {source} numbers its tokens in another way than {request.model}; give a teacher with the same "
            "tokenizer"
        )
    if not torch.cuda.is_available():
        teacher.module.float()
    if request.teacher_bits == 8:
        round_to_8_bits_(teacher.module, teacher.layout)
    return teacher


def _diverged(training: CausalTraining, job: _Job) -> str:
    kept = job.work / "training" / f"checkpoint-{training.done}"
    where = f"the weights of step {training.done} are kept in {kept}" if training.done else "no checkpoint was reached"
    return f"{training.stopped}; {where}; lower --learning-rate {job.request.learning_rate:g} and run again"


def _write_model(job: _Job, student: PreTrainedModel) -> None:
    """model/: the weights in their original dtype, with the tokenizer; the student stays as it is."""
    if not is_first():
        return
    target, partial = job.folder / MODEL, job.folder / f"{MODEL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    written: Any = copy.deepcopy(student).requires_grad_(False).eval()
    try:
        with quiet_transformers():
            written.to(device="cpu", dtype=getattr(torch, job.model.layout.source_dtype)).save_pretrained(partial)
            job.model.require_tokenizer().save_pretrained(str(partial))
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise output_error(target, error) from None


def _report(job: _Job, training: CausalTraining, teacher: TeacherRecord | None, watch: Stopwatch) -> AdaptationReport:
    request, seconds = job.request, training.seconds
    if teacher is not None:
        live = teacher.discarded_mass is None
        seconds += 0 if live else teacher.seconds
        spent = training.teacher_seconds if live else teacher.seconds
        teacher = teacher.model_copy(update={"seconds": spent, "share": spent / seconds if seconds else 0.0})
    return AdaptationReport(
        request=request,
        sources=job.text.sources,
        steps=training.done,
        tokens=training.done * request.batch * request.window,
        looks=tuple(training.looks),
        teacher=teacher,
        notes=job.text.notes,
        training_seconds=seconds,
        inputs=job.inputs,
        provenance=watch.provenance(seed=request.seed, threads=torch.get_num_threads()),
    )


def _measured_once(job: _Job, subject: str) -> list[Measurement]:
    """What a killed call measured of the same model, else measured now and kept for the next."""
    path = job.work / f"measured-{subject}.json"
    model = digest_json(dict(digest_folder(job.folder / MODEL)))
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["model"] == model:
            return [Measurement.model_validate_json(json.dumps(each)) for each in kept["measurements"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _measure(job, subject)
    rows = [json.loads(each.model_dump_json()) for each in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"model": model, "measurements": rows}).encode())
    return found


def _measure(job: _Job, subject: str) -> list[Measurement]:
    """Held-out texts and questions, by the ruler of every other verb; the model is read back from disk.

    The original is measured beside it, and told once.
    """
    changed = load_any(job.folder / MODEL, trust_remote_code=job.request.trust_remote_code)
    found: list[Measurement] = []
    for name, tokens in job.text.held_out.items():
        measured = evaluate_models(job.model, changed, tokens, subject=subject, progress=job.progress)
        kept = [each for each in measured if each.name in _COMPARED]
        found += [each.model_copy(update={"name": f"{name}_{each.name}"}) for each in kept]
    tokenizer = job.model.require_tokenizer()
    models = {"original": copy.deepcopy(job.model.module).float(), subject: changed.module.float()}
    for done, questions in enumerate(job.questions, 1):
        scores = {who: score_questions(module, tokenizer, questions) for who, module in models.items()}
        found += task_measurements(questions.name, scores)
        job.progress("tasks", done, len(job.questions))
    return [each for each in found if subject == "adapted" or each.subject == subject]


def _options(job: _Job, training: CausalTraining) -> dict[str, str]:
    request, shape = job.request, job.method.shape(job.request.distil_weight, job.request.temperature)
    anneal = f", then a line to a tenth over the last {request.anneal:.0%}" if request.schedule == "constant" else ""
    teacher = "none" if not shape.weight else (request.teacher or "the model itself, frozen")
    return {
        "method": f"{request.method}: {job.method.sentence}",
        "loss": f"{1 - shape.weight:g} cross entropy"
        + (f" + {shape.weight:g} T² KL, T = {shape.temperature:g}" if shape.weight else ""),
        "target": "none" if not shape.weight else "teacher's, gold and maximum swapped" if shape.swap else "teacher's",
        "teacher": teacher,
        "steps": f"{training.steps} of {request.batch} windows of {request.window} tokens",
        "rate": f"{request.learning_rate:g}, {request.schedule}{anneal}; warm-up {request.warm_up:.0%}",
        "documents": "kept apart" if request.keep_documents_apart else "follow each other in a window",
        "overlap": f"documents with {request.overlap:.0%} of their 13-word sequences in evaluation text left out",
    }
