"""How far a model's predictions are from the original's: KL divergence and top-1 agreement."""

from collections.abc import Mapping

from torch import Tensor

from cptquant.core.evaluation import Measurement
from cptquant.models.estimates import Clusters, estimate_ratio


def divergence_measurements(
    kl_nats: Mapping[str, Tensor],  # subject -> (n,) float64: KL(original ‖ subject) summed over a sequence's positions
    agreements: Mapping[str, Tensor],  # subject -> (n,) int64: positions where both have the same most likely entry
    counts: Tensor,  # (n,) int64: positions compared
    clusters: Clusters,
    *,
    per: str,  # "token" or "example"
    note: str,
) -> list[Measurement]:
    """`kl_nats_per_token` (or `_per_example`) and `top1_agreement` of each subject with the original."""
    measurements: list[Measurement] = []
    for subject, sums in kl_nats.items():
        kl = estimate_ratio(sums, counts, clusters)
        agreement = estimate_ratio(agreements[subject], counts, clusters)
        measurements += [
            kl.measurement(
                f"kl_nats_per_{per}", subject, f"nats/{per}", f"KL(original ‖ {subject}); {note}; {clusters.note}"
            ),
            agreement.measurement(
                "top1_agreement", subject, "fraction", f"same most likely answer as the original; {note}"
            ),
        ]
    return measurements
