"""How far each variant is from the original, beside its size; and what the table predicts over budgets."""

from collections.abc import Sequence
from dataclasses import dataclass

from cptquant.reports.quantities import spell_bytes, spell_decimal_bytes, spell_measured, spell_number, spell_tick
from cptquant.reports.run_folder import FrontierPoint
from cptquant.reports.svg import Canvas, Frame, Scale, draw_value_axis, tight_scale, value_scale

_LEAST_SPAN = 0.2  # of the largest size: variants at equal bytes must not look far apart


@dataclass(frozen=True)
class VariantPoint:
    """One variant: size and distance to the original.

    Attributes:
        subject: "quantized" or a baseline; also the CSS class of its mark.
        label: for people.
    """

    subject: str
    label: str
    size_bytes: float
    value: float
    stderr: float | None

    @property
    def title(self) -> str:
        """Exact values for hovering."""
        return f"{self.label}: {spell_measured(self.value, self.stderr)} at {spell_bytes(self.size_bytes)}"


def draw_distances(points: Sequence[VariantPoint], label: str) -> str:
    """One row per variant: the distance with ± one standard error, from zero; the value beside it."""
    row_height = 34.0
    canvas = Canvas(500, row_height * len(points) + 34, label)
    frame = Frame(84, 4, 372, row_height * len(points) + 6)
    ends = [point.value + (point.stderr or 0) for point in points]
    scale = value_scale(ends, frame.left, frame.right, logarithmic=False)
    for tick in scale.ticks(4):
        x = scale(tick)
        canvas.line((x, frame.top), (x, frame.bottom), "grid")
        canvas.text(x, frame.bottom + 15, spell_tick(tick), "tick mid")
    for index, point in enumerate(points):
        y = frame.top + (index + 0.5) * row_height
        canvas.text(frame.left - 10, y + 4, point.label, "label end")
        canvas.line((frame.left, y), (scale(point.value), y), f"stem s-{point.subject}")
        if point.stderr:
            low, high = scale(max(point.value - point.stderr, scale.low)), scale(point.value + point.stderr)
            canvas.line((low, y), (high, y), "whisker")
        draw_mark(canvas, point.subject, scale(point.value), y, title=point.title)
        canvas.text(frame.right + 12, y + 4, spell_measured(point.value, point.stderr), "label")
    canvas.line((frame.left, frame.top), (frame.left, frame.bottom), "axis")
    return canvas.render()


def draw_sizes(points: Sequence[VariantPoint], label: str) -> str:
    """Distance against bytes."""
    canvas = Canvas(500, 250, label)
    frame = Frame(62, 10, 490, 208)
    scale = value_scale(
        [point.value + (point.stderr or 0) for point in points], frame.bottom, frame.top, logarithmic=False
    )
    draw_value_axis(canvas, frame, scale)
    sizes = _draw_size_axis(canvas, frame, [point.size_bytes for point in points])
    for point in points:
        x, y = sizes(point.size_bytes), scale(point.value)
        if point.stderr:
            low = max(point.value - point.stderr, scale.low)
            canvas.line((x, scale(low)), (x, scale(point.value + point.stderr)), "whisker")
        draw_mark(canvas, point.subject, x, y, title=point.title)
        near_right = x > frame.right - 90
        canvas.text(x - 11 if near_right else x + 11, y + 4, point.label, "label end" if near_right else "label")
    return canvas.render()


def draw_frontier(frontier: Sequence[FrontierPoint], plan_point: FrontierPoint | None, label: str) -> str:
    """Predicted damage against bytes over budgets, with the plan on it."""
    canvas = Canvas(500, 250, label)
    frame = Frame(62, 10, 490, 208)
    every = [*frontier, *([plan_point] if plan_point else [])]
    scale = value_scale([point.predicted_damage for point in every], frame.bottom, frame.top, logarithmic=True)
    draw_value_axis(canvas, frame, scale)
    sizes = _draw_size_axis(canvas, frame, [point.size_bytes for point in every])
    places = [(sizes(point.size_bytes), scale(point.predicted_damage)) for point in frontier]
    canvas.polyline(places, "curve")
    for point, (x, y) in zip(frontier, places, strict=True):
        canvas.dot(x, y, 2.5, "mark", title=_spell_frontier(point))
    if plan_point is not None:
        x, y = sizes(plan_point.size_bytes), scale(plan_point.predicted_damage)
        draw_mark(canvas, "quantized", x, y, title=f"plan: {_spell_frontier(plan_point)}")
        canvas.text(x + 10, y - 8, "plan", "label")
    return canvas.render()


def _spell_frontier(point: FrontierPoint) -> str:
    return f"{spell_number(point.predicted_damage)} at {spell_bytes(point.size_bytes)}"


def _draw_size_axis(canvas: Canvas, frame: Frame, sizes: Sequence[float]) -> Scale:
    room = _LEAST_SPAN * max(sizes) / 2
    middle = (min(sizes) + max(sizes)) / 2
    scale = tight_scale([*sizes, middle - room, middle + room], frame.left, frame.right)
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    for tick in scale.ticks(5):
        canvas.line((scale(tick), frame.bottom), (scale(tick), frame.bottom + 4), "axis")
        canvas.text(scale(tick), frame.bottom + 17, spell_decimal_bytes(tick), "tick mid")
    canvas.text(frame.right, frame.bottom + 36, "bytes of all tensors", "tick end")
    return scale


def draw_mark(canvas: Canvas, subject: str, x: float, y: float, *, title: str = "") -> None:
    """A mark whose shape as well as colour tells the variant: disc, square, triangle; other baselines a diamond."""
    style = f"s-{subject}"
    if subject == "uniform":
        canvas.rect(x - 5.5, y - 5.5, 11, 11, style, title=title, radius=1)
    elif subject == "random":
        canvas.shape(f"M{x:.1f} {y - 7:.1f}l7 12h-14z", style, title=title)
    elif subject in ("preset", "unrefined", "parent"):
        canvas.shape(f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", style, title=title)
    else:
        canvas.dot(x, y, 6.5, style, title=title)
