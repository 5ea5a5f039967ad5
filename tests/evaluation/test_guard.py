"""The guard's choice and its sentence."""

import pytest

from cptquant.core.evaluation import Measurement
from cptquant.evaluation.guard import choose

LABELS = {"uniform": "uniform bits", "preset": "llama.cpp's Q3_K_M", "unrefined": "the plan before swaps"}


def measured(**values):
    return [
        Measurement(name="kl_nats_per_token", subject=name, value=value, unit="nats/token", n=100, stderr=0.001)
        for name, value in values.items()
    ]


@pytest.mark.parametrize(
    ("values", "written", "verdict"),
    [
        ({"quantized": 0.02, "uniform": 0.03}, "quantized", "the plan is no worse, so the plan was written"),
        ({"quantized": 0.02, "uniform": 0.02}, "quantized", "the plan is no worse, so the plan was written"),
        ({"quantized": 0.03, "uniform": 0.02}, "uniform", "uniform bits are better, so uniform bits were written"),
        (
            {"quantized": 0.03, "uniform": 0.02, "preset": 0.01},
            "preset",
            "llama.cpp's Q3_K_M is better, so llama.cpp's Q3_K_M was written",
        ),
        (
            {"quantized": 0.03, "uniform": 0.05, "unrefined": 0.02},
            "unrefined",
            "the plan before swaps is better, so the plan before swaps was written",
        ),
    ],
)
def test_the_best_is_written_and_the_plan_where_nothing_is_better(values, written, verdict):
    rivals = {name: LABELS[name] for name in values if name != "quantized"}
    found, sentence = choose(measured(**values), "causal_lm", rivals)
    assert found == written
    assert sentence.endswith(f"(n = 100): {verdict}")
    for name, value in values.items():
        if name not in ("quantized", "uniform"):
            limit = "under the same limit" if name == "unrefined" else "at no more bytes"
            assert f"{LABELS[name]} {limit} {value} ± 0.001" in sentence
    assert ("uniform at no more bytes" in sentence) is ("uniform" in values)


def test_what_was_not_measured_is_an_error():
    with pytest.raises(ValueError, match="kl_nats_per_token of 'preset' was not measured"):
        choose(measured(quantized=0.1), "causal_lm", {"preset": "x"})


def test_trained_weights_are_compared_with_their_parent_by_the_measure_asked_for() -> None:
    measured = [
        Measurement(name=name, subject=subject, value=value, unit="nats/token", n=100, stderr=0.01)
        for name, values in (("kl_nats_per_token", (0.2, 0.1)), ("nll_nats_per_token", (2.0, 2.5)))
        for subject, value in zip(("quantized", "parent"), values, strict=True)
    ]
    rivals = {"parent": "the parent"}
    written, sentence = choose(measured, "causal_lm", rivals)
    assert written == "parent"
    assert sentence == (
        "kl_nats_per_token on validation text: trained 0.2 ± 0.01, the parent 0.1 ± 0.01 (n = 100): the parent is "
        "better, so the parent was written"
    )
    written, sentence = choose(measured, "causal_lm", rivals, by="nll_nats_per_token")
    assert written == "quantized" and sentence.endswith("the trained weights are no worse, so they were written")
