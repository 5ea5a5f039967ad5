"""Bare encoders: how far the sentence embeddings move, as the cosine to the original's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cptquant.core.evaluation import Measurement
from cptquant.models.estimates import Clusters, estimate_mean

LOW_QUANTILE = 0.01
"""Reported beside the mean and the minimum: a mean hides the few sentences that break."""


def embedding_measurements(
    distances: Mapping[str, Tensor],  # subject -> (n,) float64: 1 - cosine of a sentence's embedding to the original's
) -> list[Measurement]:
    """`embedding_cosine` (mean over sentences), its lowest percentile, its minimum, and the mean `cosine_distance`.

    Embeddings are means of the last hidden state over the real tokens, then normalised: sentence-transformers'
    convention (`Pooling` with `pooling_mode_mean_tokens`, then `Normalize`). The error is taken over sentences.
    """
    measurements: list[Measurement] = []
    for subject, values in distances.items():
        sentences = Clusters(torch.arange(values.numel()), "sentences")
        cosine = estimate_mean(1 - values, sentences)
        note = f"to the original; mean over real tokens, normalised; {sentences.note}"
        low = {"percentile1": torch.quantile(1 - values, LOW_QUANTILE), "min": (1 - values).min()}
        measurements.append(cosine.measurement("embedding_cosine", subject, "cosine", note))
        measurements += [
            Measurement(name=f"embedding_cosine_{name}", subject=subject, value=value.item(), unit="cosine", n=cosine.n)
            for name, value in low.items()
        ]
        distance = estimate_mean(values, sentences)
        measurements.append(
            distance.measurement("embedding_cosine_distance", subject, "1 - cosine", "in full precision near 0")
        )
    return measurements
