"""docs/segments.md, read slowly: bits one by one, nothing of ours but the tensors."""

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import given, settings

from cptquant.packing.quantized_weight import encode
from cptquant.packing.segments import SegmentedWeight
from tests.packing.test_segments import segmented_weights


def read_slowly(tensors: Mapping[str, torch.Tensor], average: int, columns_per_group: int) -> np.ndarray:
    """float32 (rows, columns), columns in their original order."""
    rows, columns = tensors["weight_shape"].tolist()
    bit_map = tensors["weight_widths"].tolist()
    groups = columns // columns_per_group
    widths = [average - 1 + ((bit_map[group // 4] >> 2 * (group % 4)) & 3) for group in range(groups)]
    words = tensors["weight_packed"].numpy().view(np.uint32)
    bits = ((words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(rows, -1).astype(np.int64)
    values = np.zeros((rows, columns), dtype=np.float32)
    at = wide = narrow = 0
    for group in sorted(range(groups), key=lambda group: widths[group]):
        width = widths[group]
        part = bits[:, at : at + columns_per_group * width].reshape(rows, columns_per_group, width)
        codes = (part << np.arange(width)).sum(axis=2) - (1 << (width - 1))
        at += columns_per_group * width
        if width == 1:
            word = tensors["weight_binary"][:, narrow].numpy().astype(np.int64) & 0xFFFF
            mean = (word & 0x1F) - 32 * (word >> 15)
            scale = (word & 0x7FE0).astype(np.uint16).view(np.float16).astype(np.float32)
            found, narrow = (codes + 0.5 + mean[:, None] / 32) * scale[:, None], narrow + 1
        else:
            found, wide = codes * tensors["weight_scale"][:, wide, None].float().numpy(), wide + 1
        values[:, group * columns_per_group : (group + 1) * columns_per_group] = found
    assert at == bits.shape[1]
    if "weight_columns" in tensors:
        original = np.empty_like(values)
        original[:, tensors["weight_columns"].numpy().astype(np.int64)] = values
        return original
    return values


@settings(deadline=None, max_examples=80)
@given(segmented_weights())
def test_the_schema_is_what_is_written(weight: SegmentedWeight) -> None:
    assert isinstance(weight.format.granularity, int)
    found = read_slowly(encode(weight), weight.format.code_bits, weight.format.granularity)
    assert np.array_equal(found, weight.dequantize().numpy())
