"""How much memory a model takes in an engine: what `--memory` plans with, and what `export` puts beside the real peak.

Peak resident set = the process with the engine's library + weights as the engine holds them + key/value cache + what a
forward pass over a piece of a prompt needs. The constants are fitted to measured peaks (benchmarks/engine_memory.py has
the cases, those of the fit and those that only check it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cptquant.core.budget import Budget
from cptquant.core.engine_export import MemoryUse
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target

PIECE_TOKENS = 512
"""Prompts are run in pieces of at most this many tokens."""
LONGEST_DEFAULT_CONTEXT = 4096
UNKNOWN_CONTEXT = 2048
"""Where config.json does not say how many positions the model has."""


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds. Factors are bytes in memory per byte in the file.

    Attributes:
        base_bytes: Python, numpy and the engine's library with an open model, without what grows with the model.
        cache_entry_bytes: of one number in the key/value cache.
        quantized_factor: of quantized linear matrices. float_factor: of linear matrices kept in 16 bits.
        loading_factor: of the same while the model is loaded, when there is no cache and no activation yet.
        embedding_factor: of an embedding that is not also the head; ONNX Runtime touches the rows it needs.
        kept_factor: of norms, biases, positions.
        bytes_per_token: of the vocabulary: its text, merges and look-up tables.
        attention_copies, width_copies, hidden_copies: float32 arrays that are alive at once in a piece: (heads, tokens,
            context), (tokens, widest product) and (tokens, width of the model).
        encoder_factor: of these activations in an encoder, whose attention runs in another kernel.
        joins_gates: the widest product is gate and up in one.
    """

    base_bytes: int
    cache_entry_bytes: int
    quantized_factor: float
    float_factor: float
    loading_factor: float
    embedding_factor: float
    kept_factor: float
    bytes_per_token: float
    attention_copies: float
    width_copies: float
    hidden_copies: float
    encoder_factor: float
    joins_gates: bool


ENGINE_MEMORY: dict[str, EngineMemory] = {
    "gguf": EngineMemory(
        base_bytes=50_000_000, cache_entry_bytes=2, quantized_factor=1.0, float_factor=1.0, loading_factor=1.0,
        embedding_factor=1.0, kept_factor=1.0, bytes_per_token=320, attention_copies=1.6, width_copies=2.0,
        hidden_copies=1.0, encoder_factor=1.0, joins_gates=False,
    ),
    "onnx": EngineMemory(
        base_bytes=62_000_000, cache_entry_bytes=4, quantized_factor=1.55, float_factor=2.8, loading_factor=4.2,
        embedding_factor=0.2, kept_factor=3.0, bytes_per_token=0, attention_copies=0.85, width_copies=1.4,
        hidden_copies=2.0, encoder_factor=2.2, joins_gates=True,
    ),
}  # fmt: skip
"""Target -> its engine: llama.cpp under llama-cpp-python (float16 cache, the whole file mapped and touched), ONNX
Runtime (float32 cache; matrices repacked beside the mapped file, 16-bit ones turned into float32)."""


