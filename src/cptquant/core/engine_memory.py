"""How much memory a model takes in an engine, predicted from its layout and formats.

Peak resident set = the process with the engine's library + weights as the engine holds them + key/value cache + what a
forward pass needs. The constants are measured (benchmarks/engine_memory.py); every export reads the real peak and puts
it beside the prediction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cptquant.core.engine_export import MemoryUse
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.targets import find_target

_PIECE_TOKENS = 512
"""Prompts are run in pieces of at most this many tokens when memory is measured."""
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class EngineMemory:
    """What an engine needs beside the file's tensors.

    Attributes:
        base_bytes: Python, numpy and the engine's library without a model.
        cache_bytes_per_entry: of one number in the key/value cache.
        weight_factor: bytes in memory per byte of a quantized tensor in the file.
        float_factor: the same for matrices kept in 16 bits.
        hidden_copies: float32 copies of a piece's widest hidden state that are alive at once.
    """

    base_bytes: int
    cache_bytes_per_entry: int
    weight_factor: float
    float_factor: float
    hidden_copies: float


ENGINE_MEMORY: dict[str, EngineMemory] = {
    "onnx": EngineMemory(70_000_000, 4, 2.0, 4.0, 6.0),
    "gguf": EngineMemory(60_000_000, 2, 1.0, 1.0, 6.0),
}


def cache_bytes(layout: ModelLayout, context: int, bytes_per_entry: int) -> int:
    """Key/value cache of `context` tokens: two vectors a token and block, as wide as k and v really are.

    Grouped-query attention has fewer key/value heads than query heads, so their own sites give the width. Encoders have
    no cache.
    """
    if layout.task != "causal_lm":
        return 0
    width = sum(site.out_features for site in layout.block_sites if site.role in ("k", "v"))
    width += sum(2 * (site.out_features // 3) for site in layout.block_sites if site.role == "qkv")
    return context * width * bytes_per_entry


def predict_memory(
    layout: ModelLayout, target_name: str, formats: Mapping[str, QuantFormat], context: int
) -> MemoryUse:
    """Expected peak resident set of an engine with its cache filled.

    Args:
        target_name: one of `ENGINE_MEMORY`. formats: site -> format, 16 bits where not named.
        context: tokens in the cache.
    """
    engine, target = ENGINE_MEMORY[target_name], find_target(target_name)
    total = target.plan_bytes(layout, formats)
    floats = sum(
        2 * site.weight_count
        for site in layout.sites
        if site.kind == "linear" and formats.get(site.name, layout.keep_format).is_float
    )
    shared = layout.shared_head is not None and all(
        formats.get(name, layout.keep_format).is_float for name in layout.shared_head
    )
    quantized = total - floats if not shared else total - min(floats, total)
    weights = round(engine.weight_factor * max(0, quantized) + engine.float_factor * floats)
    cache = cache_bytes(layout, context, engine.cache_bytes_per_entry)
    widest = max((site.out_features for site in layout.block_sites), default=layout.hidden_size)
    overhead = round(engine.hidden_copies * 4 * min(context, _PIECE_TOKENS) * widest)
    return MemoryUse(
        context=context,
        base_bytes=engine.base_bytes,
        weight_bytes=weights,
        cache_bytes=cache,
        overhead_bytes=overhead,
        predicted_bytes=engine.base_bytes + weights + cache + overhead,
    )


def held_bytes_per_token(layout: ModelLayout, formats: Mapping[str, QuantFormat], *, float_bytes: int) -> int | None:
    """Bytes of weights that decoding one token reads: every matrix but the embedding, of which one row is read.

    Args:
        formats: site -> format; sites not named, or in 16 bits, take `float_bytes` a weight in the engine's memory.

    Returns:
        None for encoders, which do not decode.
    """
    if layout.task != "causal_lm":
        return None
    total = 0
    for site in layout.sites:
        fmt = formats.get(site.name, layout.keep_format)
        if site.kind == "embedding":
            continue
        total += (
            float_bytes * site.weight_count if fmt.is_float else fmt.stored_bytes(site.out_features, site.in_features)
        )
    return total


def default_context(layout: ModelLayout, context: int | None) -> int:
    """The context asked for, or the model's, at most 4,096.

    Raises:
        BudgetError: longer than the model's positions.
    """
    longest = layout.max_positions
    if context is None:
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise BudgetError(f"--context {context} is longer than the {longest} positions of {layout.source}")
    return context
