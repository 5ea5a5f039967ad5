"""Means over calibration sequences with their standard errors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number measured on n sequences; `stderr` is None where there were too few to tell."""

    value: float
    stderr: float | None
    n: int

    def scaled(self, factor: float) -> "Estimate":
        """Times a non-negative factor that is taken as known."""
        return Estimate(self.value * factor, None if self.stderr is None else self.stderr * factor, self.n)

    def floored(self) -> "Estimate":
        """max(0, value), same error: a loss that seems to fall under damage is noise, not a gain. NaN stays NaN."""
        return Estimate(0.0 if self.value < 0 else self.value, self.stderr, self.n)


def estimate_ratio(
    sums: Tensor,  # (n,) float64
    counts: Tensor,  # (n,)
    documents: Tensor,  # (n,) int64
) -> Estimate:
    """sum(sums) / sum(counts) with the linearised standard error of a ratio, clustered by document.

    Windows of one document are not independent draws, so residuals are added up per document before they are squared.
    Where all sequences come from a single document they count as their own clusters.
    """
    sums, counts = sums.double(), counts.double()
    total = float(counts.sum())
    value = float(sums.sum()) / total if total else 0.0
    clusters = torch.unique(documents, return_inverse=True)[1]
    if int(clusters.max()) == 0:
        clusters = torch.arange(len(sums))
    groups = int(clusters.max()) + 1
    if groups < 2 or not total:
        return Estimate(value, None, len(sums))
    residuals = torch.zeros(groups, dtype=torch.float64).index_add(0, clusters, sums - value * counts)
    variance = groups / (groups - 1) * float(residuals.square().sum()) / total**2
    return Estimate(value, variance**0.5, len(sums))


def jackknife_stderr(
    statistic: Callable[[Tensor], Tensor],
    clusters: Tensor,  # (rows,) int64: rows of one sequence share a number
    group_count: int,
) -> Tensor | None:
    """Delete-a-group jackknife: standard errors of `statistic`, shaped as its result; None with fewer than 2 clusters.

    Args:
        statistic: maps a (rows,) bool mask of the rows to use to a tensor of values.
        clusters: rows are deleted by whole clusters, dealt to the groups in turn.
        group_count: number of groups (capped by the number of clusters).

    Source: Shao and Wu, "A general theory for jackknife variance estimation", Annals of Statistics 17 (1989).
    """
    labels = torch.unique(clusters, return_inverse=True)[1]
    groups = min(group_count, int(labels.max()) + 1)
    if groups < 2:
        return None
    values = torch.stack([statistic(labels % groups != group) for group in range(groups)])
    return ((groups - 1) / groups * (values - values.mean(dim=0)).square().sum(dim=0)).sqrt()
