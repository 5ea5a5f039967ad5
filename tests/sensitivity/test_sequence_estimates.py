"""Standard errors against brute force."""

import pytest
import torch

from cptquant.sensitivity.estimates import estimate_ratio, jackknife_stderr


def test_ratio_of_sums():
    found = estimate_ratio(torch.tensor([3.0, 5.0]), torch.tensor([1, 3]), torch.tensor([0, 1]))
    assert (found.value, found.n) == (2.0, 2)


def test_equal_counts_give_the_standard_error_of_the_mean():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    found = estimate_ratio(values * 7, torch.full((50,), 7), torch.arange(50))
    assert found.stderr == pytest.approx(float(values.std() / 50**0.5), rel=1e-9)


def test_agrees_with_a_bootstrap_over_documents():
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(120) // 3
    per_document = torch.randn(40, generator=generator).double()
    counts = torch.randint(5, 30, (120,), generator=generator)
    sums = counts * (2 + per_document[documents] + 0.3 * torch.randn(120, generator=generator).double())
    found = estimate_ratio(sums, counts, documents)
    draws = torch.randint(0, 40, (4000, 40), generator=generator)
    by_sum = torch.zeros(40, dtype=torch.float64).index_add(0, documents, sums)
    by_count = torch.zeros(40, dtype=torch.float64).index_add(0, documents, counts.double())
    bootstrap = (by_sum[draws].sum(1) / by_count[draws].sum(1)).std()
    assert found.stderr == pytest.approx(float(bootstrap), rel=0.1)
    independent = estimate_ratio(sums, counts, torch.arange(120))
    assert independent.stderr < 0.8 * found.stderr  # windows of one document are no independent draws


def test_one_document_counts_sequences_and_one_sequence_has_no_error():
    sums, counts = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3)
    alone = estimate_ratio(sums, counts, torch.zeros(3, dtype=torch.int64))
    assert alone.stderr == pytest.approx(estimate_ratio(sums, counts, torch.arange(3)).stderr)
    assert estimate_ratio(sums[:1], counts[:1], torch.tensor([0])).stderr is None


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    found = jackknife_stderr(lambda rows: values[rows].mean().unsqueeze(0), torch.arange(30), 30)
    assert found is not None
    assert float(found) == pytest.approx(float(values.std() / 30**0.5), rel=1e-9)


def test_jackknife_drops_whole_sequences():
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    seen = []
    jackknife_stderr(lambda rows: seen.append(rows.tolist()) or torch.zeros(1), owners, 10)
    assert len(seen) == 3
    assert all(row[0] == row[1] and row[2] == row[3] and row[4] == row[5] for row in seen)
    assert jackknife_stderr(lambda rows: torch.zeros(1), torch.zeros(4), 10) is None
