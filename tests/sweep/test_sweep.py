"""`cptquant sweep` and `cptquant plan` end to end: tables, resuming, failures, the same bits on Ray, refusals."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cptquant.core.joint import JointPlan
from cptquant.core.sweep import GENERAL
from cptquant.core.sweep_file import read_plan
from cptquant.core.sweep_record import PointRecord, SweepRecord
from cptquant.laws.observations import read_observations
from cptquant.laws.transfer import read_features
from cptquant.stages import sweep as sweep_stages
from cptquant.stages.sweep import open_sweep, sweep_stage
from cptquant.stages.sweep_task import SweepTask, carry_out, is_done, torchrun_command
from cptquant.stages.task_pool import Workers


def rows(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_what_a_sweep_leaves(finished: Path) -> None:
    record = SweepRecord.load(finished / "sweep.json")
    assert len(record.runs) == 6 and all(task.status == "finished" for task in record.tasks)
    found = rows(finished / "runs.csv")
    assert [row["D"] for row in found[:2]] == ["0", "0"] and len(found) == 2 + 6 * 2
    assert [row["run"] for row in found[2:4]] == ["general-32x1-r0-s0"] * 2
    assert found[3]["D"] == found[3]["U"] == "11776" and found[3]["anneal_tokens"] == "2560"
    data = read_observations(finished / "runs.csv")
    assert len(data) == 12 and len(data.base["general_nll"]) == 2 and data.ratio is not None
    assert (data.losses["domain_nll"] < 8).all() and (data.stderrs["domain_nll"] > 0).all()
    learned = {row["r"]: float(row["domain_nll"]) for row in found if row["size"] == "64x1" and row["D"] == "11776"}
    assert learned["1"] < learned["0.5"] < learned["0"]  # domain text teaches the domain
    features = read_features(finished / "features.csv")
    assert list(features) == ["code"]
    quantized = rows(finished / "ptq_runs.csv")
    assert len(quantized) == 6 * 2 * 2, "runs, widths, first and last point"
    assert {row["D"] for row in quantized} == {row["D"] for row in rows(finished / "runs.csv")} - {"0"}
    page = (finished / "report.html").read_text()
    assert "General loss over the share, last point" in page and page.count("<svg") == 6


def test_the_law_is_fitted_to_it(finished: Path, cptquant: Callable, tmp_path: Path) -> None:
    held = ("--fix", "alpha=0.3", "--fix", "beta=0.3", "--fix", "eta=1", "--fix", "gamma=0.3", "--fix", "eps=0.1")
    outcome = cptquant("law", "fit", "dcpt", finished / "runs.csv", *held, "--starts", 2, "--draws", 20,
                       "--output", tmp_path / "law")  # fmt: skip
    assert outcome.code == 0 and "12 rows of 6 runs" in outcome.out, outcome.err


def test_the_same_command_does_nothing_twice(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SweepRecord.load(finished / "sweep.json").plan
    before = (finished / "runs.csv").read_bytes()
    monkeypatch.setattr(sweep_stages, "carry_out", lambda task: pytest.fail(f"{task.id} is carried out again"))
    record = sweep_stage(open_sweep(plan, finished), finished, Workers())
    assert record.where == "nothing was left to do" and (finished / "runs.csv").read_bytes() == before


def test_a_killed_sweep_goes_on_with_the_same_table(finished: Path, tmp_path: Path) -> None:
    """What a kill leaves: a run with its first point and no second one, and a table without it."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    record = SweepRecord.load(output / "sweep.json")
    run = output / record.folders["code-32x1-r1-s0"]
    before = PointRecord.load(run / "point-1.json")
    (run / "point-1.json").unlink()
    (output / "runs.csv").unlink()
    again = sweep_stage(open_sweep(record.plan, output), output, Workers())
    assert sum(task.attempts for task in again.tasks) == sum(task.attempts for task in record.tasks)
    assert PointRecord.load(run / "point-1.json").losses == before.losses
    assert (output / "runs.csv").read_bytes() == (finished / "runs.csv").read_bytes()


