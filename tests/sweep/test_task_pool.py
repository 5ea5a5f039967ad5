"""Tasks in this process and on Ray: order, failures, dead workers."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cptquant.core.errors import DataError, UserError
from cptquant.stages.task_pool import Outcome, Task, Workers, _OnRay, import_ray, run_tasks


def test_longer_tasks_first_and_needs_before() -> None:
    order: list[str] = []
    tasks = [Task("a", "a", cost=1), Task("b", "b", ("a",), cost=9), Task("c", "c", cost=5)]
    found, where = run_tasks(tasks, order.append, Workers())
    assert order == ["c", "a", "b"] and where == "in this process"
    assert all(outcome.status == "finished" and outcome.attempts == 1 for outcome in found.values())


def test_a_failure_costs_what_needs_it_alone() -> None:
    def work(name: str) -> None:
        if name == "bad":
            raise DataError("domains.law.train holds no text")
        if name == "worse":
            raise ZeroDivisionError("by zero")

    told: list[Outcome] = []
    tasks = [Task("bad", "bad"), Task("of bad", "x", ("bad",)), Task("worse", "worse"), Task("good", "good")]
    found, _ = run_tasks(tasks, work, Workers(), told.append)
    assert found["bad"].cause == "domains.law.train holds no text"
    assert found["worse"].cause == "ZeroDivisionError: by zero"
    assert found["of bad"] == Outcome("of bad", "failed", 0, "bad failed: domains.law.train holds no text")
    assert found["good"].status == "finished" and len(told) == 4


def test_an_interruption_goes_through() -> None:
    def work(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([Task("a", "a")], work, Workers())


def test_dead_workers(ray_here: Any, tmp_path: Path) -> None:
    def work(name: str) -> None:
        mark = tmp_path / name
        if name == "always" or (name == "once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        mark.with_suffix(".done").touch()

    tasks = [Task(name, name, cost=cost) for name, cost in (("once", 3.0), ("always", 2.0), ("fine", 1.0))]
    found, where = run_tasks(tasks, work, Workers(count=1, attempts=2))
    assert where.startswith("on 1 local worker (Ray ")
    assert found["once"].status == "finished" and found["once"].attempts == 2
    assert "WorkerCrashedError: The worker died unexpectedly" in found["once"].cause
    assert found["always"].status == "failed" and found["always"].cause.startswith("its worker died 2 times: Worker")
    assert found["fine"].status == "finished" and (tmp_path / "fine.done").exists()


def test_a_task_larger_than_ray(ray_here: Any) -> None:
    with pytest.raises(UserError, match="a task takes 64 threads and 0 GPUs, and Ray has 1 CPUs and 0 GPUs; change th"):
        run_tasks([Task("a", "a")], print, Workers(count=1, threads=64))


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'--workers 2 needs Ray; install it with: pip install "cptquant\[sweep\]", or'):
        import_ray(Workers(count=2))
    with pytest.raises(UserError, match="--address auto needs Ray"):
        run_tasks([Task("a", "a")], print, Workers(address="auto"))


def test_an_interruption_inside_ray_goes_through() -> None:
    """Compiled code reports an exception of a signal's handler as a SystemError caused by it."""

    def wait(*_: object, **__: object) -> object:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    submit = SimpleNamespace(remote=lambda function, payload: "reference")
    fake = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 1.0}, nodes=list, __version__="0", put=lambda function: function,
        remote=lambda **_: lambda function: submit, wait=wait,
    )  # fmt: skip
    runner = _OnRay(fake, print, Workers(count=1))
    runner.begin(Task("a", "a"))
    with pytest.raises(KeyboardInterrupt):
        runner.wait()
