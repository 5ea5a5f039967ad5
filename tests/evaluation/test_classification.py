import pytest
import torch

from cptquant.core.evaluation import Measurement
from cptquant.evaluation.classification import classification_measurements, mcnemar
from cptquant.models.estimates import Clusters


def outcomes(both: int, original_only: int, subject_only: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    original = [True] * (both + original_only) + [False] * (subject_only + neither)
    subject = [True] * both + [False] * original_only + [True] * subject_only + [False] * neither
    return torch.tensor(original), torch.tensor(subject)


def find(measurements: list[Measurement], name: str, subject: str) -> Measurement:
    (found,) = [m for m in measurements if m.name == name and m.subject == subject]
    return found


def test_mcnemar_counts_only_examples_on_which_the_models_differ():
    # 12 against 4 of 16: 2 * sum of C(16, k) for k = 0..4, over 2^16 = 2 * 2517 / 65536.
    test = mcnemar(*outcomes(both=50, original_only=12, subject_only=4, neither=34))
    assert (test.original_only, test.subject_only) == (12, 4)
    assert test.p_value == pytest.approx(2 * 2517 / 65536, rel=1e-12)
    assert mcnemar(*outcomes(500, 12, 4, 3400)).p_value == pytest.approx(test.p_value)


def test_mcnemar_is_one_where_the_models_never_differ():
    assert mcnemar(*outcomes(10, 0, 0, 5)).p_value == 1.0


def test_accuracy_has_the_binomial_error_and_the_paired_comparison():
    original, subject = outcomes(both=60, original_only=15, subject_only=5, neither=20)
    nll = {"original": torch.full((100,), 0.5).double(), "quantized": torch.full((100,), 0.75).double()}
    found = classification_measurements(
        {"original": original, "quantized": subject}, nll, Clusters(torch.arange(100), "documents")
    )
    accuracy = find(found, "accuracy", "quantized")
    assert (accuracy.value, accuracy.n) == (pytest.approx(0.65), 100)
    assert accuracy.stderr == pytest.approx((0.65 * 0.35 / 99) ** 0.5)
    assert find(found, "accuracy", "original").value == pytest.approx(0.75)
    assert find(found, "right_only_in_original", "quantized").value == 15
    assert find(found, "right_only_in_subject", "quantized").value == 5
    p_value = find(found, "accuracy_mcnemar_p", "quantized")
    assert p_value.value == pytest.approx(2 * sum([1, 20, 190, 1140, 4845, 15504]) / 2**20)
    assert p_value.note == "exact McNemar: 15 right only in the original, 5 only in quantized"
    assert find(found, "nll_nats_per_example", "quantized").value == pytest.approx(0.75)
    increase = find(found, "nll_increase_nats_per_example", "quantized")
    assert (increase.value, increase.stderr) == (pytest.approx(0.25), pytest.approx(0, abs=1e-12))


def test_several_examples_of_a_document_widen_the_error_and_are_said_to_bias_the_test():
    right = torch.tensor([True] * 60 + [False] * 40)
    nll = {"original": torch.ones(100).double(), "uniform": torch.ones(100).double()}
    documents = torch.arange(100) // 5  # right or wrong by document
    clustered = classification_measurements(
        {"original": right, "uniform": right}, nll, Clusters(documents, "documents")
    )
    assert find(clustered, "accuracy", "uniform").stderr == pytest.approx((0.6 * 0.4 / 19) ** 0.5)
    note = find(clustered, "accuracy_mcnemar_p", "uniform").note
    assert note.endswith("takes 100 examples of 20 documents as independent, so it is too small")


def test_without_the_original_nothing_is_paired():
    right = torch.tensor([True, False])
    found = classification_measurements(
        {"quantized": right}, {"quantized": torch.ones(2)}, Clusters(right, "documents")
    )
    assert [m.name for m in found] == ["accuracy", "nll_nats_per_example"]
