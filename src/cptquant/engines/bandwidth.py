"""How fast this machine reads memory: the limit of decoding, which reads every weight once a token."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BUFFER_BYTES = 1 << 29
"""Larger than the last-level cache of current server processors (up to 384 MB)."""


def read_bandwidth(threads: int, repeats: int = 3) -> float:
    """Bytes a second of a sequential read of a large buffer by the given number of threads; the best of a few.

    Each thread takes the inner product of its share with itself: one read, two operations a number.
    """
    buffer = np.ones(_BUFFER_BYTES // 4, np.float32)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = min(best, time.perf_counter() - began)
    return _BUFFER_BYTES / best
