"""Canonical correlations against textbook linear algebra, and what must not change them."""

import numpy as np
import pytest
import torch
from oracles.plain_sensitivity import canonical_correlations, ridged_correlations

from cptquant.sensitivity.canonical import mean_correlation, reduce_view

EXACT = {"energy": 1.0, "directions_per_sample": 1.0, "ridge": 0.0}
DEFAULT = {"energy": 0.99, "directions_per_sample": 0.2, "ridge": 0.01}


def two_views(samples=400, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, 3, generator=generator)
    return [
        shared @ torch.randn(3, width, generator=generator) + torch.randn(samples, width, generator=generator)
        for _ in range(2)
    ]


def correlation(first, second, weighting, **settings):
    return float(mean_correlation(reduce_view(first, **settings), reduce_view(second, **settings), weighting))


@pytest.mark.parametrize("weighting", ["mean", "first", "svcca"])
def test_equals_textbook_cca_with_many_samples(weighting):
    first, second = two_views()
    rho = canonical_correlations(first.double().numpy(), second.double().numpy())
    expected = rho[0] if weighting == "first" else rho.mean()
    assert correlation(first, second, weighting, **EXACT) == pytest.approx(expected, rel=1e-6)


def test_ridge_equals_explicit_whitening():
    first, second = two_views()
    rho = ridged_correlations(first.double().numpy(), second.double().numpy(), 0.5)
    found = correlation(first, second, "mean", energy=1.0, directions_per_sample=1.0, ridge=0.5)
    assert found == pytest.approx(rho.mean(), rel=1e-6)


def test_projection_weights_follow_the_variance_a_variate_carries():
    first, second = (view.double().numpy() for view in two_views())
    centred = [view - view.mean(0) for view in (first, second)]
    bases = [np.linalg.qr(view)[0] for view in centred]
    left, rho, _ = np.linalg.svd(bases[0].T @ bases[1])
    weights = np.abs((bases[0] @ left).T @ centred[0]).sum(1)
    expected = (weights * rho).sum() / weights.sum()
    found = correlation(torch.tensor(first), torch.tensor(second), "pwcca", **EXACT)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weighting", ["mean", "first", "svcca", "pwcca"])
def test_orthogonal_maps_scaling_and_shifts_change_nothing(weighting):
    first, second = two_views(samples=60, width=40)
    turn, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(5)).double())
    moved = (second.double() @ turn) * 7.0 + 3.0
    before = correlation(first, second, weighting, **DEFAULT)
    assert correlation(first, moved, weighting, **DEFAULT) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("weighting", ["mean", "first", "svcca"])
def test_any_invertible_map_changes_nothing_without_reduction_and_ridge(weighting):
    first, second = two_views()
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).double()
    before = correlation(first, second, weighting, **EXACT)
    assert correlation(first, second.double() @ mixing + 1, weighting, **EXACT) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("weighting", ["mean", "first", "svcca", "pwcca"])
def test_more_dimensions_than_samples_stays_finite_and_below_one(weighting):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(20, 500, generator=generator), torch.randn(20, 500, generator=generator)
    value = correlation(first, second, weighting, **DEFAULT)
    assert 0 <= value < 0.95
    unreduced = canonical_correlations(first.double().numpy(), second.double().numpy())
    assert unreduced[0] > 0.999  # what the reduction is there to prevent: unrelated noise, "perfectly correlated"


def test_identical_views_correlate_fully_and_constant_ones_not_at_all():
    first, _ = two_views()
    assert correlation(first, first, "svcca", **EXACT) == pytest.approx(1)
    assert correlation(first, torch.ones(400, 3), "mean", **DEFAULT) == 0
