"""Canonical correlations between two views of the same samples, safe when dimensions exceed samples."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["mean", "first", "svcca", "pwcca"]


@dataclass(frozen=True)
class View:
    """One set of variables on N samples, reduced to its leading principal directions.

    Attributes:
        directions: (N, k) float64, orthonormal: the left singular vectors of the centred data.
        spread: (k,) float64, their singular values. loadings: (k, d) float64, directions' data: directions.T @ centred.
        shrinkage: (k,) float64 in (0, 1]: what the ridge leaves of each whitened direction.
    """

    directions: Tensor
    spread: Tensor
    loadings: Tensor
    shrinkage: Tensor


def reduce_view(
    data: Tensor,  # (N, d)
    *,
    energy: float,
    directions_per_sample: float,
    ridge: float,
) -> View:
    """Centre, keep the principal directions that hold `energy` of the variance, at most N * directions_per_sample.

    The ridge is relative: lambda = ridge * the mean variance of the kept directions, so that scaling a view changes
    nothing. Directions at the rounding floor are dropped whatever `energy` says.
    """
    centred = data.double() - data.double().mean(dim=0)
    rows, width = centred.shape
    # The smaller Gram matrix has the same spectrum; eigh on it is several times faster than an SVD of the data.
    gram = centred @ centred.t() if rows < width else centred.t() @ centred
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    count = int((share < energy - 1e-12).sum()) + 1
    count = min(count, int((values > 1e-12 * values[0]).sum()), max(1, int(rows * directions_per_sample)))
    values, vectors = values[:count], vectors[:, :count]
    spread = values.sqrt()
    directions = vectors if rows < width else centred @ vectors / spread.clamp(min=1e-300)
    penalty = ridge * values.mean() if count else 0.0
    shrinkage = (values / (values + penalty)).sqrt()
    return View(directions, spread, directions.t() @ centred, shrinkage)


def mean_correlation(first: View, second: View, weighting: Weighting) -> Tensor:
    """How strongly two views move together, a scalar in [0, 1].

    The canonical correlations rho_i are the singular values of C_11^(-1/2) C_12 C_22^(-1/2) with C_ll ridged. In the
    views' own principal directions both inverse roots are diagonal, so this is the cross product of the directions
    with both sides shrunk.

    weighting: "mean" of the rho_i; "first", the largest; "svcca", the mean without the ridge (arXiv 1706.05806);
        "pwcca", the mean weighted by how much of the first view each canonical variate carries,
        w_i = sum_j |<h_i, x_j>| (arXiv 1806.05759, section 3), without the ridge.
    """
    if not len(first.spread) or not len(second.spread):
        return torch.zeros((), dtype=torch.float64)  # a constant view correlates with nothing
    cross = first.directions.t() @ second.directions
    if weighting in ("mean", "first"):
        cross = first.shrinkage.unsqueeze(1) * cross * second.shrinkage
    if weighting != "pwcca":
        correlations = torch.linalg.svdvals(cross).clamp(max=1)
        return correlations[0] if weighting == "first" else correlations.mean()
    left, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
    weights = (left.t() @ first.loadings).abs().sum(dim=1)
    return (weights * correlations.clamp(max=1)).sum() / weights.sum()
