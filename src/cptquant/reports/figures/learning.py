"""What training a block brought, over depth."""

from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import Manifest
from cptquant.reports.quantities import spell_number
from cptquant.reports.svg import Canvas, Frame, draw_block_axis, draw_value_axis, value_scale

BEFORE, AFTER = 7, 0
"""Colour numbers of the two series."""


def draw_block_training(manifest: Manifest, layout: ModelLayout, label: str) -> str | None:
    """Two dots a block: the relative squared error of its output on held-out text, before and after training.

    Returns:
        svg, or None where blocks were not trained on their own outputs.
    """
    block_of = {site.name: site.block_index for site in layout.sites}
    found: dict[int, tuple[float, float]] = {}
    for record in manifest.sites:
        block, learned = block_of.get(record.site), record.learning
        if block is not None and learned is not None and learned.objective.startswith("squared error of the block"):
            found[block] = (learned.held_out_before, learned.held_out_after)
    values = [value for pair in found.values() for value in pair if value > 0]
    if not values:
        return None
    canvas = Canvas(1022, 172, label)
    frame = Frame(58, 10, 1020, 150)
    scale = value_scale(values, frame.bottom, frame.top, logarithmic=True)
    blocks = draw_block_axis(canvas, frame, layout.block_count)
    draw_value_axis(canvas, frame, scale)
    for index, (name, colour) in enumerate((("after GPTQ", BEFORE), ("trained", AFTER))):
        places = [
            (blocks(block + 0.5), scale(pair[index]), f"block {block}, {name}: {spell_number(pair[index])}")
            for block, pair in sorted(found.items())
            if pair[index] > 0
        ]
        canvas.dots(places, 4.0, f"c{colour}")
    return canvas.render()
