import math
import re
from xml.etree import ElementTree

import fake_runs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.layout import Site
from cptquant.core.sensitivity import BlockScore
from cptquant.reports.figures.arrangement import arrange, format_of_width, reference_code_bits
from cptquant.reports.figures.comparison import VariantPoint, draw_distances, draw_sizes
from cptquant.reports.figures.depth import draw_block_scores, draw_curve_panels, draw_role_panels
from cptquant.reports.figures.errors import draw_errors
from cptquant.reports.figures.grids import HEAT_STEPS, HeatScale, draw_heat_map, draw_plan
from cptquant.reports.svg import Canvas, Scale, tight_scale, value_scale


def _titles(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("title")]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans(), st.integers(2, 8))
@settings(deadline=None, max_examples=300)
def test_ticks_lie_inside_rise_and_are_few(low: float, span: float, logarithmic: bool, most: int) -> None:
    low = abs(low) + 1e-6 if logarithmic else low
    scale = Scale(low, low + span, 0, 100, logarithmic)
    if (scale.high <= scale.low * (1 + 1e-9) and logarithmic) or scale.high - scale.low < 1e-9 * abs(low):
        return
    ticks = scale.ticks(most)
    tolerance = 1e-6 * max(abs(scale.low), abs(scale.high))
    assert all(scale.low - tolerance <= tick <= scale.high + tolerance for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 2 * most + 1


def test_scales_place_and_clamp() -> None:
    linear, decades = Scale(0, 10, 100, 0), Scale(1e-4, 1, 0, 400, True)
    assert [linear(value) for value in (0, 5, 10, 20, -1)] == [100, 50, 0, 0, 100]
    assert [round(decades(value)) for value in (1e-4, 1e-2, 1, 0, 1e-9)] == [0, 200, 400, 0, 0]
    assert value_scale([0, 0], 0, 1, logarithmic=True).logarithmic is False
    assert value_scale([3, 4], 0, 1, logarithmic=False).low == 0
    assert value_scale([-1, 4], 0, 1, logarithmic=False).low < -1
    assert tight_scale([5, 5], 0, 1).low < 5 < tight_scale([5, 5], 0, 1).high


def test_canvas_escapes_what_it_is_given() -> None:
    canvas = Canvas(10, 10, '"<label>&')
    canvas.text(1, 2, "<b>", title="<t>&")
    canvas.rect(0, 0, 1, 1, "x", title="<script>")
    canvas.dots([(1, 1, "</title>")], 2, "mark")
    root = ElementTree.fromstring(canvas.render())
    assert root.get("aria-label") == '"<label>&'
    assert {element.tag for element in root.iter()} == {"svg", "text", "title", "rect", "g", "path"}
    assert _titles(canvas.render()) == ["<t>&", "<script>", "</title>"]


@pytest.mark.parametrize("run", [fake_runs.OPT, fake_runs.HUGE, fake_runs.ENCODER], ids=lambda run: run.source)
def test_every_site_is_in_exactly_one_cell_of_the_plan(run: fake_runs.FakeRun) -> None:
    layout, plan = run.layout, run.plan()
    titles = [title for drawing in draw_plan(plan, layout) for title in _titles(drawing)]
    cells = [title for title in titles if ": " in title]
    assert len(cells) == len(set(cells)) == len(layout.sites)
    shown = [text.text for svg in draw_plan(plan, layout) for text in ElementTree.fromstring(svg).iter("text")]
    for code_bits in {fmt.code_bits for fmt in plan.quant_formats.values()}:
        count = sum(fmt.code_bits == code_bits for fmt in plan.quant_formats.values())
        labels = sum(index == code_bits for index in range(layout.block_count))  # block numbers under the cells
        assert shown.count(str(code_bits)) == count + labels


def test_blocks_are_folded_into_strips_that_fit_a_page() -> None:
    strips = arrange(fake_runs.HUGE.layout).strips
    assert [len(strip) for strip in strips] == [27, 27, 26]
    assert [index for strip in strips for index in strip] == list(range(80))
    assert arrange(fake_runs.OPT.layout).strips == (range(12),)


def test_a_role_that_repeats_in_a_block_gets_rows_of_its_own() -> None:
    sites = tuple(
        Site(name=f"h.{block}.{name}", out_features=4, in_features=4, block_index=block, role="other")
        for block in range(2)
        for name in ("fc", "mlp.fc", "proj")
    )
    arrangement = arrange(fake_runs.OPT.layout.model_copy(update={"sites": sites, "block_count": 2}))
    assert arrangement.rows == ("fc", "fc 2", "proj")
    assert len(arrangement.cells) == 6


def test_heat_map_shows_every_damage_once_and_leaves_sixteen_bits_out() -> None:
    table, layout = fake_runs.OPT.table("tdmpq"), fake_runs.OPT.layout
    heat_map = draw_heat_map(table, layout)
    assert heat_map is not None
    integer = sum(name != "float16" for row in table.damages.values() for name in row)
    cells = [title for _, svg in heat_map.drawings for title in _titles(svg) if ": " in title]
    assert len(cells) == heat_map.cell_count == integer
    assert [name for name, _ in heat_map.drawings][-1] == "int8-g64, int8-channel-plain"
    assert draw_heat_map(table, layout, most_cells=integer - 1) is None


def test_heat_colours_are_logarithmic_and_monotone() -> None:
    scale = HeatScale(1e-6, 1)
    styles = [scale.style(10.0**power) for power in range(-8, 1)]
    assert styles == sorted(styles)
    assert (styles[0], styles[-1], scale.style(0)) == ("h0", f"h{HEAT_STEPS - 1}", "hz")
    assert scale.style(1e-3) == f"h{HEAT_STEPS // 2}"
    assert HeatScale(2, 2).style(2) == f"h{HEAT_STEPS - 1}"


def test_bars_are_as_long_as_their_scores_and_whiskers_as_their_errors() -> None:
    scores = tuple(BlockScore(block_index=i, value=float(i + 1), stderr=0.5, n=9) for i in range(4))
    table = fake_runs.OPT.table("cmpq").model_copy(update={"block_scores": scores})
    layout = fake_runs.OPT.layout.model_copy(update={"block_count": 4})
    root = ElementTree.fromstring(draw_block_scores(table, layout))
    heights = [float(rect.get("height", 0)) for rect in root.iter("rect") if rect.get("class") == "bar"]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 3, 4], rel=0.01)
    (whiskers,) = (path.get("d", "") for path in root.iter("path") if path.get("class") == "whisker")
    ends = [(float(y), float(v)) for y, v in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", whiskers)]
    assert [start - end for start, end in ends] == pytest.approx([heights[0]] * 4, abs=0.2)
    bands = [float(rect.get("width", 0)) for rect in root.iter("rect") if rect.get("class") == "band"]
    assert bands == pytest.approx([0.3 * 962, 0.3 * 962], abs=0.2)


def test_scores_that_span_decades_are_dots_not_bars() -> None:
    scores = tuple(BlockScore(block_index=i, value=10.0**-i, stderr=None, n=9) for i in range(6))
    svg = draw_block_scores(
        fake_runs.OPT.table("cmpq").model_copy(update={"block_scores": scores}), fake_runs.OPT.layout
    )
    assert 'class="bar"' not in svg and svg.count("<circle") == 6


def test_role_panels_show_the_value_of_the_reference_width() -> None:
    table, layout = fake_runs.OPT.table("tdmpq"), fake_runs.OPT.layout
    assert reference_code_bits(table, layout.block_sites) == 4
    assert reference_code_bits(table, layout.sites) == 8  # the embedding has 8 bits only
    assert format_of_width(table, layout.sites[0], 4) is None
    panels = dict(draw_role_panels(table, arrange(layout), 4))
    assert list(panels) == ["q", "k", "v", "o", "up", "down"]
    damage = table.damages["model.decoder.layers.5.up_proj"]["int4-g64"]
    assert f"5: {damage.value:.4f} ±" in " ".join(_titles(panels["up"]))


def test_curves_share_an_axis_only_where_their_names_differ_by_a_number() -> None:
    curves = {
        "loss_at_0.1": {"0": 1.0, "1": 2.0}, "loss_at_0.5": {"0": 100.0, "1": 200.0},
        "accuracy_drop": {"0": -0.01, "1": 0.02}, "empty": {}, "no block": {"total": 3.0},
    }  # fmt: skip
    panels = dict(draw_curve_panels(curves, 2))
    assert list(panels) == ["loss at 0.1", "loss at 0.5", "accuracy drop"]

    def ticks(svg: str) -> list[str]:
        return [text.text or "" for text in ElementTree.fromstring(svg).iter("text") if "end" in text.get("class", "")]

    assert ticks(panels["loss at 0.1"]) == ticks(panels["loss at 0.5"]) != ticks(panels["accuracy drop"])


def test_comparison_places_variants_in_order_of_their_values() -> None:
    points = [
        VariantPoint("quantized", "Quantized", 1e6, 0.02, 0.001),
        VariantPoint("uniform", "Uniform bits", 1e6, 0.04, None),
        VariantPoint("random", "Random bits", 0.9e6, 0.08, 0.0),
    ]
    distances = draw_distances(points, "KL")
    assert _titles(distances)[0] == "Quantized: 0.0200 ± 0.0010 at 1.00 MB (977 KiB)"
    assert distances.count('class="whisker"') == 1
    root = ElementTree.fromstring(draw_sizes(points, "KL"))
    disc, square = root.find("circle"), root.find("rect")
    assert disc is not None and square is not None
    assert float(disc.get("cy", 0)) > float(square.get("y", 0))
    assert math.isclose(float(disc.get("cx", 0)), float(square.get("x", 0)) + 5.5, abs_tol=0.2)


def test_error_dots_leave_out_sites_without_an_error() -> None:
    manifest, layout = fake_runs.CLASSIFIER.manifest(), fake_runs.CLASSIFIER.layout
    svg = draw_errors(manifest, layout, lambda record: record.relative_output_error, "errors")
    assert svg is not None
    with_error = [record for record in manifest.sites if record.relative_output_error]
    assert len(_titles(svg)) == len(with_error) < len(manifest.sites)
    assert draw_errors(manifest, layout, lambda record: None, "errors") is None


def test_infinite_damages_have_a_place_in_every_picture() -> None:
    table, layout = fake_runs.OPT.table("tdmpq"), fake_runs.OPT.layout
    site = "model.decoder.layers.3.q_proj"
    row = {
        name: damage.model_copy(update={"value": math.inf, "stderr": None})
        for name, damage in table.damages[site].items()
    }
    scores = (table.block_scores[0].model_copy(update={"value": math.inf}), *table.block_scores[1:])
    changed = table.model_copy(update={"damages": {**table.damages, site: row}, "block_scores": scores})
    heat_map = draw_heat_map(changed, layout)
    assert heat_map is not None
    drawings = [svg for _, svg in heat_map.drawings] + [svg for _, svg in draw_role_panels(changed, arrange(layout), 4)]
    drawings.append(draw_block_scores(changed, layout))
    assert any("∞" in title for svg in drawings for title in _titles(svg))
    assert not any(word in re.sub("<title>.*?</title>", "", svg) for svg in drawings for word in ("nan", "inf"))
