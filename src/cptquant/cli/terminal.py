"""What a person sees: a progress bar with remaining time on standard error, tables and JSON on standard output."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel

from cptquant.core.artifact import Artifact
from cptquant.core.engine_export import ExportRecord
from cptquant.core.progress import Progress, ignore_progress


def print_json(artifact: Artifact) -> None:
    """The artifact as JSON on standard output."""
    sys.stdout.write(artifact.to_json())


def print_values(value: object) -> None:
    """Plain values, lists, dicts and records as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=_dump) + "\n")


def _dump(record: object) -> object:
    if isinstance(record, BaseModel):
        return record.model_dump(mode="json")
    raise TypeError(f"{type(record).__name__} is not JSON")


def null_if_undefined(value: object) -> object:
    """None in place of a float that JSON cannot hold, e.g. the standard error of one value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(sentence: str) -> None:
    """A sentence a person should read, on standard error."""
    print(f"note: {sentence}", file=sys.stderr)


def warn_of_memory(record: ExportRecord | None) -> None:
    """Say on standard error where the engine's measured peak is above `--memory`."""
    memory = None if record is None else record.memory
    if memory is None or not memory.excess_bytes or memory.measured_bytes is None or memory.limit_bytes is None:
        return
    print(
        f"warning: the engine's peak memory, {memory.measured_bytes:,} bytes at {memory.context:,} tokens, is "
        f"{memory.excess_bytes:,} above --memory ({memory.limit_bytes:,}); lower --memory by as much "
        "and quantize again",
        file=sys.stderr,
    )


def print_text(text: str) -> None:
    """A rendered table on standard output."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


@contextmanager
def watch(*, quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error: bars with the remaining time on a terminal, a line per finished stage elsewhere."""
    if quiet:
        yield ignore_progress
        return
    if not sys.stderr.isatty():
        yield _print_finished
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _print_finished(stage: str, done: int, total: int) -> None:
    if done == total:
        print(f"{stage}: {done}/{total}", file=sys.stderr)