def test_a_damaged_base_model_is_made_again(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    record = SweepRecord.load(output / "sweep.json")
    weights = output / record.bases["32x1-s0"] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    setup = open_sweep(record.plan, output)
    assert [task.id for task in setup.tasks if not is_done(task.payload)] == ["base 32x1 seed 0"]
    sweep_stage(setup, output, Workers())
    assert weights.read_bytes() == whole and (output / "runs.csv").read_bytes() == (finished / "runs.csv").read_bytes()


def test_a_failed_run_is_named_and_the_others_finish(
    write_plan: Callable, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cptquant: Callable
) -> None:
    plan = write_plan(tmp_path, sizes=[{"hidden": 32, "layers": 1}], ratios=[0.5, 1], quantize=[3, 4])

    def work(task: SweepTask) -> None:
        if task.id == "code-32x1-r0.5-s0":
            raise MemoryError("too large")
        shutil.copytree(finished / "work" / Path(task.folder).name, task.folder)
        if task.kind == "base":
            shutil.copytree(finished / "models" / Path(task.model).name, task.model)

    monkeypatch.setattr(sweep_stages, "carry_out", work)
    outcome = cptquant("sweep", plan, "--output", tmp_path / "out", "--workers", 0)
    assert outcome.code == 2
    assert "1 of 3 tasks failed (code-32x1-r0.5-s0: MemoryError: too large); the others are finished and" in outcome.err
    record = SweepRecord.load(tmp_path / "out/sweep.json")
    assert [task.status for task in record.tasks] == ["finished", "failed", "finished"]
    assert record.failed[0].cause == "MemoryError: too large"
    assert {row["run"] for row in rows(tmp_path / "out/runs.csv")} == {"base-32x1-s0", "code-32x1-r1-s0"}
    assert "MemoryError: too large" in (tmp_path / "out/report.html").read_text()


def test_the_same_bits_on_ray(ray_here: Any, finished: Path, write_plan: Callable, tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, sizes=[{"hidden": 32, "layers": 1}], ratios=[0.5], quantize=[3, 4]))
    output = tmp_path / "out"
    record = sweep_stage(open_sweep(plan, output), output, Workers(count=1))
    assert record.where.startswith("on 1 local worker (Ray ")
    found, expected = rows(output / "runs.csv"), rows(finished / "runs.csv")
    assert len(found) == 3 and all(row in expected for row in found)
    assert all(row in rows(finished / "ptq_runs.csv") for row in rows(output / "ptq_runs.csv"))


def test_existing_models_as_sizes(write_plan: Callable, folder: Path, tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, sizes=[str(folder)], pretrain=None, ratios=[1], evaluations={
        "count": 1, "windows": 8}))  # fmt: skip
    output = tmp_path / "out"
    record = sweep_stage(open_sweep(plan, output), output, Workers())
    assert record.bases == {"model-s0": str(folder)} and not (output / "models").exists()
    found = rows(output / "runs.csv")
    assert [row["D"] for row in found] == ["0", "11776"] and record.rungs[0].parameters == int(found[0]["N"])


def test_the_command_of_several_gpus(finished: Path) -> None:
    command = torchrun_command(Path("task.json"), 4)
    assert command[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m",
                           "cptquant.stages.sweep_task", "task.json"]  # fmt: skip
    record = SweepRecord.load(finished / "sweep.json")
    task = SweepTask(kind="run", id="x", folder="f", model="m", model_key="", judged={GENERAL: "g"}, gpus=4)
    assert SweepTask.model_validate_json(task.model_dump_json()) == task and record.plan.gpus == 0


def test_a_task_of_several_gpus_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SweepTask(kind="run", id="x", folder=str(tmp_path / "f"), model="m", model_key="", judged={}, gpus=2)

    def run(command: list[str], **_: object) -> Any:
        assert command == torchrun_command(tmp_path / "f/task.json", 2)
        assert SweepTask.model_validate_json((tmp_path / "f/task.json").read_text()) == task
        return type("Done", (), {"returncode": 1, "stderr": "first\nNCCL error\n"})

    monkeypatch.setattr("cptquant.stages.sweep_task.subprocess.run", run)
    with pytest.raises(RuntimeError, match="torchrun ended with 1: first / NCCL error"):
        carry_out(task)


def test_dry_run(write_plan: Callable, tmp_path: Path, cptquant: Callable) -> None:
    outcome = cptquant("sweep", write_plan(tmp_path), "--output", tmp_path / "out", "--dry-run", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0 and found["tasks"] == 8 and found["points"] == [10240, 11776]
    small = found["sizes"][0]
    # a base model of 23 steps with its anneal inside, and three runs of 18 steps with anneals of 4 and 5
    assert (
        small["tokens"] == 512 * (23 + 3 * (18 + 4 + 5)) and small["flops"] == 6 * small["parameters"] * small["tokens"]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "900k", "max_epochs": 2}, "and tokens = 900,000 at a share of 1 reads 900,000: "),
        ({"pretrain": {"tokens": "40M"}}, "and pretrain.tokens = 40,000,000 at a share of 1 reads 40,000,000: "),
        (
            {"window": 4096, "batch": 1, "tokens": "60k", "evaluations": {"first": "20k"}},
            "window: 4096 tokens are more than the 512 positions of embedded:opt-mini",
        ),
        ({"family": "embedded:bert-mini"}, "family: embedded:bert-mini is for sequence_classification"),
    ],
)
def test_plans_that_cannot_be_carried_out(
    write_plan: Callable, tmp_path: Path, cptquant: Callable, changes: dict, message: str
) -> None:
    outcome = cptquant("sweep", write_plan(tmp_path, **changes), "--output", tmp_path / "out", "--workers", 0)
    assert outcome.code == 2 and message in outcome.err and not (tmp_path / "out").exists(), outcome.err


