"""What a figure was measured on: processor, cores, memory, load and versions."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cptquant.core.provenance import installed_versions

REPOSITORY = Path(__file__).parent.parent
LAST_CHANGE = ["log", "-1", "--abbrev=10", "--format=%h", "--", "src"]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and how busy the machine is at this moment."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": installed_versions(),
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "load_average_1_5_15": [round(load, 2) for load in os.getloadavg()],
    }


def processor_name() -> str:
    """Model name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def source_revision() -> str:
    """The last commit that changed cptquant's sources, with "+ changes" where they differ; "unknown" without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for words in (LAST_CHANGE, ["status", "--porcelain", "--", "src"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} + changes" if changes else commit
