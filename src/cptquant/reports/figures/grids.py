"""Sites as cells, blocks from left to right and roles from top to bottom: the plan, and the damages of a table."""

import math
from collections import Counter
from dataclasses import dataclass

from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import Damage, SensitivityTable
from cptquant.reports.figures.arrangement import MOST_CELLS, Arrangement, arrange, parse_format, row_label, short_label
from cptquant.reports.quantities import METHOD_NAMES, spell_measured, spell_number
from cptquant.reports.svg import Canvas, Cell, label_stride

_LABEL_ROOM = 70.0
_PLAN_CELL_HEIGHT = 26.0
HEAT_STEPS = 9
_HEAT_DECADES = 6  # values further below the largest share the faintest colour


def draw_plan(plan: Plan, layout: ModelLayout) -> list[str]:
    """The plan as a picture: bits in every cell, coloured by bits; sites outside the blocks in a drawing of their own.

    Returns:
        One or two svg elements; none if there are more cells than fit a page.
    """
    arrangement = arrange(layout)
    if len(arrangement.cells) > MOST_CELLS:
        return []
    longest = max((len(strip) for strip in arrangement.strips), default=1)
    width = max(24.0, min(46.0, (1000 - _LABEL_ROOM) / longest))
    drawings = [_draw_strips(plan, arrangement, width)] if arrangement.cells else []
    if arrangement.outside:
        drawings.append(_draw_outside(plan, arrangement.outside))
    return drawings


def _draw_strips(plan: Plan, arrangement: Arrangement, cell_width: float) -> str:
    gap = 32.0
    strips, rows = arrangement.strips, arrangement.rows
    strip_height = len(rows) * _PLAN_CELL_HEIGHT + gap
    width = _LABEL_ROOM + cell_width * max(len(strip) for strip in strips)
    canvas = Canvas(width, strip_height * len(strips) - 10, "bits of every site, by block and role")
    places: list[tuple[Site, float, float]] = []
    for strip_index, strip in enumerate(strips):
        top = strip_index * strip_height
        for row_index, row in enumerate(rows):
            y = top + row_index * _PLAN_CELL_HEIGHT
            canvas.text(_LABEL_ROOM - 8, y + _PLAN_CELL_HEIGHT / 2 + 4, row, "label end")
            for column, block_index in enumerate(strip):
                site = arrangement.cells.get((row, block_index))
                if site is not None:
                    places.append((site, _LABEL_ROOM + column * cell_width, y))
        for column, block_index in enumerate(strip):
            x = _LABEL_ROOM + (column + 0.5) * cell_width
            canvas.text(x, top + len(rows) * _PLAN_CELL_HEIGHT + 14, str(block_index), "tick mid")
    _draw_bits(canvas, plan, places, cell_width)
    return canvas.render()


def _draw_outside(plan: Plan, sites: tuple[Site, ...]) -> str:
    canvas = Canvas(150, _PLAN_CELL_HEIGHT * len(sites) + 22, "bits of the sites outside the blocks")
    for index, site in enumerate(sites):
        canvas.text(92, _PLAN_CELL_HEIGHT * index + 17, row_label(site)[:12], "label end", title=site.name)
    _draw_bits(canvas, plan, [(site, 100.0, _PLAN_CELL_HEIGHT * index) for index, site in enumerate(sites)], 46)
    canvas.text(123, _PLAN_CELL_HEIGHT * len(sites) + 14, "outside", "tick mid")
    return canvas.render()


def _draw_bits(canvas: Canvas, plan: Plan, places: list[tuple[Site, float, float]], cell_width: float) -> None:
    """A cell in the colour of its bits with their number in it, at the given upper left corners."""
    cells: list[Cell] = []
    labels: dict[int, list[tuple[float, float]]] = {}
    for site, x, y in places:
        fmt = plan.quant_formats.get(site.name)
        if fmt is not None:
            cells.append(Cell(x + 1, y + 1, f"b{fmt.code_bits}", f"{short_label(site)}: {fmt.name}"))
            labels.setdefault(fmt.code_bits, []).append((x + cell_width / 2, y + _PLAN_CELL_HEIGHT / 2 + 4))
    canvas.cells(cells, cell_width - 2, _PLAN_CELL_HEIGHT - 2)
    for code_bits, corners in labels.items():
        canvas.texts(corners, str(code_bits), f"bits t{code_bits}")


