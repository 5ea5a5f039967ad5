"""Memory as the budget: weights, the cache of keys and values at a context length, and what the engine needs itself."""

from dataclasses import dataclass

from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError
from cptquant.core.layout import ModelLayout

CACHE_ENTRY_BYTES = {"onnx": 4}
"""ONNX Runtime caches keys and values in float32, the other engines in float16."""
WEIGHT_FACTOR = {"onnx": 2.0}
"""Bytes in memory per byte of weights in the file: ONNX Runtime repacks them beside the mapped file."""
PROMPT_TOKENS = 512
"""Tokens an engine takes at a time when it reads a prompt (llama.cpp's n_ubatch)."""
ENGINE_BASE_BYTES = {"gguf": 90_000_000, "onnx": 70_000_000}
"""Resident bytes of llama.cpp under its Python binding beside weights, cache and activations: 80 to 94 MB measured as
peak resident set minus file size on models of 0.13 and 0.32 billion parameters. Other targets: 500 MB (torch)."""
_TORCH_BASE_BYTES = 500_000_000


@dataclass(frozen=True)
class MemoryNeed:
    """What a model takes at run time, apart from its weights.

    Attributes:
        context: tokens that the cache holds. cache_bytes: keys and values of all blocks.
        engine_bytes: the engine itself. activation_bytes: logits and the widest activations of one piece of a prompt.
    """

    context: int
    cache_bytes: int
    engine_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.cache_bytes + self.engine_bytes + self.activation_bytes


def find_need(layout: ModelLayout, context: int | None, target: str) -> MemoryNeed:
    """Memory beside the weights at a context length (None: all the model's positions).

    Raises:
        BudgetError: a context below 1 or beyond the model's, or a model whose cache is unknown.
    """
    longest = layout.max_positions
    if context is None:
        if longest is None:
            raise BudgetError("--memory needs --context: config.json does not say how many positions the model has")
        context = longest
    if context < 1 or (longest is not None and context > longest):
        raise BudgetError(f"--context {context} is outside the model's range of 1 to {longest} tokens")
    caches = layout.task == "causal_lm"
    if caches and layout.key_value_width is None:
        raise BudgetError("--memory: config.json does not say how wide keys and values are; use --budget")
    width = layout.key_value_width or 0
    cache = CACHE_ENTRY_BYTES.get(target, 2) * width * layout.block_count * context if caches else 0
    widest = max((site.out_features for site in layout.block_sites), default=layout.hidden_size)
    head = layout.vocabulary_size if layout.task in ("causal_lm", "masked_lm") else 0
    tokens = min(PROMPT_TOKENS, context)
    activations = 4 * tokens * (3 * widest + 4 * layout.hidden_size) + 4 * head
    return MemoryNeed(context, cache, ENGINE_BASE_BYTES.get(target, _TORCH_BASE_BYTES), activations)


def memory_budget(layout: ModelLayout, memory: str, context: int | None, target: str) -> Budget:
    """The weights' share of a memory limit, as a budget in bytes.

    Raises:
        BudgetError: unreadable, not in bytes, or less than the model needs beside its weights.
    """
    try:
        wanted = Budget.parse(memory)
    except BudgetError as error:
        raise BudgetError(str(error).replace("--budget", "--memory", 1)) from None
    if wanted.unit != "bytes":
        raise BudgetError(f"--memory {memory!r} is no size; write it as 2GB, 512MB or 1.5GiB")
    need = find_need(layout, context, target)
    left = int((int(wanted.value) - need.total_bytes) / WEIGHT_FACTOR.get(target, 1.0))
    parts = (
        f"{need.cache_bytes:,} bytes of keys and values at {need.context} tokens, {need.engine_bytes:,} of the engine, "
        f"{need.activation_bytes:,} of activations"
    )
    if left <= 0:
        raise BudgetError(
            f"--memory {memory} leaves nothing for the weights: {need.total_bytes:,} bytes go to {parts}; raise "
            "--memory or lower --context"
        )
    return Budget(left, "bytes", "file", f"{memory} of memory less {parts}")
