"""frontier.html and the tables of frontier, explain, what-if and diff, on artifacts made by hand."""

import re
from pathlib import Path

import fake_runs
import pytest

from cptquant.core.explanation import PlanComparison, PlanSummary, SiteChange
from cptquant.core.forecast import Interval
from cptquant.reports.figures.frontier import draw_frontier_band, shown_places
from cptquant.reports.frontier import frontier_table, write_frontier_page
from cptquant.reports.plan_tables import comparison_table


def test_the_page_is_wellformed_and_loads_nothing(tmp_path: Path, read_page) -> None:
    path = tmp_path / "frontier.html"
    write_frontier_page(path, fake_runs.frontier())
    page, text = read_page(path), path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|<img|\bsrc=", text.replace("http://www.w3.org", ""))
    assert page.count("svg") == 1 and page.count("circle") == 2
    assert "prefers-color-scheme: dark" in text
    assert "Frontier of made<b>" in page.text and "<b>" not in text.split("</title>")[1]
    assert "2 of 2 measured points lie in the 90 % band that the other points give." in page.text
    for budget in ("3bpw", "5bpw", "7bpw"):
        assert budget in page.text
    assert text.count("block.") == 5 - 1  # the first vertex is the smallest plan, not a change


def test_what_lies_outside_is_marked() -> None:
    drawing = draw_frontier_band(fake_runs.frontier(inside=False), "frontier")
    assert drawing.count('class="s-uniform"') == 2 and "outside the others&#x27; band" in drawing
    assert 'class="law c0 dashed"' in drawing and 'class="area c0"' in drawing
    inside = draw_frontier_band(fake_runs.frontier(), "frontier")
    assert inside.count('class="s-quantized"') == 2 and "outside the others" not in inside
    assert "0 of 2 measured points" in frontier_table(fake_runs.frontier(inside=False))


def test_the_picture_shows_vertices_where_they_are() -> None:
    frontier = fake_runs.frontier()
    places = shown_places(frontier)
    assert [place.x for place in places] == [2.0, 4.0, 6.0, 8.0]  # the vertex without damage has no place
    for place, vertex in zip(places, frontier.vertices, strict=False):
        assert vertex.predicted is not None
        assert (place.low, place.value, place.high) == (
            vertex.predicted.low, vertex.predicted.value, vertex.predicted.high,
        )  # fmt: skip


def test_without_a_calibration_no_band_is_claimed(tmp_path: Path, read_page) -> None:
    frontier = fake_runs.frontier(calibrated=False)
    path = tmp_path / "frontier.html"
    write_frontier_page(path, frontier)
    page = read_page(path)
    assert "so nothing says which loss it means" in page.text
    assert 'class="area' not in draw_frontier_band(frontier, "frontier")
    table = frontier_table(frontier)
    assert "No band: nothing calibrates this table's damages; measure 3 points or more" in table
    assert "measured points lie" not in table


@pytest.mark.parametrize("known", [True, False])
def test_a_comparison_says_what_is_known(known: bool) -> None:
    def summary(size: int) -> PlanSummary:
        return PlanSummary(
            label=f"plan-{size}", budget="3bpw", target="gguf", size_bytes=size, site_bytes=size, bits_per_weight=3.0,
            bits_per_weight_sites=3.0, damage=0.5 if known else None, damage_unit=None,
            predicted=Interval(value=0.1, low=0.08, high=0.12) if known else None,
            measured=0.11 if known else None, measured_stderr=0.004, measured_n=100,
        )  # fmt: skip

    changes = tuple(
        SiteChange(site=f"block.{i}", before="int2-g64", after="int3-g64", bytes_before=None if i == 0 else 10,
                   bytes_after=20) for i in range(45)
    )  # fmt: skip
    text = comparison_table(
        PlanComparison(
            measure="kl_nats_per_token", before=summary(1000), after=summary(900), changes=changes,
            ratio=Interval(value=1.2, low=1.1, high=1.3) if known else None, notes=("made by hand",),
        )
    )  # fmt: skip
    assert "-100 bytes in the file. Loss: KL to original." in text and "Made by hand." in text
    assert "And 5 more; --json lists all." in text and "shared" in text and "+10" in text
    assert ("Predicted loss after over before: 1.20 (1.10 to 1.30, 90 % band)." in text) == known
    assert ("No predicted loss: nothing calibrates these damages" in text) != known
    assert ("0.1100 ± 0.0040" in text) == known
