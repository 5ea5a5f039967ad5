"""Round to nearest: every weight on its own, no calibration text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.block_grid import round_to_blocks
from cptquant.quantizers.corrected import round_with_columns
from cptquant.quantizers.grid import round_to_grid
from cptquant.quantizers.low_rank import round_with_low_rank
from cptquant.quantizers.slim_round import round_to_segments


@dataclass(frozen=True)
class Rtn:
    """Hyper-parameters of round-to-nearest.

    Attributes:
        clip_search: search for the scale of least squared error (and, where symmetric, its sign) instead of covering
            the largest weight.
    """

    clip_search: bool = True

    def __call__(
        self,
        weight: Tensor,  # (out_features, in_features), any float dtype
        fmt: QuantFormat,
        scale_dtype: torch.dtype,
        *,
        importance: Tensor | None = None,  # (in_features,) float32
    ) -> StoredWeight:
        """Quantize one matrix.

        Args:
            weight: any shape, groups need not divide it. fmt: an integer format.
            scale_dtype: float16 or bfloat16.
            importance: weight of each column's squared errors in the search for scales, and in the choice of what
                is corrected, e.g. mean squared inputs.

        Raises:
            ModelError: a weight is NaN or infinite, or needs a scale beyond the storage dtype's range.
        """
        if fmt.storage == "segments":
            return round_to_segments(weight, fmt, scale_dtype, importance=importance, clip=self.clip_search)
        if fmt.storage == "columns":
            return round_with_columns(weight, fmt, scale_dtype, importance=importance, clip_search=self.clip_search)
        if fmt.storage == "low-rank":
            return round_with_low_rank(weight, fmt, scale_dtype, importance=importance, clip_search=self.clip_search)
        if fmt.block_layout is not None:
            return round_to_blocks(weight, fmt, importance=importance, search=self.clip_search)
        return round_to_grid(weight, fmt, scale_dtype, importance=importance, clip_search=self.clip_search)
