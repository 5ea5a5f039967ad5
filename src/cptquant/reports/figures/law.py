"""A fitted law: curves with their intervals over the observed points, and where it breaks a requirement."""

from collections.abc import Sequence
from dataclasses import dataclass

from cptquant.core.laws import Curve, CurveSet, RequirementCheck
from cptquant.reports.quantities import spell_number, spell_tick
from cptquant.reports.svg import Canvas, Cell, Frame, Scale, draw_value_axis, tight_scale, value_scale

_QUANTITIES = {"N": "parameters", "D": "tokens", "r": "domain share r"}
_WIDTH, _HEIGHT = 520.0, 280.0


@dataclass(frozen=True)
class Mark:
    """A point to mark: x with its interval, and the loss there."""

    x: float
    low: float
    high: float
    loss: float
    title: str


def draw_curves(
    curves: CurveSet, label: str, *, mark: Mark | None = None, limit: float | None = None, limit_label: str = "limit"
) -> str:
    """Loss against one quantity: a line and a shaded 90% interval per curve, observed points as dots."""
    canvas = Canvas(_WIDTH, _HEIGHT, label)
    frame = Frame(52, 12, 420, _HEIGHT - 44)
    values = [value for curve in curves.curves for value in (*curve.low, *curve.high)]
    values += [loss for curve in curves.curves for _, loss in curve.observed]
    values += [limit] if limit is not None else []
    scale = tight_scale(values, frame.bottom, frame.top)
    draw_value_axis(canvas, frame, scale)
    across = _horizontal(canvas, frame, curves)
    if limit is not None:
        canvas.line((frame.left, scale(limit)), (frame.right, scale(limit)), "limit")
        canvas.text(frame.right + 8, scale(limit) + 4, limit_label, "tick")
    places: list[tuple[float, str]] = []
    for index, curve in enumerate(curves.curves):
        _draw_curve(canvas, curve, across, scale, index)
        if curve.label:
            places.append((scale(curve.value[-1]), curve.label))
    _label_ends(canvas, frame, places)
    if mark is not None:
        x, y = across(mark.x), scale(mark.loss)
        canvas.line((across(mark.low), y), (across(mark.high), y), "whisker")
        canvas.line((x, y), (x, frame.bottom), "whisker")
        canvas.dot(x, y, 6, "s-uniform", title=mark.title)
    return canvas.render()


def _horizontal(canvas: Canvas, frame: Frame, curves: CurveSet) -> Scale:
    xs = [x for curve in curves.curves for x in curve.x]
    if curves.quantity == "r":
        scale = Scale(min(xs), max(xs), frame.left, frame.right)
    else:
        scale = value_scale(xs, frame.left, frame.right, logarithmic=True)
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    for tick in scale.ticks(6):
        canvas.line((scale(tick), frame.bottom), (scale(tick), frame.bottom + 4), "axis")
        text = spell_tick(tick) if curves.quantity == "r" else spell_large(tick)
        canvas.text(scale(tick), frame.bottom + 17, text, "tick mid")
    canvas.text(frame.right, frame.bottom + 34, _QUANTITIES[curves.quantity], "tick end")
    return scale


def spell_large(value: float) -> str:
    """`500M`, `1.8B`, `20B`."""
    for name, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{name}"
    return f"{value:.3g}"


def _draw_curve(canvas: Canvas, curve: Curve, across: Scale, scale: Scale, index: int) -> None:
    colour = f"c{index % 8}"
    upper = [(across(x), scale(y)) for x, y in zip(curve.x, curve.high, strict=True)]
    lower = [(across(x), scale(y)) for x, y in zip(curve.x, curve.low, strict=True)]
    outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)])
    canvas.shape(f"M{outline}Z", f"area {colour}")
    line = [(across(x), scale(y)) for x, y in zip(curve.x, curve.value, strict=True)]
    canvas.polyline(line, f"law {colour}")
    if curve.observed:
        places = [(across(x), scale(y), f"{curve.label} {spell_number(y, 5)}".strip()) for x, y in curve.observed]
        canvas.dots(places, 2.6, colour)


def _label_ends(canvas: Canvas, frame: Frame, places: Sequence[tuple[float, str]]) -> None:
    """Labels at the right ends of curves, pushed apart so that they do not touch."""
    taken = frame.top - 20
    for y, text in sorted(places):
        taken = max(y, taken + 13)
        canvas.text(frame.right + 8, taken + 4, text, "tick")


def draw_violations(check: RequirementCheck, label: str) -> str | None:
    """Tokens against share at the middle size, violated cells dark; None where the check has no map."""
    if not check.violated or not check.tokens or not check.shares:
        return None
    rows, columns = len(check.tokens), len(check.shares)
    if rows < 2 or columns < 2:
        return None
    canvas = Canvas(330, 210, label)
    frame = Frame(48, 8, 322, 168)
    width, height = (frame.right - frame.left) / columns, (frame.bottom - frame.top) / rows
    cells = [
        Cell(
            frame.left + column * width,
            frame.bottom - (row + 1) * height,
            "h6" if check.violated[row][column] else "h0",
            f"{spell_large(check.tokens[row])} tokens, share {check.shares[column]:.2f}: "
            f"{'violated' if check.violated[row][column] else 'met'}",
        )
        for row in range(rows)
        for column in range(columns)
    ]
    canvas.cells(cells, width - 0.6, height - 0.6)
    for row in range(0, rows, max(1, rows // 4)):
        y = frame.bottom - (row + 0.5) * height
        canvas.text(frame.left - 6, y + 3.5, spell_large(check.tokens[row]), "tick end")
    for column in range(0, columns, max(1, columns // 5)):
        x = frame.left + (column + 0.5) * width
        canvas.text(x, frame.bottom + 14, f"{check.shares[column]:.2f}", "tick mid")
    canvas.text(frame.right, frame.bottom + 32, "share of the corpus whose loss it is", "tick end")
    return canvas.render()
