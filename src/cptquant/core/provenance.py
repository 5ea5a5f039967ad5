"""Where a result came from: versions, command, seed, device, time and memory."""

import importlib.metadata
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("cptquant", "torch", "transformers", "compressed-tensors", "safetensors", "numpy", "scipy")


class Provenance(BaseModel):
    """Written into every artifact; never part of a digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, str] = {}
    command: str = ""
    seed: int | None = None
    device: str = "cpu"
    threads: int | None = None
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None


def installed_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that can change a number; read from metadata, nothing is imported."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _command(argv: Sequence[str]) -> str:
    """The call as a person would type it; `python -m cptquant` has the path of __main__.py for a name."""
    name = argv[0].rsplit("/", 1)[-1]
    return shlex.join(["cptquant" if name == "__main__.py" else name, *argv[1:]])


class Stopwatch:
    """Times a stage and fills in its provenance."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def provenance(self, *, seed: int | None = None, device: str = "cpu", threads: int | None = None) -> Provenance:
        """Provenance of the stage that began when this stopwatch was made."""
        return Provenance(
            versions=installed_versions(),
            command=_command(sys.argv),
            seed=seed,
            device=device,
            threads=threads,
            wall_seconds=time.perf_counter() - self._wall,
            cpu_seconds=time.process_time() - self._cpu,
            peak_memory_bytes=peak_memory_bytes(),
        )
