"""Wall and processor seconds and peak memory of a stretch of work, counted alike for every contestant.

Imported by the peers' scripts under the peers' own interpreters, so it needs the standard library only.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def processor_seconds() -> float:
    """User and system seconds of this process, all its threads, and the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far; on Linux without what the process that started it held."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Account:
    """Figures of one contestant's run, printed as the last line of its output."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.figures: dict[str, object] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count a named stretch: `<name>_wall_seconds`, `<name>_cpu_seconds`."""
        wall, cpu = time.perf_counter(), processor_seconds()
        yield
        self.figures[f"{name}_wall_seconds"] = time.perf_counter() - wall
        self.figures[f"{name}_cpu_seconds"] = processor_seconds() - cpu
        self.figures[f"{name}_peak_memory_bytes"] = peak_resident_bytes()

    @contextmanager
    def shared_step(self, name: str, folder: Path) -> Iterator[bool]:
        """Work that all settings of a tool share and do once; yields whether it is still to be done.

        What it cost is kept beside it and told again by every later run (`shared_earlier`), so that the harness can
        charge each setting as if it stood alone.
        """
        record = folder / f"{name}.json"
        if record.exists():
            self.figures["shared_earlier"] = json.loads(record.read_text())
            yield False
            return
        with self.step(name):
            yield True
        cost = {key: self.figures[f"{name}_{key}"] for key in ("wall_seconds", "cpu_seconds", "peak_memory_bytes")}
        record.write_text(json.dumps(cost))

    def finish(self, *packages: str) -> None:
        """Add the packages' versions and torch's threads, and print the figures."""
        import torch  # every script has loaded it by now

        self.figures["versions"] = {name: importlib.metadata.version(name) for name in packages}
        self.figures["threads"] = torch.get_num_threads()
        self.print_figures()

    def print_figures(self) -> None:
        """Print everything as one line of JSON that begins with `RESULT `."""
        self.figures["process_wall_seconds"] = time.perf_counter() - self._began
        self.figures["process_cpu_seconds"] = processor_seconds()
        self.figures["process_peak_memory_bytes"] = peak_resident_bytes()
        print("\nRESULT " + json.dumps(self.figures), flush=True)
