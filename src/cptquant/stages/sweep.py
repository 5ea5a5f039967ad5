"""plan.yaml -> a folder with the losses of a grid of runs: runs.csv, sweep.json, report.html.

SWEEP/sweep.json        plan, sizes with N and seconds of a step, what became of every task
      runs.csv          one row an evaluation, all domains; runs-DOMAIN.csv of one, where there are several
      features.csv      early losses of each domain, for `cptquant law fit cross-domain --features`
      ptq_runs.csv      what quantizing each run's first and last models cost, where the plan asks for it
      models/           base models, one a size and seed
      work/             texts in tokens; a folder a task with its evaluations. What a killed sweep goes on from
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cptquant.core.artifact import digest_json, output_error, write_whole
from cptquant.core.errors import ArtifactError, OutputError, UserError
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch, installed_versions
from cptquant.core.sweep import SweepPlan
from cptquant.core.sweep_record import PointRecord, RungRecord, SizeEstimate, SweepEstimate, SweepRecord, TaskRecord
from cptquant.core.sweep_tables import (
    FEATURE_COLUMNS,
    PTQ_COLUMNS,
    RUN_COLUMNS,
    SweepData,
    feature_rows,
    ptq_rows,
    run_rows,
    write_csv,
)
from cptquant.reports.sweep import write_sweep_report
from cptquant.stages.sweep_setup import Setup, base_id, save_texts, set_up
from cptquant.stages.sweep_task import SweepTask, carry_out, is_done, point_path
from cptquant.stages.task_pool import Outcome, Workers, run_tasks

RECORD = "sweep.json"
_NAMED_FAILURES = 3


def open_sweep(plan: SweepPlan, output: Path) -> Setup:
    """Check everything; times a step of each size unless an earlier call of this sweep did. Writes nothing.

    Raises:
        UserError: whatever makes the sweep impossible. OutputError: the folder holds something else.
    """
    check_output(output)
    known: dict[str, float] = {}
    if (output / RECORD).is_file():
        before = SweepRecord.load(output / RECORD)
        if before.plan.batch == plan.batch and before.plan.window == plan.window:
            same = {size.name: size for size in before.plan.sizes if size in plan.sizes}
            known = {rung.name: rung.step_seconds for rung in before.rungs if rung.name in same}
    return set_up(plan, output, known)


def check_output(output: Path) -> None:
    """Refuse a folder that holds something else than a sweep.

    Raises:
        OutputError: with what to do.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise OutputError(f"--output {output} is not empty and holds no sweep; choose an empty folder")


def estimate(setup: Setup, workers: int) -> SweepEstimate:
    """What is left to do, from the timed steps."""
    left = {task.id: task for task in setup.tasks if not is_done(task.payload)}
    sizes: list[SizeEstimate] = []
    for rung in setup.ladder:
        names = [task.id for (size, _), task in setup.bases.items() if size == rung.name]
        names += [run.id for run in setup.grid if run.size == rung.name]
        costs = [setup.costs[name] for name in names if name in left]
        sizes.append(
            SizeEstimate(
                name=rung.name, parameters=rung.parameters, tasks=len(costs), tokens=sum(c.tokens for c in costs),
                flops=sum(c.flops for c in costs), seconds=sum(c.seconds for c in costs),
            )
        )  # fmt: skip
    chains = [
        setup.costs[name].seconds + sum(setup.costs[need].seconds for need in task.needs if need in left)
        for name, task in left.items()
    ]
    total = sum(setup.costs[name].seconds for name in left)
    points = next(iter(setup.runs.values())).training
    assert points is not None
    return SweepEstimate(
        sizes=tuple(sizes),
        finished=len(setup.tasks) - len(left),
        tasks=len(setup.tasks),
        points=tuple(point.tokens for point in points.points if point.last_step > point.branch_step),
        flops=sum(setup.costs[name].flops for name in left),
        seconds=max(total / max(1, workers), max(chains, default=0.0)),
    )


def sweep_stage(
    setup: Setup, output: Path, workers: Workers, progress: Progress = ignore_progress
) -> SweepRecord:  # fmt: skip
    """Carry out what is left; afterwards every file of the sweep is there.

    Raises:
        UserError: tasks failed (the others are finished and stand); Ray is asked for and not there.
        OutputError: not writable.
    """
    watch = Stopwatch()
    try:
        output.mkdir(parents=True, exist_ok=True)
        save_texts(setup, output)
    except OSError as error:
        raise output_error(output, error) from None
    if not os.access(output, os.W_OK):
        raise OutputError(f"--output {output} is not writable; choose another folder")
    done = [task for task in setup.tasks if is_done(task.payload)]
    before = _records_before(output)
    outcomes: dict[str, TaskRecord] = {
        task.id: before.get(task.id) or TaskRecord(id=task.id, status="finished", attempts=0) for task in done
    }
    left = [task for task in setup.tasks if task.id not in outcomes]
    total = len(setup.tasks)

    def ended(outcome: Outcome) -> None:
        outcomes[outcome.id] = TaskRecord(
            id=outcome.id, status=outcome.status, attempts=outcome.attempts, cause=outcome.cause,
            wall_seconds=outcome.wall_seconds,
        )  # fmt: skip
        _write(setup, output, outcomes, "", None)
        what = outcome.id if outcome.status == "finished" else f"{outcome.id} failed: {outcome.cause}"
        progress(f"{len(outcomes)} of {total}: {what}", 1, 1)

    _write(setup, output, outcomes, "", None)
    names = {task.id for task in left}
    tasks = [replace(task, needs=tuple(need for need in task.needs if need in names)) for task in left]
    _, where = run_tasks(tasks, carry_out, workers, ended) if tasks else ({}, "nothing was left to do")
    record = _write(setup, output, outcomes, where, watch)
    write_sweep_report(output / "report.html", record, read_data(record, output))
    if record.failed:
        raise UserError(_spell_failures(record, output))
    return record