def test_tiny_texts(write_plan: Callable, texts: Path, tmp_path: Path, cptquant: Callable) -> None:
    (tmp_path / "tiny.txt").write_text("a few words\n")
    (tmp_path / "empty.txt").write_text("\n")
    code = str(texts / "code.txt")
    for domain, message in (
        (
            {"train": "tiny.txt", "valid": code},
            "domains.code.train holds 7 tokens; a law of its share needs at least 10",
        ),
        ({"train": "empty.txt", "valid": code}, "domains.code.train"),
        (
            {"train": code, "valid": "tiny.txt"},
            "(a third of domains.code.valid is used, in windows of 32 tokens, at lea",
        ),
    ):
        plan = write_plan(tmp_path, domains={"code": domain})
        outcome = cptquant("sweep", plan, "--output", tmp_path / "out", "--workers", 0)
        assert outcome.code == 2 and message in outcome.err, outcome.err


def test_folders_and_flags(write_plan: Callable, tmp_path: Path, cptquant: Callable, monkeypatch: Any) -> None:
    plan = write_plan(tmp_path)
    outcome = cptquant("sweep", plan, "--output", tmp_path)
    assert outcome.code == 2 and "is not empty and holds no sweep; choose an empty folder" in outcome.err
    outcome = cptquant("sweep", plan, "--output", tmp_path / "out", "--workers", 1, "--address", "auto")
    assert outcome.code == 2 and "--workers and --address were both given" in outcome.err
    monkeypatch.setattr("cptquant.stages.task_pool.ray_is_installed", lambda: False)
    outcome = cptquant("sweep", plan, "--output", tmp_path / "out", "--dry-run")
    assert outcome.code == 0 and "Ray is not installed: runs go one after another in this process" in outcome.err


PLAN = ("--max-size", "200kB", "--compute", "60s", "--form", "dcpt")


def test_a_plan_and_its_execution(finished: Path, tmp_path: Path, cptquant: Callable) -> None:
    output = tmp_path / "plan"
    outcome = cptquant("plan", finished, *PLAN, "--output", output, "--run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    best, measured = plan["best"], plan["measured"][0]
    assert best["size_bytes"] <= 200_000 and best["bits"] in (3, 4, 16) and best["allowed"]
    assert measured["label"] == "recommended" and measured["size_bytes"] == best["size_bytes"]
    assert measured["domain_nll"] > 0 and measured["float_domain_nll"] > 0
    assert Path(measured["folder"], "config.json").is_file()
    assert "Carried out" in (output / "joint_plan.html").read_text()
    assert JointPlan.load(output / "joint_plan.json").measured[0].folder == measured["folder"]
    decided = plan["damages"][0]["decided"][0]
    assert decided.startswith("tokens: ") and "squared error of ln KL on left-out runs" in decided


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-size", "4bpw", "--compute", "1h"), "--max-size '4bpw' is no size in bytes; write it as 12MB"),
        (("--max-size", "1MB", "--compute", "soon"), "--compute 'soon' is not readable; give a duration such as 90s"),
        (("--max-size", "1MB", "--compute", "1e3"), "--compute '1e3' is not readable"),
        ((*PLAN, "--bits", "9"), "--bits '9': '9' is no width; give 2 to 8, or 16 for not quantized"),
        ((*PLAN, "--bits", "2"), "--bits 2: the sweep quantized to 3, 4 bits, and what others cost is not known"),
        ((*PLAN, "--law-domain", "law"), "--law-domain 'law' is no domain of"),
        ((*PLAN, "--neighbours", "2"), "--neighbours 2 goes with --run; add --run, or leave it out"),
        ((*PLAN, "--max-general-increase", "x"), "--max-general-increase 'x' is not readable"),
    ],
)
def test_plans_that_say_nothing(
    finished: Path, tmp_path: Path, cptquant: Callable, arguments: tuple, message: str
) -> None:
    outcome = cptquant("plan", finished, *arguments, "--output", tmp_path / "plan")
    assert outcome.code == 2 and message in outcome.err, outcome.err


def test_no_sweep(tmp_path: Path, cptquant: Callable) -> None:
    outcome = cptquant("plan", tmp_path, *PLAN, "--output", tmp_path / "plan")
    assert outcome.code == 2 and "sweep.json does not exist; make it with: cptquant sweep plan.yaml" in outcome.err
