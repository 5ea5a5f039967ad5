"""One cell of the peers' table: one tool in one setting on one model, run in its own process and judged by the ruler.

A cell is a folder: `out/` is what the tool wrote, `run.json` what the run took, `judged.json` the KL and the bits. Each
is kept and not made again, so that a killed run goes on and a change of the ruler does not run a tool twice.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import source_revision
from measured_process import run_measured
from ruler import Ruler
from written_weights import read_written

SCRIPTS = Path(__file__).parent / "peers"
LIMIT_SECONDS = 3600


@dataclass(frozen=True)
class Setting:
    """One point of a tool's frontier.

    Attributes:
        label: in the table, e.g. "W3 g64".
        positional: arguments between the calibration file and the output folder.
        options: arguments after them.
    """

    label: str
    positional: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """One peer: its script under benchmarks/peers, the environment it runs in, and what it is asked for.

    Attributes:
        environment: name of the environment, which the command line maps to an interpreter.
        reads: "tokens" (safetensors, `input_ids`) or "texts" (JSON), the same calibration in two forms.
        shares: the script keeps work that all its settings share in a folder that it is told.
        hosted: the script runs in our environment and is told the peer's interpreter.
    """

    name: str
    script: str
    environment: str
    settings: tuple[Setting, ...]
    reads: str = "tokens"
    shares: bool = False
    hosted: bool = False


@dataclass(frozen=True)
class Bench:
    """A model with its calibration files, its ruler, and where its cells are kept."""

    model: str
    folder: Path
    cache: Path
    calibration: Mapping[str, Path]
    ruler: Ruler
    threads: int


def peer_command(tool: Tool, setting: Setting, bench: Bench, python: Path, output: Path) -> list[str | Path]:
    """The command line of a peer's script."""
    shared = ("--work", str(cell_folder(bench, tool.name, "shared"))) if tool.shares else ()
    host = ("--peer-python", str(python)) if tool.hosted else ()
    return [
        sys.executable if tool.hosted else python, SCRIPTS / tool.script, bench.folder, bench.calibration[tool.reads],
        *setting.positional, output, *setting.options, *host, *shared,
        "--threads", str(bench.threads),
    ]  # fmt: skip


def cell_folder(bench: Bench, tool: str, label: str) -> Path:
    """Where a cell is kept; readable names."""
    parts = (bench.model, tool, label)
    return bench.cache.joinpath(*("".join(c if c.isalnum() or c in ".-" else "_" for c in part) for part in parts))


def run_cell(cell: Path, command: list[str | Path], threads: int) -> dict[str, Any]:
    """What one command took, from an earlier run where there was one; a failure is kept in the tool's own words."""
    record = cell / "run.json"
    if not record.exists():
        shutil.rmtree(cell, ignore_errors=True)
        cell.mkdir(parents=True)
        environment = {
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        }  # fmt: skip
        content: dict[str, Any] = {"revision": source_revision()}
        measured = run_measured(command, cell / "log", environment=environment, limit_seconds=LIMIT_SECONDS)
        content |= charge(measured.figures(), told(measured.output))
        content["load_average"] = round(os.getloadavg()[0], 1)
        if measured.return_code:
            said = [line.strip() for line in measured.output.splitlines() if line.strip()]
            content["failure"] = f"return code {measured.return_code}: {said[-1][:300] if said else 'no output'}"
        write_json(record, content)
    return json.loads(record.read_text())


def told(output: str) -> dict[str, Any]:
    """The script's last line that begins with RESULT; nothing where it told nothing."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}


def charge(measured: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """What the setting would have taken alone: work shared with an earlier setting is charged to each."""
    earlier = said.get("shared_earlier", {})
    charged = dict(measured)
    for name in ("wall_seconds", "cpu_seconds"):
        charged[name] += earlier.get(name, 0)
    charged["peak_memory_bytes"] = max(charged["peak_memory_bytes"], earlier.get("peak_memory_bytes", 0))
    return charged | {name: said[name] for name in ("versions", "recipe") if name in said}


def judge_cell(cell: Path, ruler: Ruler) -> dict[str, Any]:
    """KL on held-out text and bits per weight of the quantized matrices."""
    record = cell / "judged.json"
    if not record.exists():
        try:
            written = read_written(cell / "out", set(dict(ruler.original.named_parameters())))
        except (KeyError, ValueError, FileNotFoundError) as error:
            return {"failure": f"what it wrote cannot be read: {error!r}"}
        found = asdict(ruler.judge(written.weights))
        write_json(
            record,
            {"bits_per_weight": written.bits_per_weight, "quantized_weights": written.quantized_weights, **found},
        )
    return json.loads(record.read_text())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(content, indent=1))
    path.with_suffix(".part").replace(path)


def measure_cell(bench: Bench, cell: Path, command: list[str | Path]) -> dict[str, Any]:
    """What a row holds beside its names: the command must write to `cell / "out"`."""
    row = run_cell(cell, command, bench.threads)
    if "failure" not in row:
        row |= judge_cell(cell, bench.ruler)
    return row
