import pytest

from cptquant.core.evaluation import EvaluationReport, Measurement
from cptquant.core.formats import FLOAT16, QuantFormat
from cptquant.core.manifest import SiteOutcome
from cptquant.core.plan import Plan, SolverStatus


@pytest.mark.parametrize("kind", [SiteOutcome, SolverStatus])
def test_every_outcome_has_a_sentence_of_its_own(kind):
    sentences = {member.sentence for member in kind}
    assert len(sentences) == len(kind)
    assert all(len(sentence) > 10 for sentence in sentences)


def test_measurements_are_found_by_name_and_subject():
    first, second = (
        Measurement(name="perplexity", subject=subject, value=value, unit="1", n=9)
        for subject, value in (("original", 3.0), ("quantized", 4.0))
    )
    report = EvaluationReport(measurements=(first, second))
    assert report.find("perplexity", "quantized") is second
    assert report.find("perplexity", "uniform") is None
    assert report.find("accuracy", "original") is None


def test_a_plan_parses_its_formats():
    plan = Plan(
        target="transformers", allocator="uniform", budget="4bpw", budget_scope="file", limit_bytes=9,
        formats={"a": "int4-g64", "b": "float16"}, size_bytes=8, site_bytes=8, bits_per_weight=4.0,
        bits_per_weight_sites=4.0, status=SolverStatus.HEURISTIC,
    )  # fmt: skip
    assert plan.quant_formats == {"a": QuantFormat(code_bits=4, granularity=64), "b": FLOAT16}


def test_a_copy_of_a_plan_parses_its_own_formats():
    plan = Plan(
        target="transformers", allocator="knapsack", budget="4bpw", budget_scope="file", limit_bytes=10,
        formats={"a": "int4-g64"}, size_bytes=9, site_bytes=9, bits_per_weight=4.0, bits_per_weight_sites=4.0,
        status=SolverStatus.OPTIMAL,
    )  # fmt: skip
    assert plan.quant_formats["a"].code_bits == 4  # parsed, and kept, before the copy is made
    assert plan.model_copy(update={"formats": {"a": "int3-g64"}}).quant_formats["a"].code_bits == 3
    assert plan.model_copy().quant_formats == plan.quant_formats
