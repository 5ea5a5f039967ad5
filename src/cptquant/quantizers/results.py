"""Finished sites on their way to the sink: weights, and a record of each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cptquant.core.manifest import SiteRecord
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.grid import ROWS_ENTRIES

Sink = Callable[[int | None, dict[str, StoredWeight], list[SiteRecord]], None]
"""Takes a finished block (its index; None for all sites outside the blocks, which come last)."""


def relative_error(
    weight: Tensor,  # (out_features, in_features), any float dtype
    changed: StoredWeight | torch.dtype,
) -> float:
    """||changed - weight||^2 / ||weight||^2 of a quantized or cast matrix, a few rows at a time."""
    error = norm = 0.0
    step = max(1, ROWS_ENTRIES // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        original = weight[start : start + step].float()
        if isinstance(changed, StoredWeight):
            difference = changed.rows(slice(start, start + step)).dequantize() - original
        else:
            difference = original.to(changed).float() - original
        error += float(difference.square_().sum(dtype=torch.float64))
        norm += float(original.square().sum(dtype=torch.float64))  # not in place: a float32 weight is the model's own
    return error / norm if norm > 0 else error


@dataclass
class Results:
    """Weights by site, records in the order they were made."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    records: list[SiteRecord] = field(default_factory=list)

    def extend(self, other: "Results") -> None:
        """Add another's."""
        self.weights.update(other.weights)
        self.records.extend(other.records)
