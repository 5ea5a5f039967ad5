"""Where each site stands in a picture: transformer blocks from left to right, one row per role."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.sensitivity import SensitivityTable

MOST_BLOCKS_A_STRIP = 32  # beyond, the blocks are folded into several strips so that cells stay readable
MOST_CELLS = 4000  # beyond, pictures with one cell per site and format no longer fit a megabyte


@dataclass(frozen=True)
class Arrangement:
    """Sites by row and block.

    Attributes:
        rows: labels from top to bottom, in forward order. cells: (row, block index) -> site.
        outside: sites that belong to no block: embedding, projections, pooler, head.
    """

    rows: tuple[str, ...]
    cells: dict[tuple[str, int], Site]
    outside: tuple[Site, ...]
    block_count: int

    @property
    def strips(self) -> tuple[range, ...]:
        """Block ranges of nearly equal length, at most `MOST_BLOCKS_A_STRIP` each."""
        count = -(-self.block_count // MOST_BLOCKS_A_STRIP)
        if count == 0:
            return ()
        length = -(-self.block_count // count)
        return tuple(
            range(start, min(start + length, self.block_count)) for start in range(0, self.block_count, length)
        )


def arrange(layout: ModelLayout) -> Arrangement:
    """Give every site its row; a role that occurs several times in a block gets several rows."""
    cells: dict[tuple[str, int], Site] = {}
    for site in layout.block_sites:
        block_index = site.block_index or 0
        label = row_label(site)
        row, repeat = label, 1
        while (row, block_index) in cells:
            repeat += 1
            row = f"{label} {repeat}"
        cells[row, block_index] = site
    return Arrangement(
        rows=tuple(dict.fromkeys(row for row, _ in cells)),
        cells=cells,
        outside=tuple(site for site in layout.sites if site.block_index is None),
        block_count=layout.block_count,
    )


def row_label(site: Site) -> str:
    """The role, or for a role we do not know the last part of the module path."""
    return site.role if site.role != "other" else site.name.rsplit(".", 1)[-1]


def site_label(site: Site) -> str:
    """Short name for hover titles and lists."""
    return row_label(site) if site.block_index is None else f"block {site.block_index} · {row_label(site)}"


def short_label(site: Site) -> str:
    """`38 q`: for hover titles of pictures with thousands of cells."""
    return row_label(site) if site.block_index is None else f"{site.block_index} {row_label(site)}"


def reference_code_bits(table: SensitivityTable, sites: Sequence[Site]) -> int | None:
    """The width at which sites are compared in one line chart: of those every site has, the nearest to 4 bits.

    Four bits is the narrowest width of the CPTQuant paper. None if the sites share no integer width.
    """
    rows = [{_integer_bits(name) for name in table.damages.get(site.name, {})} for site in sites]
    shared = set[int | None].intersection(*rows) - {None} if rows else set[int | None]()
    widths = [width for width in shared if width is not None]
    return min(widths, key=lambda width: (abs(width - 4), width), default=None)


def format_of_width(table: SensitivityTable, site: Site, code_bits: int) -> str | None:
    """The site's first format of that width, None if it has none."""
    names = table.damages.get(site.name, {})
    return next((name for name in names if _integer_bits(name) == code_bits), None)


@cache
def parse_format(name: str) -> QuantFormat:
    """`QuantFormat.parse`, once per spelling: a deep model repeats a handful of them thousands of times."""
    return QuantFormat.parse(name)


def _integer_bits(format_name: str) -> int | None:
    fmt = parse_format(format_name)
    return None if fmt.is_float else fmt.code_bits
