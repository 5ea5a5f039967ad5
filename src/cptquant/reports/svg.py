"""Small building blocks for inline SVG: escaped elements, linear and logarithmic scales, axes.

Written by hand rather than by a plotting library because the report must be one small file that follows the reader's
light or dark mode: colours are CSS classes, sizes are in viewBox units, exact values are in hover titles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from cptquant.reports.quantities import spell_tick


def number(value: float) -> str:
    """A coordinate: one decimal at most, no trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Cell:
    """One rectangle of a picture with very many: its upper left corner, CSS class and hover title."""

    x: float
    y: float
    style: str
    title: str


@dataclass
class Canvas:
    """A drawing of a fixed size in viewBox units; strings are escaped where they enter."""

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list[str])

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, *, title: str = "", radius: float = 0
    ) -> None:
        """A rectangle of CSS class `style`."""
        round_corner = f' rx="{number(radius)}"' if radius else ""
        self._add(
            "rect",
            f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"{round_corner}',
            style,
            title,
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """A straight line."""
        (x1, y1), (x2, y2) = start, end
        self._add("path", f'd="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"', style, "")

    def polyline(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """An open line through points."""
        if len(points) > 1:
            path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._add("path", f'd="M{path}"', style, "")

    def dot(self, x: float, y: float, radius: float, style: str, *, title: str = "") -> None:
        """A filled circle."""
        self._add("circle", f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"', style, title)

    def dots(self, places: Sequence[tuple[float, float, str]], radius: float, style: str) -> None:
        """Many discs of one style, each (x, y, hover title): strokes without length and with round ends, which take
        half the bytes of circles."""
        paths = (
            f'<path d="M{number(x)} {number(y)}h0"><title>{escape(title)}</title></path>' for x, y, title in places
        )
        attributes = f'class="dots {escape(style)}" stroke-width="{number(2 * radius)}"'
        self.parts.append(f"<g {attributes}>{''.join(paths)}</g>")

    def verticals(self, lines: Sequence[tuple[float, float, float]], style: str) -> None:
        """Many vertical lines of one style, each (x, from y, to y), in one element."""
        if lines:
            path = "".join(f"M{number(x)} {number(start)}V{number(end)}" for x, start, end in lines)
            self._add("path", f'd="{path}"', style, "")

    def cells(self, places: Sequence[Cell], width: float, height: float) -> None:
        """Many rectangles of one size, grouped by style and drawn as thick strokes, a third of the bytes of `rect`."""
        groups: dict[str, list[Cell]] = {}
        for place in places:
            groups.setdefault(place.style, []).append(place)
        for style, members in groups.items():
            paths = (
                f'<path d="M{number(cell.x)} {number(cell.y + height / 2)}h{number(width)}">'
                f"{f'<title>{escape(cell.title)}</title>' if cell.title else ''}</path>"
                for cell in members
            )
            attributes = f'class="cells {escape(style)}" stroke-width="{number(height)}"'
            self.parts.append(f"<g {attributes}>{''.join(paths)}</g>")

    def shape(self, path: str, style: str, *, title: str = "") -> None:
        """A path given as SVG path data (coordinates only, never user text)."""
        self._add("path", f'd="{path}"', style, title)

    def text(self, x: float, y: float, content: str, style: str = "", *, title: str = "") -> None:
        """A line of text at its baseline."""
        inner = f"<title>{escape(title)}</title>{escape(content)}" if title else escape(content)
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{_class(style)}>{inner}</text>')

    def texts(self, places: Sequence[tuple[float, float]], content: str, style: str) -> None:
        """The same text at many places, in one group."""
        shown = escape(content)
        texts = (f'<text x="{number(x)}" y="{number(y)}">{shown}</text>' for x, y in places)
        self.parts.append(f"<g{_class(style)}>{''.join(texts)}</g>")

    def render(self) -> str:
        """The svg element; it never grows beyond its natural size and shrinks with the page."""
        size = f'viewBox="0 0 {number(self.width)} {number(self.height)}"'
        style = f'style="width:{number(self.width)}px"'
        wide = _class("wide" if self.width > 900 else "")
        return f'<svg {size}{wide} {style} role="img" aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'

    def _add(self, tag: str, attributes: str, style: str, title: str) -> None:
        inner = f"><title>{escape(title)}</title></{tag}>" if title else "/>"
        self.parts.append(f"<{tag} {attributes}{_class(style)}{inner}")


def _class(style: str) -> str:
    return f' class="{escape(style)}"' if style else ""


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end]; logarithmic scales clamp what lies below `low`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values to label: powers of ten on a logarithmic scale, multiples of 1, 2 or 5 on a linear one."""
        return _log_ticks(self.low, self.high, most) if self.logarithmic else _linear_ticks(self.low, self.high, most)


def value_scale(values: Sequence[float], start: float, end: float, *, logarithmic: bool) -> Scale:
    """A scale that holds all values with a little room.

    Linear scales begin at zero unless a value is negative. Logarithmic ones span the positive values, at most eight
    decades below the largest; without a positive value the scale is linear.
    """
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if logarithmic and positive:
        high = max(positive)
        low = max(min(positive), high * 1e-8)
        room = max(0.06 * math.log10(high / low), 0.1)
        return Scale(low / 10**room, high * 10**room, start, end, True)
    high, low = max(finite, default=1.0), min(0.0, min(finite, default=0.0))
    if high <= low:
        high = low + 1.0
    room = 0.06 * (high - low)
    return Scale(low if low == 0 else low - room, high + room, start, end)


def tight_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A linear scale around the values that need not begin at zero: for positions such as file sizes."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def spans_decades(values: Sequence[float], ratio: float = 30) -> bool:
    """Whether the positive values differ so much that only a logarithmic axis shows them all."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(positive) and max(positive) / min(positive) > ratio


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(1, most)
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    # rounding removes 0.30000000000000004
    return [
        round(step * index, 12 - math.floor(math.log10(step)))
        for index in range(first, math.floor(high / step + 1e-9) + 1)
    ]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = list(range(first, last + 1))
    if len(decades) >= 3:
        stride = -(-len(decades) // most)
        return [10.0**power for power in decades[::stride]]
    for steps in ((1.0, 3.0), (1.0, 2.0, 5.0), tuple(range(1, 10))):
        ticks = [
            step * 10.0**power
            for power in range(first - 1, last + 1)
            for step in steps
            if low <= step * 10.0**power <= high
        ]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // most)]
    return [low, high]


@dataclass(frozen=True)
class Frame:
    """The plotting area inside a canvas, in viewBox units."""

    left: float
    top: float
    right: float
    bottom: float


def draw_value_axis(canvas: Canvas, frame: Frame, scale: Scale, *, most: int = 5) -> None:
    """Horizontal grid lines with their values on the left."""
    for tick in scale.ticks(most):
        y = scale(tick)
        canvas.line((frame.left, y), (frame.right, y), "grid")
        canvas.text(frame.left - 6, y + 3.5, spell_tick(tick), "tick end")


def draw_block_axis(canvas: Canvas, frame: Frame, block_count: int, *, bands: bool = True) -> Scale:
    """Block indices below the frame, the first and last 30 % of the depth shaded behind it.

    Returns:
        The scale on which block i occupies [i, i + 1].
    """
    scale = Scale(0, max(1, block_count), frame.left, frame.right)
    if bands:
        for first, last in ((0.0, 0.3 * block_count), (0.7 * block_count, float(block_count))):
            x = scale(first)
            canvas.rect(x, frame.top, scale(last) - x, frame.bottom - frame.top, "band")
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    room = frame.right - frame.left
    stride = label_stride(block_count, room)
    for index in range(0, block_count, stride):
        canvas.text(scale(index + 0.5), frame.bottom + 14, str(index), "tick mid")
    return scale


def label_stride(block_count: int, room: float) -> int:
    """Label every so many blocks that numbers do not touch."""
    fitting = max(1.0, room / 22)
    return next((step for step in (1, 2, 4, 5, 10, 20, 25, 50, 100) if block_count / step <= fitting), 200)
