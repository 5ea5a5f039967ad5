"""Sweeps in the terminal."""

from cptquant.core.sweep_record import SweepEstimate, SweepRecord
from cptquant.reports.figures.law import spell_large
from cptquant.reports.quantities import spell_number, spell_seconds
from cptquant.reports.tables import TextTable, render_text


def estimate_table(expected: SweepEstimate) -> str:
    """What a sweep will cost, by size."""
    rows = [
        [
            size.name, f"{size.parameters:,}", str(size.tasks), spell_large(size.tokens), spell_number(size.flops),
            spell_seconds(size.seconds),
        ]
        for size in expected.sizes
    ]  # fmt: skip
    points = ", ".join(spell_large(point) for point in expected.points)
    stand = f"; {expected.finished} of {expected.tasks} tasks stand already" if expected.finished else ""
    lines = (
        f"{expected.tasks} tasks, evaluated at {points} tokens{stand}",
        f"{spell_number(expected.flops)} FLOPs (6 N D), about {spell_seconds(expected.seconds)}, from a timed step of "
        "each size",
    )
    columns = ("Size", "N", "Tasks left", "Tokens", "FLOPs", "One worker")
    return render_text(TextTable("Cost", columns, rows, lines=lines))


def sweep_table(record: SweepRecord) -> str:
    """What became of it."""
    again = [task for task in record.tasks if task.attempts > 1]
    lines = [f"{len(record.runs)} runs, {len(record.tasks)} tasks finished {record.where}"]
    lines += [f"{task.id} was begun {task.attempts} times: {task.cause}" for task in again]
    return render_text(TextTable("", (), [], lines=tuple(lines)))
