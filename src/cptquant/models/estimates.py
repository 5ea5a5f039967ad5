"""Means with an honest standard error: tokens of one document are not independent, so errors go by document."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.evaluation import Measurement


@dataclass(frozen=True)
class Clusters:
    """Which sequences may depend on each other.

    Attributes:
        labels: (n,) int64, equal for sequences of one cluster. unit: what a cluster is, in the plural, for notes.
    """

    labels: Tensor
    unit: str

    @property
    def count(self) -> int:
        """Independent clusters."""
        return self.labels.unique().numel()

    @property
    def note(self) -> str:
        """How errors were taken, e.g. `standard error over 12 documents`."""
        return f"standard error over {self.count} {self.unit}"


def cluster_by_document(
    documents: Tensor,  # (n,) int64: source document of each sequence
) -> Clusters:
    """Sequences of one document belong together; a text that is one single document is clustered by window instead.

    One document gives no spread to read an error from. Its windows do, if neighbouring windows are taken as
    independent, which makes the error somewhat small; the note of every measurement says which it was.
    """
    if documents.unique().numel() > 1:
        return Clusters(documents, "documents")
    return Clusters(torch.arange(documents.numel()), "windows of a single document")


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums, such as nats per token, over sequences that come in clusters.

    Attributes:
        value: the ratio. n: its denominator (tokens, examples, bytes).
        stderr: cluster-robust standard error; None where a single cluster gives no spread to read.
    """

    value: float
    stderr: float | None
    n: int

    def measurement(self, name: str, subject: str, unit: str, note: str = "") -> Measurement:
        """As an entry of evaluation.json; says so where there is no standard error."""
        if self.stderr is None:
            note = f"{note}; no standard error: only one sequence" if note else "no standard error: only one sequence"
        return Measurement(
            name=name, subject=subject, value=self.value, unit=unit, n=self.n, stderr=self.stderr, note=note
        )


def estimate_ratio(
    totals: Tensor,  # (n,) real: what is averaged, summed per sequence
    sizes: Tensor,  # (n,) real, at least 0: how many units each sum is over
    clusters: Clusters,  # labels (n,)
) -> Estimate:
    """Mean per unit, sum(totals) / sum(sizes), with a standard error that lets units of one cluster be dependent.

    With y_g and m_g the sums over cluster g and r their ratio, the linearised variance is
    G/(G-1) * sum_g (y_g - r m_g)^2 / (sum_g m_g)^2 (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3, without
    the finite population correction; the same as the cluster-robust sandwich of a weighted regression on a constant).
    With one unit per cluster it is the usual s / sqrt(n).

    Raises:
        ValueError: the sizes add up to nothing.
    """
    totals, sizes = totals.to(torch.float64), sizes.to(torch.float64)
    n = sizes.sum().item()
    if n <= 0:
        raise ValueError("nothing to average: the sizes add up to 0")
    labels, index = torch.unique(clusters.labels, return_inverse=True)
    cluster_totals = torch.zeros(labels.numel(), dtype=torch.float64).index_add_(0, index, totals)
    cluster_sizes = torch.zeros(labels.numel(), dtype=torch.float64).index_add_(0, index, sizes)
    ratio = cluster_totals.sum().item() / n
    count = int((cluster_sizes > 0).sum())
    stderr = None
    if count > 1:
        spread = (cluster_totals - ratio * cluster_sizes).square().sum().item()
        stderr = math.sqrt(count / (count - 1) * spread) / n
    return Estimate(ratio, stderr, round(n))


def estimate_mean(
    values: Tensor,  # (n,) real or bool: one value per sequence
    clusters: Clusters,  # labels (n,)
) -> Estimate:
    """Mean over sequences; see `estimate_ratio`."""
    return estimate_ratio(values, torch.ones(values.numel()), clusters)
