import math
from pathlib import Path

import fake_runs
import pytest

from cptquant.core.engine_export import EngineComparison, ExportRecord, MemoryUse, SiteRoundTrip
from cptquant.reports.export_table import export_table, spell_comparison
from cptquant.reports.html import render_report

EXACT = EngineComparison(
    arithmetic="float activations", kl_nats=3.78e-9, top1_agreement=1.0, n=2040, stderr=4.1e-10, bound=1e-3
)
ALONE = EngineComparison(
    arithmetic="16-bit activations", weights="original", kl_nats=2.5e-7, top1_agreement=0.9995, n=2040, stderr=1.1e-8
)
ROUNDED = EngineComparison(
    arithmetic="int8 activations", kl_nats=0.00161, top1_agreement=0.9194, n=2040, stderr=0.00013
)
MEMORY = MemoryUse(
    context=512, base_bytes=60_000_000, weight_bytes=1_456_272, cache_bytes=3_145_728, overhead_bytes=1_000_000,
    predicted_bytes=65_602_000, measured_bytes=60_000_000,
)  # fmt: skip


def export(run: fake_runs.FakeRun, folder: Path, **changes: object) -> ExportRecord:
    plan = run.plan()
    fields = {
        "target": plan.target, "entry": "checkpoint/model.gguf", "files": {"model.gguf": "ab" * 32},
        "tensor_bytes": plan.size_bytes, "file_bytes": plan.size_bytes + 40_000,
        "round_trip": (SiteRoundTrip(site="lm_head", format="Q4_K", largest_error=0.0),), "tokens_equal": True,
        "comparisons": (EXACT, ROUNDED, ALONE), "engine": "llama-cpp-python 0.3.36", "memory": MEMORY,
        "inputs": {"plan": plan.digest()},
    }  # fmt: skip
    record = ExportRecord.model_validate({**fields, **changes})
    path = folder / "export" / record.target / "export.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save(path)
    return record


def test_the_engine_and_what_it_found_stand_in_the_report(opt_run: Path, read_page) -> None:
    record = export(fake_runs.OPT, opt_run)
    page = read_page(render_report(opt_run))
    assert "engine" in {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    assert "#engine" in {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    text = page.text
    assert "In the engine Held-out text through the exported files in their engine, and" in text
    assert "In the engine KL(ours ‖ engine), nats Same top answer n Bound" in text
    assert "float activations (3.78 ± 0.41)×10⁻⁹ 100.00% 2,040 at most 0.001" in text
    assert "int8 activations 0.00161 ± 0.00013 91.94% 2,040 none, stated only" in text
    assert "the original, 16-bit activations (2.50 ± 0.11)×10⁻⁷ 99.95% 2,040 none, stated only" in text
    assert spell_comparison(ALONE).startswith(
        "the original, 16-bit activations: KL(original ‖ engine) 2.50e-07 ± 1.1e-08"
    )
    assert "Engine llama-cpp-python 0.3.36 Round trip 1 of 1 quantized matrices exact" in text
    assert "Token ids equal to Hugging Face's on mixed text" in text
    assert f"Predicted {record.tensor_bytes:,} bytes of tensors, by the plan Files {record.file_bytes:,} bytes" in text
    assert "of which 2.7 % are metadata, tokenizer and padding" in text
    assert "predicted 65.6 MB (62.6 MiB) for 512 tokens of context" in text
    assert "measured 60.0 MB (57.2 MiB) (+9%)" in text
    assert "made from another plan" not in text
    assert f"export/{record.target}/export.json" in text


def test_an_encoder_shows_cosines(tmp_path: Path, read_page) -> None:
    folder = fake_runs.ENCODER.write(tmp_path / "run")
    found = EngineComparison(
        arithmetic="float activations", cosine=0.9999931, cosine_lowest=0.9999870, n=1000, stderr=4.1e-8, bound=1e-3
    )
    record = export(fake_runs.ENCODER, folder, comparisons=(found,))
    text = read_page(render_report(folder)).text
    assert "In the engine Cosine to ours Lowest n Bound" in text
    assert "0.999987 1,000 1 − cosine at most 0.001" in text
    line = "float activations: cosine to our model 0.999993 ± 4.1e-08, lowest 0.999987, n = 1,000, "
    assert line + "1 - cosine allowed 0.001" in export_table(record)


def test_what_the_engines_tokenizer_cannot_do_is_stated(opt_run: Path, read_page) -> None:
    note = "the engine's tokenizer cuts '안' unlike Hugging Face's"
    record = export(fake_runs.OPT, opt_run, tokens_note=note)
    sentence = f"equal to Hugging Face's on mixed text; but in Korean and Indic scripts {note}"
    assert f"token ids  {sentence}" in export_table(record)
    assert f"Token ids {sentence}" in read_page(render_report(opt_run)).text


def test_an_engine_that_was_not_run_is_said_so(opt_run: Path, read_page) -> None:
    reason = "not run: llama-cpp-python is not installed; pip install 'cptquant[llamacpp]'"
    record = export(fake_runs.OPT, opt_run, comparisons=(), engine=reason, tokens_equal=None, memory=None)
    text = read_page(render_report(opt_run)).text
    assert f"The engine check was {reason}" in text
    assert "Same top answer" not in text and "Token ids not compared" in text
    assert f"engine     {reason}" in export_table(record)


def test_a_cosine_without_a_lowest_is_a_dash_and_no_crash() -> None:
    found = EngineComparison(arithmetic="int8 activations", cosine=0.99, n=5)
    assert spell_comparison(found) == "int8 activations: cosine to our model 0.990000, lowest –, n = 5"


def test_what_was_not_compared_has_no_distance_that_a_bound_allows() -> None:
    assert math.isnan(EngineComparison(arithmetic="x", n=1).distance)
    assert EngineComparison(arithmetic="x", cosine=0.75, n=1).distance == 0.25


@pytest.mark.parametrize("target", ["transformers", "gguf"])
def test_an_export_of_another_plan_is_stale(target: str, opt_run: Path, read_page) -> None:
    plan = fake_runs.OPT.plan().model_copy(update={"target": target, "size_bytes": 1_234_567})
    export(fake_runs.OPT, opt_run, target=target, tensor_bytes=1_234_567, inputs={"plan": plan.digest()})
    assert "export.json was made from another plan" not in read_page(render_report(opt_run)).text
    export(fake_runs.OPT, opt_run, target=target, inputs={"plan": "0" * 64})
    sentence = f"export/{target}/export.json was made from another plan than the one beside it."
    assert sentence in read_page(render_report(opt_run)).text
