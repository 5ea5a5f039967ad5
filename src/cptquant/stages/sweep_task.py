"""What one worker does: make a base model, or one run of the grid. All it finds stands on disk before it returns.

Tasks name files, not objects, so the same task runs in this process, in a worker of Ray on this machine or on another
that sees the same folders, and, where it has several GPUs, in as many processes under torchrun.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cptquant.adaptation.ladder import Rung, is_whole, load_trainable, new_model, save_rung
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.token_files import open_source
from cptquant.adaptation.trunk import Trunk, TrunkSettings, run_trunk
from cptquant.core.artifact import Frozen
from cptquant.core.errors import ArtifactError
from cptquant.core.sweep import EvaluationPoint
from cptquant.core.sweep_record import LossRecord, PointRecord
from cptquant.models.estimates import cluster_by_document, estimate_ratio
from cptquant.models.losses import scored_targets, sequence_nll
from cptquant.models.processes import is_first, process_count
from cptquant.models.text import TokenSet
from cptquant.stages.sweep_quantize import quantize_and_judge

_EVALUATION_BATCH = 16


class TrainingSpec(Frozen):
    """A mixture and how it is learned.

    Attributes:
        sources: corpus -> folder of its tokens (`token_files`). shares: corpus -> share of all tokens.
        windows_of: tokens of a window. tokens: of the whole mixture. points: where it is evaluated.
    """

    sources: dict[str, str]
    shares: dict[str, float]
    window: int
    batch: int
    tokens: int
    max_epochs: float
    points: tuple[EvaluationPoint, ...]
    peak_rate: float
    warm_up: int
    weight_decay: float
    seed: int
    save_steps: int = 0


class SweepTask(Frozen):
    """One task.

    Attributes:
        kind: "base": draw a model anew, train it and save it under `model`; "run": continue `model`.
        folder: for the task's own files. model: folder of the base model; model_key: digest of all it depends on.
        judged: corpus -> file of its held-out windows (`save_windows`).
        rung: JSON of a `Rung`, of base tasks. family: whose tokenizer a base model gets.
        training: None for a base task whose model exists already.
        quantize, group: code bits and columns a scale, after the first annealed point and the last.
        keep: folder that gets the model of the last point; "" where it is thrown away.
    """

    kind: Literal["base", "run"]
    id: str
    folder: str
    model: str
    model_key: str
    judged: dict[str, str]
    training: TrainingSpec | None = None
    rung: dict[str, str | int | None] | None = None
    family: str = ""
    quantize: tuple[int, ...] = ()
    group: int = 64
    keep: str = ""
    threads: int = 1
    gpus: int = 0


def carry_out(task: SweepTask) -> None:
    """Do what is left of a task; what it finds stands in its folder.

    Raises:
        UserError: a text or a model cannot be used. Diverged: the loss is no number.
    """
    if task.gpus > 1 and process_count() == 1:
        _launch(task)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        if task.kind == "base":
            _make_base(task)
        else:
            _make_run(task)
    finally:
        torch.set_num_threads(before)


def is_done(task: SweepTask) -> bool:
    """Whether nothing is left to do."""
    folder = Path(task.folder)
    if task.kind == "base":
        return _has_model(task) and _stands(folder, 0)
    assert task.training is not None
    return all(_stands(folder, index) for index in range(len(task.training.points)))


def _has_model(task: SweepTask) -> bool:
    """Whether a base model stands: a person's own, or one that was written here and is whole."""
    return task.training is None or is_whole(Path(task.model))


def point_path(folder: Path, index: int) -> Path:
    """File of an evaluation."""
    return folder / f"point-{index}.json"


def torchrun_command(task_file: Path, processes: int) -> list[str]:
    """How several processes of one task are started."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "cptquant.stages.sweep_task", str(task_file),
    ]  # fmt: skip


def _launch(task: SweepTask) -> None:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.json"
    path.write_text(task.model_dump_json(), encoding="utf-8")
    done = subprocess.run(torchrun_command(path, task.gpus), capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise RuntimeError(f"torchrun ended with {done.returncode}: {' / '.join(last)[:600]}")


def _stands(folder: Path, index: int) -> bool:
    try:
        PointRecord.load(point_path(folder, index))
    except ArtifactError:
        return False
    return True


def _device(task: SweepTask) -> torch.device:
    if task.gpus == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, on a device; transformers declares `to` in a way no checker can follow."""
    return cast(Any, model).to(device)


def _make_base(task: SweepTask) -> None:
    """The base model, and its losses: what a run begins from (D = 0)."""
    folder = Path(task.folder)
    held = {name: load_windows(Path(path)) for name, path in task.judged.items()}

    def judge(model: PreTrainedModel, step_seconds: float | None) -> None:
        record = PointRecord(
            tokens=0, branch_step=0, last_step=0, losses=judge_on(model, held), distinct_tokens=0, epochs={},
            step_seconds=step_seconds,
        )  # fmt: skip
        record.save(point_path(folder, 0))

    folder.mkdir(parents=True, exist_ok=True)
    if _has_model(task):
        judge(_moved(load_trainable(task.model).module, _device(task)), None)
        return
    assert task.rung is not None and task.training is not None
    rung = Rung(**task.rung)  # type: ignore[arg-type]
    model = _moved(new_model(rung, task.training.seed), _device(task)).eval()
    clock = _Clock()

    def finish(_index: int, trained: PreTrainedModel) -> None:
        if is_first():
            seconds = clock.read()
            assert task.training is not None
            facts = {"tokens": task.training.tokens, "seed": task.training.seed, "parameters": rung.parameters}
            trained.eval().requires_grad_(False)
            save_rung(trained, task.family, Path(task.model), facts)
            judge(trained, seconds)

    run_trunk(_trunk(model, task.training), task.training.points, folder, finish, told=clock.tick)


