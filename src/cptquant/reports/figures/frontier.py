"""The frontier: predicted loss with its band over size, and the points that were really measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from cptquant.core.frontier import BudgetPoint, Frontier, FrontierVertex
from cptquant.reports.quantities import spell_decimal_bytes, spell_measured, spell_number, spell_tick
from cptquant.reports.svg import Canvas, Frame, Scale, draw_value_axis, value_scale

_WIDTH, _HEIGHT = 860.0, 420.0
_SHOWN_SPAN = 3e3
"""Vertices whose loss is this many times below the largest are left out of the picture; the table has them."""
_FAR = 40.0


@dataclass(frozen=True)
class _Place:
    """One vertex in the picture's quantities."""

    x: float
    value: float
    low: float
    high: float
    vertex: FrontierVertex


def draw_frontier_band(frontier: Frontier, label: str) -> str:
    """Loss (logarithmic) against bits per weight: the frontier, its 90 % band, measured points with ± 2 errors.

    Without a calibration the table's damage is drawn alone, without a band or measured points.
    """
    places = shown_places(frontier)
    if len(places) < 2:
        return ""
    canvas = Canvas(_WIDTH, _HEIGHT, label)
    frame = Frame(64, 16, _WIDTH - 24, _HEIGHT - 62)
    points = [point for point in frontier.points if point.measured and point.measured.value > 0]
    points = points if frontier.calibration is not None else []
    values = [part for place in places for part in (place.low, place.high)]
    values += [point.measured.value for point in points if point.measured]
    scale = value_scale(values, frame.bottom, frame.top, logarithmic=True)
    draw_value_axis(canvas, frame, scale, most=8)
    xs = [place.x for place in places] + [_bits(frontier, point) for point in points]
    across = _draw_bits_axis(canvas, frame, frontier, min(xs), max(xs))
    if frontier.calibration is not None:
        _draw_band(canvas, places, across, scale)
    for part, style in _stretches(places):
        canvas.polyline([(across(place.x), scale(place.value)) for place in part], f"law c0{style}")
    dots = [(across(place.x), scale(place.value), _title(frontier, place)) for place in places]
    canvas.dots(dots, 1.7, "c0")
    for point in points:
        _draw_measured(canvas, point, across(_bits(frontier, point)), scale)
    return canvas.render()


def shown_places(frontier: Frontier) -> list[_Place]:
    """The vertices that the picture shows."""
    places: list[_Place] = []
    for vertex in frontier.vertices:
        found = vertex.predicted
        if vertex.damage <= 0:
            continue
        value = vertex.damage if found is None else found.value
        low, high = (value, value) if found is None else (found.low, found.high)
        places.append(_Place(_bits(frontier, vertex), value, max(low, value / _FAR), min(high, value * _FAR), vertex))
    largest = max((place.value for place in places), default=0.0)
    measured = [point.measured.value for point in frontier.points if point.measured and point.measured.value > 0]
    least = min([largest / _SHOWN_SPAN, *measured]) if frontier.calibration is not None else largest / _SHOWN_SPAN
    return [place for place in places if place.value >= least]


def _bits(frontier: Frontier, point: FrontierVertex | BudgetPoint) -> float:
    return point.bits_per_weight if frontier.scope == "file" else point.bits_per_weight_sites


def _draw_bits_axis(canvas: Canvas, frame: Frame, frontier: Frontier, low: float, high: float) -> Scale:
    room = 0.03 * (high - low) or 0.1
    scale = Scale(low - room, high + room, frame.left, frame.right)
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    weights = frontier.parameters if frontier.scope == "file" else frontier.block_weights
    for tick in scale.ticks(8):
        canvas.line((scale(tick), frame.bottom), (scale(tick), frame.bottom + 4), "axis")
        canvas.text(scale(tick), frame.bottom + 17, spell_tick(tick), "tick mid")
        canvas.text(scale(tick), frame.bottom + 32, spell_decimal_bytes(tick * weights / 8), "tick mid")
    counted = "the whole file" if frontier.scope == "file" else "the blocks' linear layers"
    canvas.text(frame.right, frame.bottom + 52, f"bits per weight and bytes of {counted}, scales included", "tick end")
    return scale


def _draw_band(canvas: Canvas, places: Sequence[_Place], across: Scale, scale: Scale) -> None:
    upper = [(across(place.x), scale(place.high)) for place in places]
    lower = [(across(place.x), scale(place.low)) for place in reversed(places)]
    outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *lower])
    canvas.shape(f"M{outline}Z", "area c0")


def _stretches(places: Sequence[_Place]) -> list[tuple[list[_Place], str]]:
    """Runs of vertices inside and outside the measured range; neighbouring runs share a vertex, so lines join."""
    runs: list[tuple[list[_Place], str]] = []
    for place in places:
        style = " dashed" if place.vertex.extrapolated else ""
        if not runs or runs[-1][1] != style:
            runs.append(([runs[-1][0][-1]] if runs else [], style))
        runs[-1][0].append(place)
    return runs


def _draw_measured(canvas: Canvas, point: BudgetPoint, x: float, scale: Scale) -> None:
    measured = point.measured
    assert measured is not None  # the caller filters
    error = 2 * (measured.stderr or 0.0)
    canvas.line((x, scale(max(measured.value - error, scale.low))), (x, scale(measured.value + error)), "whisker")
    inside = (
        "" if point.inside is None else ", inside the others' band" if point.inside else ", outside the others' band"
    )
    title = f"{point.budget}: measured {spell_measured(measured.value, measured.stderr)}, n = {measured.n:,}{inside}"
    style = "s-quantized hollow" if point.inside is None else "s-quantized" if point.inside else "s-uniform"
    canvas.dot(x, scale(measured.value), 5, style, title=title)
    canvas.text(x + 9, scale(measured.value) - 8, point.budget, "label")


def _title(frontier: Frontier, place: _Place) -> str:
    vertex, found = place.vertex, place.vertex.predicted
    band = "" if found is None else f" ({spell_number(found.low)} to {spell_number(found.high)})"
    outside = ", outside what was measured" if vertex.extrapolated and found is not None else ""
    bits, size = _bits(frontier, vertex), spell_decimal_bytes(vertex.size_bytes)
    return f"{bits:.3f} bits, file {size}: {spell_number(place.value)}{band}{outside}"
