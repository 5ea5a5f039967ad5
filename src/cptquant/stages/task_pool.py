"""Carry out tasks that depend on each other: in this process, or on the workers of Ray, here or on a cluster.

A task that raises is failed and named; those that need it fail with it, all others go on. A task whose worker dies
(killed, out of memory, its machine gone) is begun again, up to `attempts` times in all; what it had finished stands on
disk. Longer tasks begin first, so that no worker waits at the end for one that came last.
"""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from cptquant.core.errors import UserError

P = TypeVar("P")
_OBJECT_STORE_BYTES = 100_000_000
"""Tasks name files; hardly anything goes through Ray's shared memory."""
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_enable_metrics_collection": "0",
    "RAY_TQDM": "0",
    "RAY_worker_niceness": "0",
}
"""No metrics, nothing sent anywhere; workers as nice as the command itself (Ray's default is 15 nicer)."""


@dataclass(frozen=True)
class Task(Generic[P]):
    """Something to do.

    Attributes:
        payload: what the function gets; picklable. needs: ids of tasks that must be done before. cost: to compare.
    """

    id: str
    payload: P
    needs: tuple[str, ...] = ()
    cost: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of a task; `cause` says why it failed, or which deaths of workers it survived."""

    id: str
    status: Literal["finished", "failed"]
    attempts: int
    cause: str = ""
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Attributes:
        count: local workers, 0 for this process. address: of a Ray cluster ("auto" finds one), instead of local ones.
        threads, gpus: what a task takes. attempts: how often a task is begun whose worker dies.
    """

    count: int = 0
    address: str | None = None
    threads: int = 1
    gpus: int = 0
    attempts: int = 3


class Runner(Protocol):
    """Begins tasks and waits for one of them."""

    capacity: int
    where: str

    def begin(self, task: Task[Any]) -> None:
        """Start it; it may be carried out at once."""
        ...

    def wait(self) -> tuple[str, str | None, bool]:
        """(id, why it failed or None, whether its worker died) of a task that ended."""
        ...


def run_tasks(
    tasks: Sequence[Task[P]],
    function: Callable[[P], None],
    workers: Workers,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[dict[str, Outcome], str]:
    """Carry out all tasks.

    Args:
        ended: told of every task as it ends, failed ones included.

    Returns:
        Outcomes by id, and where they ran, in words.

    Raises:
        UserError: Ray is asked for and not installed, or its cluster cannot be reached.
    """
    with open_runner(function, workers) as runner:
        return _Round(tasks, runner, workers.attempts, ended).outcomes(), runner.where


@dataclass
class _Round:
    tasks: Sequence[Task[Any]]
    runner: Runner
    attempts: int
    ended: Callable[[Outcome], None]
    _outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome], init=False)
    _begun: dict[str, tuple[int, float, list[str]]] = field(default_factory=dict[str, Any], init=False)
    _running: set[str] = field(default_factory=set[str], init=False)

    def outcomes(self) -> dict[str, Outcome]:
        waiting = {task.id: task for task in self.tasks}
        by_id = dict(waiting)
        while waiting or self._running:
            self._fail_what_cannot_be(waiting)
            ready = [t for t in waiting.values() if all(need in self._outcomes for need in t.needs)]
            for task in sorted(ready, key=lambda each: -each.cost)[: self.runner.capacity - len(self._running)]:
                del waiting[task.id]
                self._begin(task)
            if self._running:
                self._take(by_id)
        return self._outcomes

    def _begin(self, task: Task[Any]) -> None:
        count, _, deaths = self._begun.get(task.id, (0, 0.0, []))
        self._begun[task.id] = (count + 1, time.perf_counter(), deaths)
        self._running.add(task.id)
        self.runner.begin(task)

    def _take(self, by_id: dict[str, Task[Any]]) -> None:
        name, cause, died = self.runner.wait()
        self._running.discard(name)
        count, began, deaths = self._begun[name]
        if died:
            deaths.append(cause or "its worker died")
            if count < self.attempts:
                self._begin(by_id[name])
                return
            cause = f"its worker died {count} times: {deaths[-1]}"
        elif cause is None and deaths:
            self._end(Outcome(name, "finished", count, "; ".join(deaths), time.perf_counter() - began))
            return
        status = "finished" if cause is None else "failed"
        self._end(Outcome(name, status, count, cause or "", time.perf_counter() - began))

    def _end(self, outcome: Outcome) -> None:
        self._outcomes[outcome.id] = outcome
        self.ended(outcome)

    def _fail_what_cannot_be(self, waiting: dict[str, Task[Any]]) -> None:
        for task in list(waiting.values()):
            broken = [n for n in task.needs if n in self._outcomes and self._outcomes[n].status == "failed"]
            if broken:
                del waiting[task.id]
                self._end(Outcome(task.id, "failed", 0, f"{broken[0]} failed: {self._outcomes[broken[0]].cause}"))


