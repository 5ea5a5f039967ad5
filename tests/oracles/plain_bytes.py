"""Bytes on disk by making the tensors and asking how large they are: the slow reference of the byte arithmetic."""

import numpy as np

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout


def stored_bytes(fmt: QuantFormat, rows: int, columns: int) -> int:
    """Make every tensor that compressed-tensors would write for one matrix, and add up their bytes."""
    if fmt.storage in ("float16", "bfloat16"):
        return np.zeros((rows, columns), dtype=np.float16).nbytes
    if fmt.granularity == "tensor":
        scales = np.zeros(1, dtype=np.float16)
    elif fmt.granularity == "channel":
        scales = np.zeros((rows, 1), dtype=np.float16)
    else:
        starts = list(range(0, columns, fmt.granularity))
        scales = np.zeros((rows, len(starts)), dtype=np.float16)
    total = scales.nbytes
    if fmt.storage == "plain":
        total += np.zeros((rows, columns), dtype=np.int8).nbytes
        return total if fmt.symmetric else total + np.zeros(scales.shape, dtype=np.int8).nbytes
    total += sum(_row_words(columns, fmt.code_bits) * 4 for _ in range(rows))
    total += np.zeros(2, dtype=np.int64).nbytes  # weight_shape
    if not fmt.symmetric and fmt.granularity == "tensor":
        total += np.zeros(1, dtype=np.int8).nbytes
    elif not fmt.symmetric:
        total += sum(_row_words(rows, fmt.code_bits) * 4 for _ in range(scales.shape[1]))
    return total


def _row_words(count: int, bits: int) -> int:
    """32-bit words that hold so many codes, counted by laying them down one by one."""
    words, free = 0, 0
    for _ in range(count):
        left = bits
        while left:
            if not free:
                words, free = words + 1, 32
            taken = min(left, free)
            left, free = left - taken, free - taken
    return words


def checkpoint_bytes(layout: ModelLayout, formats: dict[str, QuantFormat]) -> int:
    """Bytes of all tensors of a checkpoint, tensor by tensor."""
    total = sum(2 * int(np.prod(tensor.shape)) for tensor in layout.kept)
    shared = layout.shared_head or ()
    both_float = bool(shared) and all(formats[name].is_float for name in shared)
    for site in layout.sites:
        if both_float and site.name == shared[1]:
            continue  # the head is the embedding's tensor
        total += stored_bytes(formats[site.name], site.out_features, site.in_features)
    return total