def _spell_failures(record: SweepRecord, output: Path) -> str:
    named = "; ".join(f"{task.id}: {task.cause}" for task in record.failed[:_NAMED_FAILURES])
    more = len(record.failed) - _NAMED_FAILURES
    rest = f"; and {more} more" if more > 0 else ""
    return (
        f"{len(record.failed)} of {len(record.tasks)} tasks failed ({named}{rest}); the others are finished and stand "
        f"in {output}: mend the cause and run the same command again"
    )


def _records_before(output: Path) -> dict[str, TaskRecord]:
    try:
        return {task.id: task for task in SweepRecord.load(output / RECORD).tasks if task.status == "finished"}
    except ArtifactError:
        return {}


def _write(
    setup: Setup, output: Path, outcomes: Mapping[str, TaskRecord], where: str, watch: Stopwatch | None
) -> SweepRecord:
    """sweep.json and the tables, as far as they are known."""
    tasks = {task.id: task.payload for task in setup.tasks}
    folders = {name: str(Path(task.folder).relative_to(output)) for name, task in tasks.items()}
    record = SweepRecord(
        inputs={"plan": digest_json(setup.plan.model_dump(mode="json"))},
        plan=setup.plan,
        rungs=tuple(
            RungRecord(
                name=rung.name, parameters=rung.parameters, block_parameters=rung.block_parameters,
                step_seconds=_step_seconds(setup, rung.name),
            )
            for rung in setup.ladder
        ),
        runs=setup.grid,
        tasks=tuple(
            outcomes.get(name, TaskRecord(id=name, status="open", attempts=0)) for name in tasks
        ),
        folders=folders,
        bases={f"{size}-s{seed}": _below(Path(task.model), output) for (size, seed), task in setup.bases.items()},
        flops=sum(cost.flops for cost in setup.costs.values()),
        where=where,
        held_tokens={name: len(source.tokens) for name, source in setup.texts.sources.items()},
    )  # fmt: skip
    if watch is not None:
        record = record.model_copy(update={"provenance": watch.provenance(threads=setup.plan.threads)})
    record.save(output / RECORD)
    write_tables(record, output)
    return record


def _below(path: Path, output: Path) -> str:
    return str(path.relative_to(output)) if path.is_relative_to(output) else str(path.resolve())


def _step_seconds(setup: Setup, size: str) -> float:
    """Mean over the runs of a size that have one, else what was timed before the sweep."""
    found = [
        seconds
        for run in setup.grid
        if run.size == size
        for seconds in [point.step_seconds for point in _points(setup.runs[run.id])]
        if seconds is not None
    ]
    return sum(found) / len(found) if found else setup.step_seconds[size]


def _points(task: SweepTask) -> list[PointRecord]:
    assert task.training is not None
    return _load_points(Path(task.folder))


def _load_points(folder: Path) -> list[PointRecord]:
    found: list[PointRecord] = []
    while point_path(folder, len(found)).is_file():
        found.append(PointRecord.load(point_path(folder, len(found))))
    return found


def read_data(record: SweepRecord, output: Path) -> SweepData:
    """Every evaluation that stands on disk, in the order of the grid."""
    bases: dict[tuple[str, int], PointRecord] = {}
    for size in record.plan.sizes:
        for seed in record.plan.seeds:
            found = _load_points(output / record.folders[base_id(size.name, seed)])
            if found:
                bases[size.name, seed] = found[0]
    points = {run.id: _load_points(output / record.folders[run.id]) for run in record.runs}
    return SweepData({rung.name: rung for rung in record.rungs}, record.runs, bases, points, record.plan.step_tokens)


def write_tables(record: SweepRecord, output: Path) -> None:
    """runs.csv and the others, from what stands on disk: the same whatever order the tasks ended in."""
    data, plan = read_data(record, output), record.plan
    versions = installed_versions(("cptquant", "torch", "transformers"))
    head = (
        f"cptquant sweep, plan {record.inputs['plan'][:12]}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"family {Path(plan.family).name}; N: all parameters, shared tensors once; D: tokens of the run, its anneal "
        f"(the last {plan.anneal:g}) included",
        f"losses on {plan.evaluations.windows} windows of {plan.window} tokens of validation text at most, standard "
        "errors over documents",
    )
    rows = run_rows(data)
    if rows:
        write_whole(output / "runs.csv", write_csv(RUN_COLUMNS, rows, head).encode())
    if len(plan.domains) > 1:
        for domain in plan.domains:
            own = run_rows(data, domain)
            if own:
                write_whole(output / f"runs-{domain}.csv", write_csv(RUN_COLUMNS, own, head).encode())
    features = feature_rows(data)
    if features:
        note = "losses of the domain before training, half way to the early look, and there (trunk, no anneal)"
        write_whole(output / "features.csv", write_csv(FEATURE_COLUMNS, features, (head[0], note)).encode())
    quantized = ptq_rows(data)
    if quantized:
        note = "GPTQ on the run's own mixture, every matrix in one format; KL and rise per token, paired"
        write_whole(output / "ptq_runs.csv", write_csv(PTQ_COLUMNS, quantized, (*head, note)).encode())