@dataclass(frozen=True)
class HeatScale:
    """Logarithmic colour steps from `low` (or below) to `high`."""

    low: float
    high: float

    def style(self, value: float) -> str:
        """CSS class of a value; zero has a class of its own."""
        if value <= 0:
            return "hz"
        if self.high <= self.low:
            return f"h{HEAT_STEPS - 1}"
        share = math.log(min(max(value, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return f"h{min(HEAT_STEPS - 1, int(share * HEAT_STEPS))}"


@dataclass(frozen=True)
class HeatMap:
    """Damages of one table: one drawing per width, on one colour scale.

    Attributes:
        drawings: (format names, svg). legend: svg of the colour scale.
    """

    drawings: tuple[tuple[str, str], ...]
    legend: str
    cell_count: int


def draw_heat_map(table: SensitivityTable, layout: ModelLayout, most_cells: int = MOST_CELLS) -> HeatMap | None:
    """Site × format on a logarithmic colour scale; 16 bits, which do no damage, are left out.

    Returns:
        None if there is nothing to show or more cells than `most_cells`.
    """
    panels = _heat_panels(table)
    damages = [damage.value for panel in panels for damage in panel.damages.values()]
    positive = [value for value in damages if 0 < value < math.inf]
    cell_count = sum(len(panel.damages) for panel in panels)
    if not positive or cell_count > most_cells:
        return None
    scale = HeatScale(max(min(positive), max(positive) / 10**_HEAT_DECADES), max(positive))
    arrangement = arrange(layout)
    method = METHOD_NAMES.get(table.method, table.method)
    drawings = tuple(
        (panel.label, _draw_panel(panel, arrangement, scale, f"{method} damage of {panel.label} by block and role"))
        for panel in panels
    )
    return HeatMap(drawings, _draw_heat_legend(scale), cell_count)


@dataclass(frozen=True)
class _Panel:
    """Damages of one width: most sites have it in one spelling, some (embeddings, odd sizes) in another."""

    label: str
    damages: dict[str, Damage]


def _heat_panels(table: SensitivityTable) -> list[_Panel]:
    """From few bits to many; a site's second format of the same width goes to a second panel."""
    found: dict[tuple[int, int], dict[str, tuple[str, Damage]]] = {}
    for site_name, row in table.damages.items():
        seen: dict[int, int] = {}
        for name, damage in row.items():
            fmt = parse_format(name)
            if not fmt.is_float:
                repeat = seen[fmt.code_bits] = seen.get(fmt.code_bits, -1) + 1
                found.setdefault((fmt.code_bits, repeat), {})[site_name] = (name, damage)
    panels: list[_Panel] = []
    for _, cells in sorted(found.items()):
        names = Counter(name for name, _ in cells.values())
        label = ", ".join(name for name, _ in names.most_common())
        panels.append(_Panel(label, {site: damage for site, (_, damage) in cells.items()}))
    return panels


def _draw_panel(panel: _Panel, arrangement: Arrangement, scale: HeatScale, label: str) -> str:
    count = max(1, arrangement.block_count)
    cell_width, cell_height = min(26.0, max(11.0, 252 / count), 950 / count), 15.0
    outside = [site for site in arrangement.outside if site.name in panel.damages]
    present = {row for (row, _), site in arrangement.cells.items() if site.name in panel.damages}
    rows = [row for row in arrangement.rows if row in present]
    height = cell_height * (len(rows) + len(outside)) + (18 if rows else 4)
    canvas = Canvas(_LABEL_ROOM + cell_width * (count if rows else 1), height, label)

    places = [
        (site, _LABEL_ROOM + block_index * cell_width, rows.index(row) * cell_height)
        for (row, block_index), site in arrangement.cells.items()
        if row in present
    ]
    for index, row in enumerate(rows):
        canvas.text(_LABEL_ROOM - 6, (index + 0.5) * cell_height + 3.5, row, "tick end")
    for index in range(0, arrangement.block_count if rows else 0, label_stride(count, cell_width * count)):
        canvas.text(_LABEL_ROOM + (index + 0.5) * cell_width, len(rows) * cell_height + 12, str(index), "tick mid")
    top = cell_height * len(rows) + (18 if rows else 0)
    for index, site in enumerate(outside):
        y = top + index * cell_height
        canvas.text(_LABEL_ROOM - 6, y + cell_height / 2 + 3.5, row_label(site)[:10], "tick end", title=site.name)
        places.append((site, _LABEL_ROOM, y))
    cells = [
        Cell(x, y, scale.style(damage.value), f"{short_label(site)}: {spell_measured(damage.value, damage.stderr)}")
        for site, x, y in places
        if (damage := panel.damages.get(site.name)) is not None
    ]
    canvas.cells(cells, cell_width - 1, cell_height - 1)
    return canvas.render()


def _draw_heat_legend(scale: HeatScale) -> str:
    canvas = Canvas(330, 18, "colour scale")
    low, high = spell_number(scale.low, 2), spell_number(scale.high, 2)
    canvas.text(70, 13, f"≤ {low}", "tick end")
    for step in range(HEAT_STEPS):
        canvas.cells([Cell(78 + 20 * step, 2, f"h{step}", "")], 20, 14)
    canvas.text(78 + 20 * HEAT_STEPS + 8, 13, high, "tick")
    return canvas.render()
