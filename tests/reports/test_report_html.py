import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_runs
import pytest

from cptquant.core.errors import ArtifactError, OutputError
from cptquant.core.manifest import SiteOutcome
from cptquant.reports.html import render_report

# Anything that would make a browser fetch something: attributes with addresses, CSS url() and @import, script loads.
_LOADS = re.compile(
    r"""https?:|//cdn|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|<link|<img|<iframe|\bsrc=""", re.I
)


@pytest.mark.parametrize(
    "run", [fake_runs.OPT, fake_runs.CLASSIFIER, fake_runs.ENCODER, fake_runs.HUGE], ids=lambda run: run.source
)
def test_a_report_is_one_small_wellformed_page_that_loads_nothing(
    run: fake_runs.FakeRun, tmp_path: Path, read_page
) -> None:
    folder = run.write(tmp_path / "run")
    started = time.process_time()
    path = render_report(folder)
    assert time.process_time() - started < 3
    assert path == folder / "report.html"
    assert path.stat().st_size < 1_000_000
    assert not _LOADS.search(path.read_text(encoding="utf-8"))
    page = read_page(path)
    assert page.count("h1") == 1
    ids = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert ids == {"result", "sensitivity", "plan", "comparison", "errors", "tables", "provenance"}
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in ids}


def test_the_headline_says_what_was_asked_and_what_came_out(opt_run: Path, read_page) -> None:
    plan = fake_runs.OPT.plan()
    text = read_page(render_report(opt_run)).text
    assert "embedded:opt-mini" in text
    assert "The budget, 4bpw, allowed 1.46 MB (1.39 MiB)." in text
    assert f"{plan.bits_per_weight:.3f}" in text
    assert "× smaller than FP16 (5.25 MB)" in text and "× smaller than FP32 (10.5 MB)" in text
    assert "Perplexity 23.39 ± 0.28 original 22.91 ± 0.28 NLL +0.02080 ± 0.00092 nats/token, paired n = 32,640" in text
    assert "KL to original 0.02134 ± 0.00061 uniform bits 0.03414 ± 0.00098 random bits 0.0726 ± 0.0021" in text
    assert "Uniform bits and random bits took no more bytes than the plan." in text
    assert "Guard. KL on validation text: plan 0.0213" in text


def test_baselines_that_took_more_bytes_are_said_to(opt_run: Path, read_page) -> None:
    path = opt_run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for found in evaluation["measurements"]:
        if found["name"] == "weight_bytes" and found["subject"] == "random":
            found["value"] = 9e6
    path.write_text(json.dumps(evaluation))
    text = read_page(render_report(opt_run)).text
    assert "Random bits took more bytes than the plan: the comparison favours them." in text


def test_every_site_stands_in_the_picture_the_heat_map_and_the_tables(opt_run: Path, read_page) -> None:
    page = read_page(render_report(opt_run))
    html = (opt_run / "report.html").read_text(encoding="utf-8")
    for site, name in fake_runs.OPT.plan().formats.items():
        assert f"{page.text} ".count(f" {site} ") >= 2, site
        short = site.removeprefix("model.decoder.layers.").removesuffix("_proj").replace(".", " ")
        if site.startswith("model.decoder.layers."):
            assert html.count(f"<title>{short}: {name}</title>") == 1
    damage = fake_runs.OPT.table("tdmpq").damages["model.decoder.layers.3.q_proj"]["int4-g64"]
    assert damage.stderr is not None
    assert f"<title>3 q: {damage.value:.5f} ± {damage.stderr:.5f}</title>" in html


def test_a_measured_method_each_has_its_part_the_plans_first(opt_run: Path, read_page) -> None:
    text = read_page(render_report(opt_run)).text
    assert re.search(r"TDMPQ · the plan was made from this table .* CMPQ .* PMPQ", text)
    assert text.count("Score by block") == 3
    assert "loss increase at sparsity 0.5" in text


def test_outcomes_that_are_not_nominal_are_listed_with_sentence_and_count(opt_run: Path, read_page) -> None:
    text = read_page(render_report(opt_run)).text
    records = fake_runs.OPT.manifest().sites
    for outcome in SiteOutcome:
        count = sum(record.outcome is outcome for record in records)
        if outcome is not SiteOutcome.NOMINAL and count:
            assert f"{outcome.value.replace('_', ' ')} {count} {outcome.sentence}" in text
    assert SiteOutcome.NO_CALIBRATION_INPUT.sentence not in text


def test_provenance_shows_time_memory_versions_and_digests(opt_run: Path, read_page) -> None:
    text = read_page(render_report(opt_run)).text
    assert "evaluation.json 9.30 s 15.8 s 812 MB cpu 2 0" in text
    assert "torch 2.13.0" in text
    assert fake_runs.OPT.plan().digest() in text
    assert "checkpoint/ holds 1,456,272 bytes of tensors and 7,432 bytes of safetensors headers." in text
    assert "cptquant measure embedded:opt-mini --budget 4bpw --output runs/first" in text


def test_uniform_bits_that_the_guard_wrote_are_what_the_report_shows(tmp_path: Path, read_page) -> None:
    folder = replace(fake_runs.OPT, guard_prefers_uniform=True).write(tmp_path / "run")
    text = read_page(render_report(folder)).text
    assert "Quantized (uniform bits)" in text
    assert "What was written: uniform bits" in text
    assert "What the allocator proposed, and the guard turned down" in text
    assert f"{fake_runs.OPT.plan('uniform').size_bytes:,} bytes of all tensors" in text


