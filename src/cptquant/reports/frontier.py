"""frontier.html and the terminal's table of a frontier."""

from pathlib import Path
from typing import TYPE_CHECKING

from cptquant.core.artifact import write_whole
from cptquant.core.forecast import Interval
from cptquant.core.frontier import BudgetPoint, Frontier, FrontierVertex
from cptquant.reports.figures.frontier import draw_frontier_band
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import (
    METHOD_NAMES,
    spell_decimal_bytes,
    spell_measured,
    spell_name,
    spell_number,
    spell_seconds,
    spell_unit,
)
from cptquant.reports.tables import TextTable, render_text

if TYPE_CHECKING:
    pass

_COLUMNS = ("Budget", "File", "Bits/weight", "Predicted", "90 % band", "Measured", "n", "Others' band", "Inside")
_NUMBERS = (1, 2, 3, 4, 5, 6, 7)


def spell_band(interval: Interval | None) -> str:
    """`0.0123 to 0.0171`."""
    return "–" if interval is None else f"{spell_number(interval.low)} to {spell_number(interval.high)}"


def point_cells(frontier: Frontier, point: BudgetPoint) -> list[str]:
    """One budget, in the order of the table's columns."""
    bits = point.bits_per_weight if frontier.scope == "file" else point.bits_per_weight_sites
    inside = {None: "–", True: "yes", False: "no"}[point.inside]
    measured = point.measured
    return [
        point.budget,
        spell_decimal_bytes(point.size_bytes),
        f"{bits:.3f}",
        "–" if point.predicted is None else spell_number(point.predicted.value),
        spell_band(point.predicted),
        "–" if measured is None else spell_measured(measured.value, measured.stderr),
        "–" if measured is None else f"{measured.n:,}",
        spell_band(point.check),
        inside,
    ]


def frontier_lines(frontier: Frontier) -> list[str]:
    """What stands below the table."""
    damage = f"{METHOD_NAMES.get(frontier.sensitivity_method, frontier.sensitivity_method)} table"
    lines = [f"{len(frontier.vertices)} vertices from one {damage}; {spell_name(frontier.measure)} on {frontier.text}."]
    calibration = frontier.calibration
    if calibration is None:
        lines.append(
            "No band: nothing calibrates this table's damages; measure 3 points or more (--measure 3 or more)."
        )
    else:
        lines.append(
            f"Predicted: ln loss is a line in ln damage, slope {calibration.mean[1]:.3f}, scatter "
            f"{calibration.scatter:.3f}, from {calibration.points} measured points and the prior ({calibration.prior})."
        )
    if frontier.checked:
        lines.append(
            f"{frontier.covered} of {frontier.checked} measured points lie in the 90 % band that the other points give."
        )
    return lines


def frontier_rows(frontier: Frontier) -> TextTable:
    """`frontier`: one row a budget."""
    title = f"{frontier.model}, --target {frontier.target}: {spell_name(frontier.measure)}, {_unit(frontier)}"
    columns = ("Budget", "File", "Bits/weight", "Predicted (90 % band)", "Measured", "n", "In the others' band")
    rows: list[list[str]] = []
    for point in frontier.points:
        budget, size, bits, value, band, measured, n, _, inside = point_cells(frontier, point)
        rows.append([budget, size, bits, f"{value} ({band})" if point.predicted else value, measured, n, inside])
    return TextTable(title, columns, rows, lines=tuple(frontier_lines(frontier)))


def frontier_table(frontier: Frontier) -> str:
    """`frontier_rows` as text."""
    return render_text(frontier_rows(frontier))


def write_frontier_page(path: Path, frontier: Frontier) -> None:
    """Write the page: one picture, the budgets, and every vertex.

    Raises:
        OutputError: the folder cannot be written.
    """
    first, last = frontier.vertices[0], frontier.vertices[-1]
    context = {
        "title": f"Frontier of {frontier.model}",
        "frontier": frontier,
        "lead": f"{spell_name(frontier.measure)}, {_unit(frontier)}, under --target {frontier.target}; quantized with "
        f"{frontier.quantizer}",
        "reach": f"{spell_decimal_bytes(first.size_bytes)} to {spell_decimal_bytes(last.size_bytes)}",
        "bits": f"{_bits(frontier, first):.2f} to {_bits(frontier, last):.2f} bits per weight, "
        + ("whole file" if frontier.scope == "file" else "linear layers of the blocks"),
        "lines": frontier_lines(frontier),
        "calibrated": frontier.calibration is not None,
        "drawing": draw_frontier_band(frontier, "loss against size"),
        "columns": _COLUMNS,
        "numbers": _NUMBERS,
        "rows": [point_cells(frontier, point) for point in frontier.points],
        "vertices": [_vertex_cells(frontier, index, vertex) for index, vertex in enumerate(frontier.vertices)],
        "damage_unit": spell_unit(frontier.damage_unit),
        "settings": [("candidate formats", ", ".join(frontier.formats)), ("sensitivity", frontier.sensitivity_method),
                     ("held-out text", frontier.text)],
        "wall": spell_seconds(frontier.provenance.wall_seconds or 0.0),
        "versions": sorted(frontier.provenance.versions.items()),
    }  # fmt: skip
    write_whole(path, load_template("frontier.html.jinja").render(context).encode())


def _unit(frontier: Frontier) -> str:
    return "cosine distance" if frontier.measure == "embedding_cosine_distance" else spell_unit(frontier.measure)


def _bits(frontier: Frontier, vertex: FrontierVertex) -> float:
    return vertex.bits_per_weight if frontier.scope == "file" else vertex.bits_per_weight_sites


def _vertex_cells(frontier: Frontier, index: int, vertex: FrontierVertex) -> list[str]:
    changed = "smallest plan" if index == 0 else ", ".join(f"{site} {fmt}" for site, fmt in vertex.changes.items())
    predicted = vertex.predicted
    return [
        f"{vertex.size_bytes:,}",
        f"{_bits(frontier, vertex):.4f}",
        spell_number(vertex.damage),
        "–" if predicted is None else spell_number(predicted.value),
        spell_band(predicted),
        changed,
    ]
