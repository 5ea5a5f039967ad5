"""Run a command and count the processor seconds and the peak memory of that command alone."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CPTQUANT = Path(sys.executable).with_name("cptquant")
"""The command of the environment this runs in."""


@dataclass(frozen=True)
class Measured:
    """One finished command.

    Attributes:
        wall_seconds, cpu_seconds: of the command with everything it waited for.
        peak_memory_bytes: its largest resident set (mapped weight files included), its children's not added. On Linux
            from /proc, read every tenth of a second: `ru_maxrss` begins at the size of the process that started it.
    """

    return_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    output: str

    def figures(self) -> dict[str, float | int]:
        """Without the text."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


def run_measured(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
) -> Measured:
    """Run to the end with output into `log`; a command over the limit is ended and has return code -9.

    `os.wait4` gives the resource use of this one child; RUSAGE_CHILDREN would give the largest child so far.
    """
    began = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        code, usage, peak = _wait(process, began, limit_seconds)
    return Measured(
        return_code=code,
        wall_seconds=time.perf_counter() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_memory_bytes=peak or (usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024),
        output=log.read_text(errors="replace"),
    )


def _wait(process: subprocess.Popen[bytes], began: float, limit_seconds: float | None):
    peak = 0
    while True:
        peak = max(peak, _peak_so_far(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage, peak
        if limit_seconds is not None and time.perf_counter() - began > limit_seconds:
            process.kill()
            limit_seconds = None
        time.sleep(0.1)


def _peak_so_far(pid: int) -> int:
    """Largest resident set of a living process in bytes; 0 where /proc does not tell or it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
