import math

import pytest
import torch

from cptquant.models.estimates import Clusters, cluster_by_document, estimate_mean, estimate_ratio


def ten_documents(sequences: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-sequence sums of a score whose level differs between documents, token counts, and the documents."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, 10, (sequences,), generator=generator)
    counts = torch.randint(20, 60, (sequences,), generator=generator)
    level = 3 + torch.randn(10, generator=generator, dtype=torch.float64)
    per_token = level[documents] + 0.3 * torch.randn(sequences, generator=generator, dtype=torch.float64)
    return per_token * counts, counts, documents


def test_one_unit_per_cluster_gives_the_usual_error_of_a_mean():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = estimate_mean(values, Clusters(torch.arange(50), "documents"))
    assert estimate.n == 50
    assert estimate.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert estimate.stderr == pytest.approx(values.std().item() / math.sqrt(50), rel=1e-12)


def test_equal_clusters_give_the_error_of_the_mean_of_cluster_means():
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values += torch.randn(12, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clusters = Clusters(torch.arange(12).repeat_interleave(5), "documents")
    means = values.mean(dim=1)
    assert estimate_mean(values.flatten(), clusters).stderr == pytest.approx(means.std().item() / math.sqrt(12))


def test_copying_each_unit_does_not_shrink_the_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    once = estimate_mean(values, Clusters(torch.arange(30), "documents"))
    tenfold = estimate_mean(values.repeat(10), Clusters(torch.arange(30).repeat(10), "documents"))
    assert tenfold.n == 300
    assert tenfold.stderr == pytest.approx(once.stderr)


def test_unequal_clusters_agree_with_a_bootstrap_over_documents():
    totals, counts, documents = ten_documents(sequences=400)
    documents = torch.arange(400) // 4  # 100 documents of 4 windows
    totals = totals + 0.5 * counts * torch.randn(100, generator=torch.Generator().manual_seed(5))[documents]
    estimate = estimate_ratio(totals, counts, Clusters(documents, "documents"))
    by_total = torch.zeros(100, dtype=torch.float64).index_add_(0, documents, totals)
    by_count = torch.zeros(100, dtype=torch.float64).index_add_(0, documents, counts.double())
    draws = torch.randint(0, 100, (4000, 100), generator=torch.Generator().manual_seed(6))
    bootstrap = (by_total[draws].sum(dim=1) / by_count[draws].sum(dim=1)).std().item()
    assert estimate.value == pytest.approx((totals.sum() / counts.sum()).item())
    assert estimate.stderr == pytest.approx(bootstrap, rel=0.05)


def test_ignoring_clusters_would_understate_the_error():
    totals, counts, documents = ten_documents()
    clustered = estimate_ratio(totals, counts, Clusters(documents, "documents"))
    independent = estimate_ratio(totals, counts, Clusters(torch.arange(60), "windows"))
    assert clustered.value == independent.value
    assert clustered.stderr is not None and independent.stderr is not None
    assert clustered.stderr > 1.5 * independent.stderr


def test_sequences_without_units_change_nothing():
    totals, counts, documents = ten_documents()
    padded = Clusters(torch.cat([documents, torch.tensor([99])]), "documents")
    before = estimate_ratio(totals, counts, Clusters(documents, "documents"))
    after = estimate_ratio(
        torch.cat([totals, torch.zeros(1)]), torch.cat([counts, torch.zeros(1, dtype=torch.int64)]), padded
    )
    assert after == before


def test_a_single_document_is_clustered_by_window_and_says_so():
    clusters = cluster_by_document(torch.zeros(7, dtype=torch.int64))
    assert clusters.count == 7
    assert clusters.note == "standard error over 7 windows of a single document"
    assert cluster_by_document(torch.tensor([0, 0, 1])).note == "standard error over 2 documents"


def test_one_sequence_has_no_standard_error_and_says_so():
    estimate = estimate_ratio(
        torch.tensor([3.0]), torch.tensor([2]), cluster_by_document(torch.zeros(1, dtype=torch.int64))
    )
    measurement = estimate.measurement("nll_nats_per_token", "original", "nats/token", "one window")
    assert (measurement.value, measurement.n, measurement.stderr) == (1.5, 2, None)
    assert measurement.note == "one window; no standard error: only one sequence"


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="the sizes add up to 0"):
        estimate_ratio(torch.zeros(3), torch.zeros(3), Clusters(torch.arange(3), "documents"))
