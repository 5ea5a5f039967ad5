"""Sensitivity over depth: one bar per block, and one small panel per role."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cptquant.core.layout import ModelLayout
from cptquant.core.sensitivity import BlockScore, SensitivityTable
from cptquant.reports.figures.arrangement import Arrangement, format_of_width
from cptquant.reports.quantities import METHOD_NAMES, spell_measured
from cptquant.reports.svg import Canvas, Frame, Scale, draw_block_axis, draw_value_axis, spans_decades, value_scale


@dataclass(frozen=True)
class _Point:
    block_index: int
    value: float
    stderr: float | None
    title: str


def draw_block_scores(table: SensitivityTable, layout: ModelLayout) -> str:
    """The method's score of every block with its standard error; the first and last 30 % of the depth are shaded."""
    name = METHOD_NAMES.get(table.method, table.method)
    canvas = Canvas(1022, 212, f"{name} score by block")
    frame = Frame(58, 12, 1020, 190)
    ends = [score.value + (score.stderr or 0) for score in table.block_scores]
    values = [score.value for score in table.block_scores]
    logarithmic = spans_decades(values, 300)
    scale = value_scale([*values, *ends], frame.bottom, frame.top, logarithmic=logarithmic)
    blocks = draw_block_axis(canvas, frame, layout.block_count)
    draw_value_axis(canvas, frame, scale)
    for score in table.block_scores:
        _draw_score(canvas, frame, scale, blocks, score)
    bars = [(blocks(score.block_index + 0.5), score.value, score.stderr) for score in table.block_scores]
    _draw_whiskers(canvas, scale, bars)
    return canvas.render()


def _draw_score(canvas: Canvas, frame: Frame, scale: Scale, blocks: Scale, score: BlockScore) -> None:
    width = min(30.0, 0.68 * (blocks(1) - blocks(0)))
    x, y = blocks(score.block_index + 0.5), scale(score.value)
    title = f"block {score.block_index}: {spell_measured(score.value, score.stderr)} (n = {score.n:,})"
    if scale.logarithmic:  # the length of a bar means nothing on an axis without zero
        canvas.dot(x, y, min(4.0, width / 2), "mark", title=title)
    else:
        canvas.rect(x - width / 2, y, width, max(frame.bottom - y, 0.5), "bar", title=title, radius=min(2, width / 6))


def _draw_whiskers(canvas: Canvas, scale: Scale, bars: Sequence[tuple[float, float, float | None]]) -> None:
    """Value ± one standard error at (x, value, stderr); what lies below the axis is cut."""
    ends = [(x, max(value - stderr, scale.low), value + stderr) for x, value, stderr in bars if stderr]
    canvas.verticals([(x, scale(low), scale(high)) for x, low, high in ends], "whisker")


def draw_role_panels(table: SensitivityTable, arrangement: Arrangement, code_bits: int) -> list[tuple[str, str]]:
    """Damage over depth at one width, one panel per role on a common axis.

    Returns:
        (role, svg) in forward order.
    """
    rows: dict[str, list[_Point]] = {}
    for (row, block_index), site in arrangement.cells.items():
        name = format_of_width(table, site, code_bits)
        if name is not None:
            damage = table.damages[site.name][name]
            spelled = spell_measured(damage.value, damage.stderr)
            title = f"{block_index}: {spelled}"
            rows.setdefault(row, []).append(_Point(block_index, damage.value, damage.stderr, title))
    return _draw_panels(rows, arrangement.block_count)


def draw_curve_panels(curves: Mapping[str, Mapping[str, float]], block_count: int) -> list[tuple[str, str]]:
    """Extra read-outs per block, one panel per curve.

    Curves whose names differ in their last number only (`accuracy_drop_at_sparsity_0.1`, `..._0.3`) share an axis;
    others may be in other units.
    """
    families: dict[str, dict[str, list[_Point]]] = {}
    for name, values in curves.items():
        points = [
            _Point(int(index), value, None, f"{index}: {spell_measured(value, None)}")
            for index, value in values.items()
            if index.isdigit() and int(index) < block_count
        ]
        if points:
            family = families.setdefault(name.rstrip("0123456789.e-"), {})
            family[name.replace("_", " ")] = sorted(points, key=lambda point: point.block_index)
    return [panel for rows in families.values() for panel in _draw_panels(rows, block_count)]


def _draw_panels(rows: Mapping[str, Sequence[_Point]], block_count: int) -> list[tuple[str, str]]:
    everything = [point for points in rows.values() for point in points]
    if not everything:
        return []
    values = [point.value for point in everything]
    logarithmic = spans_decades(values) and min(values) >= 0
    ends = [] if logarithmic else [point.value + (point.stderr or 0) for point in everything]
    return [(row, _draw_panel(row, points, [*values, *ends], block_count, logarithmic)) for row, points in rows.items()]


def _draw_panel(
    label: str, points: Sequence[_Point], everything: Sequence[float], block_count: int, logarithmic: bool
) -> str:
    canvas = Canvas(242, 136, f"{label}: damage by block")
    frame = Frame(46, 6, 240, 114)
    scale = value_scale(everything, frame.bottom, frame.top, logarithmic=logarithmic)
    blocks = draw_block_axis(canvas, frame, block_count)
    draw_value_axis(canvas, frame, scale, most=4)
    places = [(blocks(point.block_index + 0.5), scale(point.value)) for point in points]
    canvas.polyline(places, "curve")
    radius = 2.6 if block_count <= 40 else 1.6
    _draw_whiskers(canvas, scale, [(x, p.value, p.stderr) for p, (x, _) in zip(points, places, strict=True)])
    # on a logarithmic axis a zero stands at the bottom, and is hollow to show that it does not belong there
    dots = [(x, y, point.title) for point, (x, y) in zip(points, places, strict=True)]
    off_axis = [logarithmic and point.value <= 0 for point in points]
    canvas.dots([dot for dot, is_off in zip(dots, off_axis, strict=True) if not is_off], radius, "mark")
    for (x, y, title), is_off in zip(dots, off_axis, strict=True):
        if is_off:
            canvas.dot(x, y, radius, "hollow", title=title)
    return canvas.render()
