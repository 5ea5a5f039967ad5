import fake_runs
import pytest

from cptquant.core.estimate import RunEstimate
from cptquant.core.formats import QuantFormat
from cptquant.reports import tables
from cptquant.reports.composition import portions_by_format, portions_by_role, site_bytes

RUNS = [fake_runs.OPT, fake_runs.CLASSIFIER, fake_runs.ENCODER, fake_runs.HUGE]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.source)
@pytest.mark.parametrize("name", ["quantized", "uniform", "random"])
def test_portions_and_sites_sum_to_the_plans_bytes(run: fake_runs.FakeRun, name: str) -> None:
    plan, layout = run.plan(name), run.layout
    assert sum(portion.size_bytes for portion in portions_by_format(plan, layout)) == plan.size_bytes
    assert sum(portion.size_bytes for portion in portions_by_role(plan, layout)) == plan.size_bytes
    assert sum(site_bytes(plan, layout).values()) + layout.kept_bytes == plan.size_bytes


@pytest.mark.parametrize("head", ["float16", "int4-g64"])
@pytest.mark.parametrize("embedding", ["float16", "int8-channel-plain"])
def test_a_shared_head_is_counted_as_it_is_stored(embedding: str, head: str) -> None:
    layout, plan = fake_runs.OPT.layout, fake_runs.OPT.plan()
    formats = {**plan.formats, "model.decoder.embed_tokens": embedding, "lm_head": head}
    size_bytes = layout.plan_bytes({site: QuantFormat.parse(name) for site, name in formats.items()})
    plan = type(plan).model_validate({**plan.model_dump(), "formats": formats, "size_bytes": size_bytes})
    sizes = site_bytes(plan, layout)
    assert sum(sizes.values()) + layout.kept_bytes == size_bytes
    if embedding == head == "float16":
        assert sizes["lm_head"] == 0


def test_result_table_says_all_a_person_needs() -> None:
    run = fake_runs.OPT
    text = tables.result_table(run.layout, run.plan(), run.evaluation())
    lines = text.splitlines()
    assert lines[0] == "embedded:opt-mini"
    assert lines[1].split("  ")[0] == "" and "Perplexity" in lines[1] and "KL to original" in lines[1]
    cells = {line.split("  ")[0]: line for line in lines[3:7]}
    assert list(cells) == ["Original", "Quantized", "Uniform bits", "Random bits"]
    assert "1.46 MB" in cells["Quantized"] and "23.39 ± 0.28" in cells["Quantized"]
    assert "0.02134 ± 0.00061" in cells["Quantized"] and "0.03414 ± 0.00098" in cells["Uniform bits"]
    assert "5.25 MB (5.00 MiB) of float16 weights became 1.46 MB (1.39 MiB), 27.8 % of the original." in text
    assert "74 of 74 sites quantized, 0 kept in 16 bits." in text
    assert "NLL +0.02080 ± 0.00092 nats/token, paired with the original on the same text." in text
    assert "Guard: KL on validation text" in text
    assert max(len(line) for line in lines[:7]) <= 100


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.source)
def test_tables_of_every_stage_render_for_every_kind_of_model(run: fake_runs.FakeRun) -> None:
    layout, plan, evaluation = run.layout, run.plan(), run.evaluation()
    assert "blocks of width" in tables.layout_table(layout)
    assert "Most sensitive of" in tables.sensitivity_table(run.table("tdmpq"), layout)
    assert "proven optimal for this table and budget" in tables.plan_table(plan, layout)
    assert "Weights on disk" in tables.evaluation_table(evaluation)
    assert "Uniform bits" in tables.result_table(layout, plan, evaluation)


def test_inspect_counts_every_site_once() -> None:
    rows = tables.layout_rows(fake_runs.OPT.layout).rows
    assert ["q", "12", "128 × 128", "197 k", "7.5 %"] in rows
    assert sum(int(row[1]) for row in rows) == len(fake_runs.OPT.layout.sites)


def test_measure_ranks_the_most_sensitive_first() -> None:
    table, layout = fake_runs.OPT.table("tdmpq"), fake_runs.OPT.layout
    blocks = tables.block_rows(table).rows
    worst = max(table.block_scores, key=lambda score: score.value)
    assert blocks[0][0] == str(worst.block_index) and len(blocks) == 10
    sites = tables.site_rows(table, layout)
    expected = max(layout.block_sites, key=lambda site: table.damages[site.name]["int4-g64"].value)
    assert sites.rows[0][:2] == [expected.name, "int4-g64"]
    assert "at 4 bits, damage in nats/token" in sites.title


def test_allocate_lists_formats_by_role() -> None:
    rows = {row[0]: row for row in tables.plan_rows(fake_runs.OPT.plan(), fake_runs.OPT.layout).rows}
    assert rows["embedding"][2] == "int8-channel-plain"
    counts = [part.split(" ×") for part in rows["q"][2].split(", ")]
    assert sum(int(count[1]) if len(count) > 1 else 1 for count in counts) == 12


def test_a_models_name_is_never_read_as_markup() -> None:
    run = fake_runs.FakeRun(source="[red]bold[/red] :smile:")
    assert "[red]bold[/red] :smile:" in tables.layout_table(run.layout)


def test_narrow_terminals_fold_cells_and_lose_nothing() -> None:
    table = tables.evaluation_rows(fake_runs.OPT.evaluation())
    text = tables.render_text(table, width=60)
    grid = text.split("\n\n")[0].splitlines()
    assert max(len(line) for line in grid) <= 60
    assert "0.02134" in text and "0.00061" in text


def test_dry_run_shows_reach_time_and_memory() -> None:
    estimate = RunEstimate(
        model="embedded:opt-mini", parameters=2_622_976, source_bytes=5_245_952, budget="4bpw", limit_bytes=1_311_488,
        smallest_bytes=1_000_000, largest_bytes=5_245_952, uniform_bytes={"int4-g64": 1_500_000},
        stage_seconds={"measure": 12.0, "quantize": 61.0}, wall_seconds=73.0, peak_memory_bytes=1_200_000_000,
        disk_bytes=12_000_000, flops_per_second=4e10,
    )  # fmt: skip
    text = tables.estimate_table(estimate)
    assert "Budget 4bpw allows 1.31 MB (1.25 MiB); reachable: 1.00 MB (977 KiB) to 5.25 MB (5.00 MiB)." in text
    assert "quantize      1 min 01 s" in text and "all           1 min 13 s" in text
    assert "Memory: up to 1.20 GB (1.12 GiB). Disk: 12.0 MB (11.4 MiB)." in text