def find_context(layout: ModelLayout, context: int | None) -> int:
    """The context asked for, or the model's, at most 4,096.

    Raises:
        BudgetError: too short to predict anything, or longer than the model's positions.
    """
    longest = layout.max_positions
    if context is None:
        return min(longest or UNKNOWN_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    least = 2 if layout.task == "causal_lm" else 1  # one token has nothing to predict
    if context < least or (longest is not None and context > longest):
        allowed = f"{least} to {longest} tokens" if longest is not None else f"{least} tokens or more"
        raise BudgetError(f"--context {context} is outside the model's range of {allowed} ({layout.source})")
    return context


def cache_bytes(layout: ModelLayout, context: int, entry_bytes: int) -> int:
    """Key/value cache of `context` tokens: two vectors a token and block, as wide as k and v really are.

    Grouped-query attention has fewer key/value heads than query heads, which `key_value_width` knows; where config.json
    does not say it, the widths of the k and v sites. Encoders have no cache.
    """
    if layout.task != "causal_lm":
        return 0
    if layout.key_value_width is not None:
        width = layout.key_value_width * layout.block_count
    else:
        width = sum(site.out_features for site in layout.block_sites if site.role in ("k", "v"))
        width += sum(2 * (site.out_features // 3) for site in layout.block_sites if site.role == "qkv")
    return context * width * entry_bytes


def predict_memory(
    layout: ModelLayout,
    target_name: str,
    formats: Mapping[str, QuantFormat],
    context: int,
    limit_bytes: int | None = None,
) -> MemoryUse:
    """Expected peak resident set of an engine with its cache filled.

    Args:
        target_name: one of `ENGINE_MEMORY`. formats: site -> format, 16 bits where not named.
        context: tokens in the cache. limit_bytes: what `--memory` allows; only stated.
    """
    engine = ENGINE_MEMORY[target_name]
    cache = cache_bytes(layout, context, engine.cache_entry_bytes)
    weights, loading = _weight_bytes(layout, target_name, formats)
    overhead = max(_overhead_bytes(layout, engine, context), loading - weights - cache)
    return MemoryUse(
        context=context,
        base_bytes=engine.base_bytes,
        weight_bytes=weights,
        cache_bytes=cache,
        overhead_bytes=overhead,
        predicted_bytes=engine.base_bytes + weights + cache + overhead,
        limit_bytes=limit_bytes,
    )


def _weight_bytes(layout: ModelLayout, target_name: str, formats: Mapping[str, QuantFormat]) -> tuple[int, int]:
    """Weights as the engine holds them, and the most of them while it loads."""
    engine, target = ENGINE_MEMORY[target_name], find_target(target_name)
    shared = layout.shared_head or ("", "")
    total, floats = engine.kept_factor * target.kept_bytes(layout), 0
    for site in layout.sites:
        fmt = formats.get(site.name, layout.keep_format)
        if site.name == shared[0]:
            continue  # one tensor with the head, and used as a whole
        if site.name == shared[1]:
            size = target.shared_head_bytes(layout, formats.get(shared[0], layout.keep_format), fmt)
        else:
            size = target.site_bytes(layout, site, fmt)
        if site.kind == "embedding":
            total += engine.embedding_factor * size
        elif not fmt.is_float:
            total += engine.quantized_factor * size
        else:
            total, floats = total + engine.float_factor * size, floats + size
    return round(total), round(total + (engine.loading_factor - engine.float_factor) * floats)


def _overhead_bytes(layout: ModelLayout, engine: EngineMemory, context: int) -> int:
    """Vocabulary, and the activations of one piece of a prompt."""
    tokens = min(context, PIECE_TOKENS)
    widest = _widest_product(layout, joins_gates=engine.joins_gates)
    heads = layout.attention_heads or max(1, layout.hidden_size // 64)
    activations = (
        engine.attention_copies * heads * context
        + engine.width_copies * widest
        + engine.hidden_copies * layout.hidden_size
    )
    if layout.task != "causal_lm":
        activations *= engine.encoder_factor
    return round(4 * tokens * activations + engine.bytes_per_token * layout.vocabulary_size)


def _widest_product(layout: ModelLayout, *, joins_gates: bool) -> int:
    widest = max((site.out_features for site in layout.block_sites), default=layout.hidden_size)
    gate = max((site.out_features for site in layout.block_sites if site.role == "gate"), default=0)
    return max(widest, 2 * gate) if joins_gates else widest


def parse_memory(memory: str) -> int:
    """Bytes of `--memory`.

    Raises:
        BudgetError: unreadable, or no size.
    """
    try:
        wanted = Budget.parse(memory)
    except BudgetError:
        raise BudgetError(f"--memory {memory!r} is not readable; {_SPELLINGS}") from None
    if wanted.unit != "bytes":
        raise BudgetError(f"--memory {memory!r} is no size; {_SPELLINGS}")
    return int(wanted.value)


_SPELLINGS = "write it as 2GB, 512MB or 1.5GiB"


def memory_budget(layout: ModelLayout, memory: str, context: int | None, target_name: str) -> Budget:
    """The weights' share of a memory limit, as a budget in bytes of the file.

    The share is right for a file whose matrices are all quantized; `fit_budget` corrects it for a plan that keeps some
    in 16 bits, which an engine may hold in more.

    Raises:
        BudgetError: unreadable, not in bytes, less than the model needs beside its weights, or an engine whose memory
        was never measured.
    """
    limit = parse_memory(memory)
    if target_name not in ENGINE_MEMORY:
        raise BudgetError(
            f"--memory {memory} needs a target whose engine's memory is known: {', '.join(ENGINE_MEMORY)}; under "
            f"--target {target_name} it does not depend on the formats alone, use --budget"
        )
    engine, context = ENGINE_MEMORY[target_name], find_context(layout, context)
    cache = cache_bytes(layout, context, engine.cache_entry_bytes)
    overhead = _overhead_bytes(layout, engine, context)
    kept = round((engine.kept_factor - engine.quantized_factor) * find_target(target_name).kept_bytes(layout))
    left = int((limit - engine.base_bytes - cache - overhead - kept) / engine.quantized_factor)
    everything = find_target(target_name).plan_bytes(layout, {})
    if left > everything and predict_memory(layout, target_name, {}, context).predicted_bytes > limit:
        left = everything  # in 16 bits it fits the file, but not the engine, which holds such matrices in more
    parts = (
        f"{cache:,} bytes of keys and values at {context} tokens, {engine.base_bytes:,} of the engine, {overhead:,} of "
        "vocabulary and activations"
    )
    if left <= 0:
        raise BudgetError(
            f"--memory {memory} leaves nothing for the weights: {engine.base_bytes + cache + overhead:,} bytes go to "
            f"{parts}; raise --memory or lower --context"
        )
    return Budget(left, "bytes", "file", f"{memory} (less {parts})", flag="--memory")


def fit_budget(layout: ModelLayout, budget: Budget, plan: Plan, context: int, limit_bytes: int) -> Budget | None:
    """A smaller budget where a plan is predicted to take more memory than the limit; None where it fits."""
    predicted = predict_memory(layout, plan.target, plan.quant_formats, context).predicted_bytes
    if predicted <= limit_bytes:
        return None
    engine = ENGINE_MEMORY[plan.target]
    beside = engine.base_bytes + cache_bytes(layout, context, engine.cache_entry_bytes)
    beside += _overhead_bytes(layout, engine, context)
    share = (limit_bytes - beside) / (predicted - beside)
    return replace(budget, value=max(1, int(plan.size_bytes * share)))


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
