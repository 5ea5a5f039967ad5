"""A quantized run -> weights trained further, in a run folder of their own: methods that train the model as a whole."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

from cptquant.core.artifact import digest_json, write_whole
from cptquant.core.errors import DataError, UserError
from cptquant.core.layout import ModelLayout, Task
from cptquant.core.recovery import LOSSES, RecoveryLook, RecoveryRecord, RecoveryRequest
from cptquant.models.arithmetic import describe_arithmetic
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.processes import check_launcher, process_count, tell
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.shards import ShardFolder
from cptquant.recovery.end_to_end import EndToEnd, Material, Recovered, fit_steps, run_end_to_end, split_text
from cptquant.recovery.methods import BLOCK_BY_BLOCK, END_TO_END, METHODS, block_by_block, end_to_end
from cptquant.recovery.student import frozen_sites
from cptquant.stages.check import check_seed
from cptquant.stages.own_text import with_own_text
from cptquant.stages.quantize import Variant, block_label
from cptquant.stages.recover_blocks import recover_blocks_stage
from cptquant.stages.recovery_pieces import (
    RECORD,
    Learned,
    Parent,
    block_records,
    changed_share,
    lost_norms,
    pieces_of,
    write_manifest,
)
from cptquant.stages.run import Run

_SEQUENCES, _OWN_TEXT, _BATCH = 512, 512, 8
_MOST_STEPS = 10_000_000


def check_request(request: RecoveryRequest, parent: Path, output: Path) -> None:
    """Refuse, before anything is loaded, flags that say nothing sensible.

    Raises:
        UserError: the first thing that is wrong.
    """
    if parent.resolve() == output.resolve():
        raise UserError(f"--output {output} is the run to be trained; choose another folder: a parent is never changed")
    if request.method not in METHODS:
        raise UserError(f"--method {request.method!r} is unknown; choose one of: {', '.join(METHODS)}")
    if request.loss not in LOSSES:
        raise UserError(f"--loss {request.loss!r} is unknown; choose one of: {', '.join(LOSSES)}")
    for name in ("latent_rate", "step_rate", "norm_rate", "states"):
        value = getattr(request, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; give a number from 0 up")
    if request.steps is not None and request.seconds is not None:
        raise UserError("--steps and --time were both given; --time chooses the steps")
    if request.teacher is not None and request.loss == "ce" and not request.states:
        raise UserError(
            "--teacher has no use with --loss ce, which learns the text alone; leave it out, or add --states"
        )
    batch, processes = request.batch_sequences or _BATCH, process_count()
    if batch % processes:
        raise UserError(f"--batch-sequences {batch} cannot be shared by {processes} processes; give a multiple of them")
    check_seed(request.seed)
    if request.data is not None and not Path(request.data).exists():
        raise DataError(f"--data {request.data!r} does not exist; give a .txt, a .jsonl or a saved `datasets` folder")
    if request.method in END_TO_END:
        end_to_end(request)
        return
    block_by_block(request)
    if process_count() > 1:
        raise UserError(
            f"--method {request.method} trains block by block in one process; start it without a launcher, or take "
            f"one of: {', '.join(END_TO_END)}"
        )


def recover_stage(run: Run, parent: Parent, request: RecoveryRequest) -> Variant:
    """recovery.json, manifest.json and the trained pieces under work/; goes on where a killed call stopped.

    Raises:
        UserError: the method, its flags, the teacher or the text do not fit.
    """
    if request.method in BLOCK_BY_BLOCK:
        return recover_blocks_stage(run, parent, request, training_text(run, request))
    check_launcher("cptquant recover", "latent weights would be spread over processes")
    material = _material(run, parent, request)
    method = end_to_end(request)
    inputs = {
        "parent": parent.shards.folder.name,
        "plan": digest_json(parent.plan.formats),
        "layout": parent.layout.digest(),
        "request": request.model_dump_json(),
        "method": repr(method),
        "tokens": material.learned.digest,
        "held out": material.held_out.digest,
        "teacher": material.teacher.layout.source_digest,
        "arithmetic": describe_arithmetic(coarse=True),
    }
    shards = pieces_of(run, parent.layout, parent.plan, digest_json(inputs)[:16])

    told: list[bool] = []

    def make() -> RecoveryRecord:
        folder = shards.folder.with_name(shards.folder.name + "-training")
        method_now = _with_time(run, material, method, request, folder)
        told.append(True)
        tell((method_now, folder))
        found = run_end_to_end(
            material, method_now, folder, lambda done, total: run.progress(f"train ({request.method})", done, total)
        )
        if found.training.stopped:
            run.progress(found.training.stopped, 1, 1)
        if found.training.best_step == 0:
            run.progress("no step was better on held-out training text than the start, which is kept", 1, 1)
        _keep(run, parent, found, shards)
        record = _describe(run, parent, request, method_now, material, found)
        shutil.rmtree(folder, ignore_errors=True)
        changed = changed_share(parent, shards)
        return record.model_copy(
            update={"pieces": shards.folder.name, "norms": shards.kept_labels, "codes_changed": changed}
        )

    labels = {block_label(index) for index in range(parent.layout.block_count)} | {block_label(None)}
    if not shards.labels.issuperset(labels):
        (run.folder / RECORD).unlink(missing_ok=True)
    tell(True)  # the text that the model writes stands now
    record = run.stage(RECORD, RecoveryRecord, inputs, make, damage=lambda found: lost_norms(shards, found))
    if not told:
        tell(None)
    write_manifest(run, parent, shards, record)
    return Variant(parent.plan, shards)


def guard_measure(request: RecoveryRequest, task: Task) -> str | None:
    """What the guard compares: the distance to the original, but the loss of the text where that alone was trained."""
    if request.loss != "ce":
        return None
    return "nll_nats_per_example" if task == "sequence_classification" else "nll_nats_per_token"


def follow_training(run: Run, parent: Parent, request: RecoveryRequest) -> None:
    """What processes beside the first do: train along where the first one says so; they write nothing."""
    check_launcher("cptquant recover", "latent weights would be spread over processes")
    tell(None)
    task = tell(None)
    if task is not None:
        method, folder = cast(tuple[EndToEnd, Path], task)
        run_end_to_end(_material(run, parent, request), method, folder, lambda done, total: None)


def own_text_for(request: RecoveryRequest, task: Task) -> int:
    """Windows that the model writes itself beside the given text.

    By default a causal language model writes some where its own predictions are what is learned, from the calibration
    text alone: some hundred windows are soon known by heart. Where a person gives text, that is learned.
    """
    if request.own_text is not None:
        return request.own_text
    follows = request.loss == "kl" and request.data is None and request.method in END_TO_END
    return _OWN_TEXT if follows and task == "causal_lm" else 0


def training_text(run: Run, request: RecoveryRequest) -> TokenSet:
    """Windows of the text that was asked for, or of the run's calibration text.

    Raises:
        DataError: unusable text.
    """
    return load_tokens(
        run.model,
        run.settings.calibration if request.data is None else request.data,
        "training",
        sequences=_SEQUENCES if request.sequences is None else request.sequences,
        length=run.settings.sequence_length,
        seed=request.seed,
    )


def _material(run: Run, parent: Parent, request: RecoveryRequest) -> Material:
    model = run.model
    teacher = model if request.teacher is None else _teacher(run, request.teacher)
    text = training_text(run, request)
    learned, held_out = split_text(text)
    learned = with_own_text(run, learned, own_text_for(request, run.model.layout.task), request.seed)
    batch = request.batch_sequences or _BATCH
    if learned.sequence_count < batch:
        raise UserError(
            f"--batch-sequences {batch} is more than the {learned.sequence_count} sequences to learn from; give fewer, "
            "or more text with --data"
        )
    weights = end_to_end(request).weights
    if weights.states > 0 and _states(teacher.layout) != _states(model.layout):
        raise UserError(
            f"--teacher {request.teacher} has {teacher.layout.block_count} blocks of width "
            f"{teacher.layout.hidden_size}, the run's model {model.layout.block_count} of {model.layout.hidden_size}: "
            "hidden states do not compare; add --states 0"
        )
    if weights.ce > 0 and (
        model.layout.task == "encoder" or (_needs_labels(model.layout.task) and text.labels is None)
    ):
        raise UserError(
            f"--loss {request.loss} needs tokens or labels to predict, and there are none "
            f"({model.layout.task}, {text.description}); use --loss kl, or give labelled text with --data"
        )
    return Material(model, teacher, parent.shards, parent.shards.kept(), learned, held_out)


def _states(layout: ModelLayout) -> tuple[int, int]:
    return layout.block_count, layout.hidden_size


def _needs_labels(task: Task) -> bool:
    return task == "sequence_classification"


def _teacher(run: Run, source: str) -> LoadedModel:
    teacher, layout = load_model(source, trust_remote_code=run.settings.trust_remote_code), run.model.layout
    if teacher.layout.task != layout.task:
        raise UserError(f"--teacher {source} is for {teacher.layout.task}, the run's model is for {layout.task}")
    if teacher.layout.vocabulary_size != layout.vocabulary_size:
        raise UserError(
            f"--teacher {source} knows {teacher.layout.vocabulary_size:,} tokens, the run's model "
            f"{layout.vocabulary_size:,}; give a teacher with the same tokenizer"
        )
    return teacher


def _with_time(run: Run, material: Material, method: EndToEnd, request: RecoveryRequest, folder: Path) -> EndToEnd:
    """With --time, as many steps as fit; a call that goes on from a killed one takes the number found before."""
    if request.seconds is None:
        return method
    path = folder / "steps.txt"
    found = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if found.isdecimal() and 0 < int(found) <= _MOST_STEPS:
        return replace(method, schedule=replace(method.schedule, steps=int(found)))
    fitted, step = fit_steps(material, method, request.seconds)
    run.progress(f"--time: {fitted.schedule.steps} steps of {step:.2g} s fit into {request.seconds:.0f} s", 1, 1)
    write_whole(path, str(fitted.schedule.steps).encode())
    return fitted


def _keep(run: Run, parent: Parent, found: Recovered, shards: ShardFolder) -> None:
    """Write all pieces."""
    learned = Learned(found.objective, found.training.looks[0].held_out_loss, found.training.best_loss)
    for index in [*range(parent.layout.block_count), None]:
        names = [site.name for site in parent.layout.sites if site.block_index == index]
        stored = {name: found.weights.get(name) or parent.shards.quantized(name) for name in names}
        trained = {name: found.weights[name] for name in names if name in found.weights}
        records = block_records(run, parent, index, trained, learned)
        shards.save(block_label(index), {k: v for k, v in stored.items() if v is not None}, records)
    others = {**parent.shards.kept(), **found.kept}
    if others:
        shards.save_kept(others)


def _describe(
    run: Run, parent: Parent, request: RecoveryRequest, method: EndToEnd, material: Material, found: Recovered
) -> RecoveryRecord:
    training, schedule = found.training, method.schedule
    options = {
        "method": request.method,
        "moves": _moves(method, parent.layout, request),
        "loss": found.objective,
        "steps": f"{schedule.steps} of {schedule.batch_sequences} sequences, {training.done} done",
        "rates": f"latent weights {schedule.latent_rate:g} of a step of the grid, steps {schedule.step_rate:g} "
        f"relative, norms and biases {schedule.other_rate:g}; warm-up {schedule.warm_up:.0%}, then cosine to a tenth",
        "learned on": material.learned.description,
        "chosen on": f"{material.held_out.sequence_count} sequences held out of it",
        "teacher": material.teacher.layout.source if method.weights.needs_teacher else "none",
        "surrogate": repr(method.options.surrogate) if method.options.trains.latent else "none",
        "activations": "16 bits" if request.activation_bits is None else f"{request.activation_bits} bits a token",
        "arithmetic": describe_arithmetic(coarse=True),
    }
    return RecoveryRecord(
        parent=str(parent.run.folder),
        parent_name=parent.name,
        parent_pieces=parent.shards.folder.name,
        parent_norms=parent.shards.kept_labels,
        pieces="",
        request=request,
        options=options,
        objective=found.objective,
        looks=tuple(
            RecoveryLook(
                step=look.step,
                training_loss=None if math.isnan(look.training_loss) else look.training_loss,
                held_out_loss=look.held_out_loss,
            )
            for look in training.looks
        ),
        best_step=training.best_step,
        stopped=training.stopped,
        moved_share=found.moved_share,
        step_seconds=found.step_seconds,
    )


def _moves(method: EndToEnd, layout: ModelLayout, request: RecoveryRequest) -> str:
    trains = method.options.trains
    parts = ["latent weights"] if trains.latent else (["codes, a few at a time"] if method.codes else [])
    parts += ["multipliers of steps"] if trains.multipliers else (["steps and zero points"] if trains.steps else [])
    parts += ["norms and biases"] if method.options.others else []
    frozen = len(frozen_sites(layout, request.freeze))
    return ", ".join(parts) + (f"; {frozen} sites frozen" if frozen else "")