def _make_run(task: SweepTask) -> None:
    assert task.training is not None
    folder, spec = Path(task.folder), task.training
    folder.mkdir(parents=True, exist_ok=True)
    if is_done(task):
        return
    loaded = load_trainable(task.model)
    held = {name: load_windows(Path(path)) for name, path in task.judged.items()}
    trunk = _trunk(_moved(loaded.module, _device(task)), spec)
    clock, last = _Clock(), len(spec.points) - 1
    annealed = [index for index, point in enumerate(spec.points) if point.annealed]
    rounded = {*annealed[:1], *annealed[-1:]}  # two D a run: whether more training makes bits dearer

    def judge(index: int, model: PreTrainedModel) -> None:
        if not is_first():
            return
        seconds, point = clock.read(), spec.points[index]
        counts = trunk.mixture.counts(point.last_step * spec.batch)
        model.requires_grad_(False)
        quantized = ()
        if task.quantize and index in rounded:
            text = calibration_windows(trunk.mixture)
            quantized = quantize_and_judge(
                replace(loaded, module=_moved(model, torch.device("cpu"))), task.quantize, task.group, text, held
            )
            _moved(model, _device(task))
        if task.keep and index == last:
            facts = {"tokens": point.tokens, "shares": spec.shares, "seed": spec.seed, "from": Path(task.model).name}
            save_rung(model, task.model, Path(task.keep), facts)
        record = PointRecord(
            tokens=point.tokens, branch_step=point.branch_step, last_step=point.last_step,
            losses=judge_on(model, held),
            distinct_tokens=sum(min(count.tokens, count.held_tokens) for count in counts),
            epochs={count.name: count.epochs for count in counts},
            step_seconds=seconds,
            quantized=quantized,
        )  # fmt: skip
        record.save(point_path(folder, index))
        clock.restart()

    run_trunk(trunk, spec.points, folder, judge, finished=lambda index: _stands(folder, index), told=clock.tick)


def _trunk(model: PreTrainedModel, spec: TrainingSpec) -> Trunk:
    names = [name for name, share in spec.shares.items() if share > 0]
    mixture = Mixture(
        [open_source(name, Path(spec.sources[name])) for name in names],
        [spec.shares[name] for name in names],
        window_tokens=spec.window,
        total_tokens=spec.tokens,
        seed=spec.seed,
        max_epochs=spec.max_epochs,
    )
    settings = TrunkSettings(spec.batch, spec.peak_rate, spec.warm_up, spec.weight_decay, spec.save_steps)
    return Trunk(model, mixture, settings)


class _Clock:
    """Seconds a training step takes, judging left out."""

    def __init__(self) -> None:
        self._steps, self._began = 0, time.perf_counter()

    def tick(self, _step: int) -> None:
        self._steps += 1

    def read(self) -> float | None:
        return (time.perf_counter() - self._began) / self._steps if self._steps else None

    def restart(self) -> None:
        self._steps, self._began = 0, time.perf_counter()


@torch.no_grad()
def judge_on(model: PreTrainedModel, held: dict[str, TokenSet]) -> dict[str, LossRecord]:
    """Loss on every held-out text, float32 throughout, standard errors over documents."""
    return {name: _mean_nll(model, tokens) for name, tokens in held.items()}


def _mean_nll(model: PreTrainedModel, tokens: TokenSet) -> LossRecord:
    device = next(model.parameters()).device
    targets = scored_targets(tokens, "causal_lm")
    sums: list[Tensor] = []
    for start in range(0, tokens.sequence_count, _EVALUATION_BATCH):
        rows = slice(start, start + _EVALUATION_BATCH)
        logits = model(input_ids=tokens.input_ids[rows].to(device), use_cache=False).logits
        sums.append(sequence_nll(logits.cpu(), targets[rows]).sums)
    counts = (targets >= 0).sum(dim=1)
    found = estimate_ratio(torch.cat(sums), counts, cluster_by_document(tokens.documents))
    return LossRecord(value=found.value, stderr=found.stderr, n=found.n)


def calibration_windows(mixture: Mixture, most: int = 64) -> TokenSet:
    """The first windows of a mixture, as text for quantizing."""
    rows = [torch.from_numpy(mixture[index].input_ids) for index in range(min(most, len(mixture)))]
    ids = torch.stack(rows)
    return TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(len(ids)), "windows of the run's own mixture")


def save_windows(tokens: TokenSet, path: Path) -> None:
    """Keep held-out windows for the workers."""
    _save(path, input_ids=tokens.input_ids.numpy(), documents=tokens.documents.numpy())


def load_windows(path: Path) -> TokenSet:
    """What `save_windows` kept."""
    with np.load(path) as found:
        ids, documents = torch.from_numpy(found["input_ids"]), torch.from_numpy(found["documents"])
    return TokenSet.build(ids, torch.ones_like(ids), None, documents, path.stem)


def _save(path: Path, **arrays: np.ndarray) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def _main(path: Path) -> None:
    """A process under torchrun."""
    task = SweepTask.model_validate_json(path.read_text(encoding="utf-8"))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        carry_out(task)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
