"""Relative errors of every quantized site over depth."""

from collections.abc import Callable

from cptquant.core.layout import ModelLayout, Site
from cptquant.core.manifest import Manifest, SiteRecord
from cptquant.reports.figures.arrangement import arrange, site_label
from cptquant.reports.quantities import spell_number
from cptquant.reports.svg import Canvas, Frame, draw_block_axis, draw_value_axis, value_scale

ROLE_COLOURS = 8
_OUTSIDE_ROOM = 64.0

ErrorOf = Callable[[SiteRecord], float | None]


def draw_errors(manifest: Manifest, layout: ModelLayout, error_of: ErrorOf, label: str) -> str | None:
    """A dot per site: blocks from left to right, roles side by side within a block and by colour.

    Args:
        error_of: the record's error, None where a site has none; zero errors (16 bits) are not drawn.

    Returns:
        svg, or None if no site has such an error.
    """
    errors = {record.site: (record, error_of(record)) for record in manifest.sites}
    values = [error for _, error in errors.values() if error is not None and error > 0]
    if not values:
        return None
    arrangement = arrange(layout)
    outside = [site for site in arrangement.outside if (errors.get(site.name, (None, None))[1] or 0) > 0]
    canvas = Canvas(1022, 222, label)
    frame = Frame(58, 10, 1020 - (_OUTSIDE_ROOM if outside else 0), 200)
    scale = value_scale(values, frame.bottom, frame.top, logarithmic=True)
    blocks = draw_block_axis(canvas, frame, layout.block_count)
    draw_value_axis(canvas, Frame(frame.left, frame.top, 1020, frame.bottom), scale)

    dots: dict[int, list[tuple[float, float, str]]] = {}

    def place(site: Site, x: float, colour: int) -> None:
        record, error = errors.get(site.name, (None, None))
        if record is not None and error is not None and error > 0:
            title = f"{site_label(site)} · {record.format}: {spell_number(error)}"
            dots.setdefault(colour % ROLE_COLOURS, []).append((x, scale(error), title))

    count = len(arrangement.rows)
    for (row, block_index), site in arrangement.cells.items():
        position = arrangement.rows.index(row)
        place(site, blocks(block_index + (position + 0.75) / (count + 0.5)), position)
    for index, site in enumerate(outside):
        x = frame.right + 14 + (_OUTSIDE_ROOM - 22) * (index + 0.5) / len(outside)
        place(site, x, ROLE_COLOURS - 1)
    for colour, places in sorted(dots.items()):
        canvas.dots(places, 3.6 if layout.block_count <= 40 else 2.4, f"c{colour}")
    if outside:
        canvas.text(frame.right + _OUTSIDE_ROOM / 2 + 2, frame.bottom + 14, "outside", "tick mid")
    return canvas.render()


def role_legend(layout: ModelLayout) -> list[tuple[str, int]]:
    """(role, colour number) for the roles of the dots."""
    return [(row, index % ROLE_COLOURS) for index, row in enumerate(arrange(layout).rows)]