@contextlib.contextmanager
def open_runner(function: Callable[[Any], None], workers: Workers) -> Iterator[Runner]:
    """A runner for the workers asked for; Ray is started and ended with it, unless it runs already.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    if workers.count == 0 and workers.address is None:
        yield _InProcess(function)
        return
    ray = import_ray(workers)
    started = not ray.is_initialized()
    if started:
        start_ray(ray, workers)
    try:
        yield _OnRay(ray, function, workers)
    finally:
        if started:
            ray.shutdown()


def ray_is_installed() -> bool:
    """Whether Ray can be imported; it is not."""
    import importlib.util

    return importlib.util.find_spec("ray") is not None


def import_ray(workers: Workers) -> Any:
    """Ray, quiet.

    Raises:
        UserError: it is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        flag = f"--address {workers.address}" if workers.address is not None else f"--workers {workers.count}"
        raise UserError(
            f'{flag} needs Ray; install it with: pip install "cptquant[sweep]", or run in this process: --workers 0'
        ) from None
    return ray


def start_ray(ray: Any, workers: Workers) -> None:
    """Workers on this machine, or a connection to a cluster.

    Raises:
        UserError: it does not start, or no cluster answers.
    """
    import logging

    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    local: dict[str, Any] = {
        "num_cpus": workers.count * workers.threads,
        "num_gpus": workers.count * workers.gpus,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    where: dict[str, Any] = {"address": "local", **local} if workers.address is None else {"address": workers.address}
    if workers.address is not None:
        del quiet["include_dashboard"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _own_signals():
                ray.init(**where, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if workers.address is None:
            raise UserError(f"--workers {workers.count}: Ray does not start here ({first}); use --workers 0") from None
        raise UserError(
            f"--address {workers.address}: no Ray cluster answers there ({first}); start one with: ray start --head, "
            "or give --workers for workers on this machine"
        ) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what SIGTERM does: Ray puts a handler of its own in its place, which ends the process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _InProcess:
    def __init__(self, function: Callable[[Any], None]) -> None:
        self.capacity, self.where = 1, "in this process"
        self._function = function
        self._ended: list[tuple[str, str | None, bool]] = []

    def begin(self, task: Task[Any]) -> None:
        self._ended.append((task.id, _cause_of(self._function, task.payload), False))

    def wait(self) -> tuple[str, str | None, bool]:
        return self._ended.pop(0)


def _cause_of(function: Callable[[Any], None], payload: object) -> str | None:
    """Why it failed, None if it did not. An interruption is no failure and goes through."""
    try:
        function(payload)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in one run must not cost the others
        return f"{type(error).__name__}: {str(error).strip()[:500]}"
    return None


class _OnRay:
    def __init__(self, ray: Any, function: Callable[[Any], None], workers: Workers) -> None:
        self._ray, self._names = ray, dict[Any, str]()
        found: dict[str, float] = ray.cluster_resources()
        slots = int(found.get("CPU", 1) // workers.threads)
        if workers.gpus:
            slots = min(slots, int(found.get("GPU", 0) // workers.gpus))
        if slots < 1:
            raise UserError(
                f"a task takes {workers.threads} threads and {workers.gpus} GPUs, and Ray has "
                f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs; change threads or gpus of the plan, "
                "or give more --workers"
            )
        self.capacity = slots
        nodes = sum(bool(node.get("Alive")) for node in ray.nodes())
        here = f"on {slots} local worker{'s' if slots > 1 else ''}"
        there = f"on the Ray cluster {workers.address}, {slots} tasks at a time on {nodes} nodes"
        self.where = f"{here if workers.address is None else there} (Ray {ray.__version__})"
        remote = ray.remote(num_cpus=workers.threads, num_gpus=workers.gpus, max_retries=0, max_calls=0)
        self._remote = remote(_cause_of)
        self._function = ray.put(function)

    def begin(self, task: Task[Any]) -> None:
        self._names[self._remote.remote(self._function, task.payload)] = task.id

    def wait(self) -> tuple[str, str | None, bool]:
        try:
            done, _ = self._ray.wait(list(self._names), num_returns=1)
        except SystemError as error:  # how compiled code tells that a signal's handler raised inside it
            if error.__cause__ is None or isinstance(error.__cause__, Exception):
                raise
            raise error.__cause__ from None
        name = self._names.pop(done[0])
        try:
            return name, self._ray.get(done[0]), False
        except self._ray.exceptions.RayTaskError as error:  # the task could not even be read by its worker
            return name, str(error).strip().splitlines()[-1], False
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0].split(". ")[0]
            return name, f"{type(error).__name__}: {first[:200]}", True
