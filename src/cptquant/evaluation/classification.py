"""Classifiers: accuracy and NLL of each model, and a paired test of whether a changed model is right less often."""

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import binomtest
from torch import Tensor

from cptquant.core.evaluation import Measurement
from cptquant.models.estimates import Clusters, estimate_mean


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test on examples that two models judged.

    Attributes:
        p_value: two-sided probability, if both models are equally often right, of discordant counts at least as
            uneven as these: binomial with probability 1/2 (McNemar, Psychometrika 12:153, 1947, in its exact form).
        original_only: examples only the original got right. subject_only: likewise for the changed model.
    """

    p_value: float
    original_only: int
    subject_only: int


def mcnemar(
    original_right: Tensor,  # (n,) bool
    subject_right: Tensor,  # (n,) bool
) -> PairedTest:
    """Compare two models on the same examples; p is 1 where they never differ."""
    original_only = int((original_right & ~subject_right).sum())
    subject_only = int((subject_right & ~original_right).sum())
    discordant = original_only + subject_only
    p_value = float(binomtest(original_only, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest(p_value, original_only, subject_only)


def classification_measurements(
    right: Mapping[str, Tensor],  # subject -> (n,) bool: the most likely class is the label
    nll_nats: Mapping[str, Tensor],  # subject -> (n,) float64: of the label
    clusters: Clusters,
) -> list[Measurement]:
    """`accuracy` and `nll_nats_per_example` of each subject and, if "original" is among them, paired comparisons.

    The error of an accuracy is clustered by document: sqrt(p (1 - p) / (n - 1)) where every document gives one
    example. McNemar's test takes examples as independent; where a document gives several its p is too small, which
    the note says.
    """
    measurements: list[Measurement] = []
    original = right.get("original")
    for subject, is_right in right.items():
        accuracy, nll = estimate_mean(is_right, clusters), estimate_mean(nll_nats[subject], clusters)
        measurements += [
            accuracy.measurement("accuracy", subject, "fraction", clusters.note),
            nll.measurement("nll_nats_per_example", subject, "nats/example", clusters.note),
        ]
        if original is not None and subject != "original":
            measurements += _paired(original, is_right, subject, clusters)
            increase = estimate_mean(nll_nats[subject] - nll_nats["original"], clusters)
            measurements.append(
                increase.measurement(
                    "nll_increase_nats_per_example", subject, "nats/example", "minus the original, on the same examples"
                )
            )
    return measurements


def _paired(original: Tensor, is_right: Tensor, subject: str, clusters: Clusters) -> list[Measurement]:
    test, n = mcnemar(original, is_right), original.numel()
    note = f"exact McNemar: {test.original_only} right only in the original, {test.subject_only} only in {subject}"
    if clusters.count < n:
        note += f"; takes {n} examples of {clusters.count} documents as independent, so it is too small"
    return [
        Measurement(name="accuracy_mcnemar_p", subject=subject, value=test.p_value, unit="probability", n=n, note=note),
        Measurement(name="right_only_in_original", subject=subject, value=test.original_only, unit="examples", n=n),
        Measurement(name="right_only_in_subject", subject=subject, value=test.subject_only, unit="examples", n=n),
    ]
