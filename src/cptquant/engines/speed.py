"""How fast an engine is: decoding at batch 1, prefill, or an encoder's sentences."""

import time
from typing import Any

import numpy as np

_DECODE_CONTEXT = 32
"""Tokens in the cache when decoding is timed; small models are dominated by weights, not by attention."""


def measure_speed(
    engine: Any, *, prefill: list[int], decode_tokens: int, vocabulary: int, seconds: float = 1.0
) -> dict[str, float]:
    """Tokens a second of one loaded engine.

    Args:
        prefill: prompt lengths. decode_tokens: tokens decoded at a time. vocabulary: ids are drawn below it.
        seconds: each figure is the best of as many repeats as fit into this, at least two; the first is not counted.

    Returns:
        Decoders: `decode_tokens_per_second`, `prefill_N_tokens_per_second`. Encoders: `encode_N_ms`, batch 1.
    """
    rng = np.random.default_rng(0)
    figures: dict[str, float] = {}
    for length in prefill:
        if length > engine.context:
            continue
        ids = rng.integers(3, vocabulary, length).astype(np.int64)
        if engine.task == "causal_lm":
            figures[f"prefill_{length}_tokens_per_second"] = length / _best(
                lambda ids=ids: _prefill(engine, ids), seconds
            )
        else:
            batch, mask = ids.reshape(1, -1), np.ones((1, length), np.int64)
            figures[f"encode_{length}_ms"] = 1e3 * _best(lambda b=batch, m=mask: engine.encode(b, m), seconds)
    if engine.task == "causal_lm":
        before = min(_DECODE_CONTEXT, engine.context // 2)
        count = min(decode_tokens, engine.context - before)
        ids = rng.integers(3, vocabulary, before + count).astype(np.int64)
        figures["decode_tokens_per_second"] = count / _best_decode(engine, ids, before, seconds)
    return figures


def _prefill(engine: Any, ids: Any) -> None:
    engine.reset()
    engine.extend(ids)


def _best_decode(engine: Any, ids: Any, before: int, seconds: float) -> float:
    def prepare() -> None:
        engine.reset()
        engine.extend(ids[:before])

    def decode() -> None:
        for index in range(before, len(ids)):
            engine.extend(ids[index : index + 1])

    return _best(decode, seconds, prepare)


def _best(action: Any, seconds: float, prepare: Any = None) -> float:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        if prepare is not None:
            prepare()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times[1:])