STAGES = {
    "Sensitivity was not measured. Measure it with: cptquant measure {run} --sensitivity METHOD": "sensitivity",
    "No plan was made. Make one with: cptquant allocate {run} --budget BUDGET": "plan.json",
    "Nothing was quantized. Quantize with: cptquant quantize {run}": "manifest",
    "Nothing was evaluated. Finish the run with: cptquant quantize {run}": "evaluation",
}


@pytest.mark.parametrize("missing", list(STAGES))
def test_a_missing_stage_is_named_with_its_command(missing: str, opt_run: Path, read_page) -> None:
    for path in opt_run.glob(f"{STAGES[missing]}*"):
        path.unlink()
    text = read_page(render_report(opt_run)).text
    assert missing.format(run=opt_run) in text
    others = [sentence.format(run=opt_run) for sentence in STAGES if sentence != missing]
    assert not any(sentence in text for sentence in others)


def test_the_layout_alone_is_enough(tmp_path: Path, read_page) -> None:
    fake_runs.OPT.layout.save(tmp_path / "layout.json")
    text = read_page(render_report(tmp_path)).text
    assert "This run is not finished. Sensitivity was not measured." in text
    assert all(sentence.format(run=tmp_path) in text for sentence in STAGES)


def test_an_older_evaluation_beside_a_newer_plan_is_said_to_be_stale(opt_run: Path, read_page) -> None:
    assert "was made from another plan" not in read_page(render_report(opt_run)).text
    plan = fake_runs.OPT.plan()
    formats = {**plan.formats, "lm_head": "int8-g64"}
    size_bytes = fake_runs.OPT.layout.plan_bytes(plan.model_copy(update={"formats": formats}).quant_formats)
    changed = plan.model_copy(update={"formats": formats, "size_bytes": size_bytes})
    changed.__dict__.pop("quant_formats", None)
    changed.save(opt_run / "plan.json")
    text = read_page(render_report(opt_run)).text
    assert "manifest.json was made from another plan than the one beside it." in text
    assert "evaluation.json was made from another plan than the one beside it." in text
    assert f"Bring them together with: cptquant quantize {opt_run}" in text


HOSTILE = "</title><script>alert('x')</script><b onmouseover=\"y\">&amp;"


def test_hostile_strings_are_shown_and_never_run(tmp_path: Path, read_page) -> None:
    run = replace(fake_runs.OPT, source=HOSTILE)
    folder = run.write(tmp_path / "run")
    site = HOSTILE + "0.q_proj"

    def rename(value: object) -> object:
        if isinstance(value, dict):
            return {rename(key): rename(item) for key, item in value.items()}
        if isinstance(value, list):
            return [rename(item) for item in value]
        return site if value == "model.decoder.layers.0.q_proj" else value

    for path in folder.glob("*.json"):
        content = rename(json.loads(path.read_text()))
        assert isinstance(content, dict)
        if path.name == "evaluation.json":
            content |= {"guard": HOSTILE, "settings": {HOSTILE: HOSTILE}}
            content["measurements"][0] |= {"note": HOSTILE, "unit": HOSTILE}
        if path.name == "plan.json":
            content |= {"notes": [HOSTILE], "allocator": HOSTILE, "budget": HOSTILE, "damage_unit": HOSTILE}
        if path.name.startswith("sensitivity"):
            content |= {"method": HOSTILE, "unit": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
            content["curves"] = {HOSTILE: {"0": 1.0, "1": 2.0}}
        content["provenance"] |= {"command": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        path.write_text(json.dumps(content))
    clean = read_page(render_report(fake_runs.OPT.write(tmp_path / "clean")))
    page = read_page(render_report(folder))
    assert page.count("script") == clean.count("script") == 1
    assert page.count("b") == 0
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) > 10


def test_damaged_foreign_and_missing_files_are_refused(tmp_path: Path, opt_run: Path) -> None:
    with pytest.raises(ArtifactError, match=r"layout\.json does not exist; make it with: cptquant inspect MODEL"):
        render_report(tmp_path / "nowhere")
    (opt_run / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"plan\.json is not valid JSON"):
        render_report(opt_run)
    fake_runs.HUGE.plan().save(opt_run / "plan.json")
    with pytest.raises(ArtifactError, match=r"plan\.json names 488 sites that layout\.json does not have"):
        render_report(opt_run)
    assert not (opt_run / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_named(opt_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OutputError, match=r"disk full while writing .*report\.html"):
        render_report(opt_run)
    assert not list(opt_run.glob("report.html*"))


def test_a_frontier_is_drawn(opt_run: Path, read_page) -> None:
    fake_runs.frontier().save(opt_run / "frontier.json")
    page = read_page(render_report(opt_run))
    assert "Predicted damage against size, nats/token" in page.text
    titles = (opt_run / "report.html").read_text(encoding="utf-8")
    assert "<title>1 at 1.00 MB (977 KiB)</title>" in titles


def test_an_unreadable_frontier_is_refused(opt_run: Path) -> None:
    (opt_run / "frontier.json").write_text('{"points": []}')
    with pytest.raises(ArtifactError, match=r"frontier\.json holds schema None, expected 'cptquant\.frontier'"):
        render_report(opt_run)


def test_the_same_files_give_the_same_page(opt_run: Path) -> None:
    first = render_report(opt_run).read_bytes()
    assert render_report(opt_run).read_bytes() == first


def test_importing_reports_loads_no_framework_and_no_renderer() -> None:
    code = (
        "import sys; import cptquant.reports.html, cptquant.reports.tables; "
        "print([name for name in ('torch', 'transformers', 'jinja2', 'rich', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
