"""The engines by name. Each is opened in two steps, so that its library's memory is told apart from the model's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import EngineError

ENGINE_NAMES = ("transformers", "transformers-bf16", "onnx", "llamacpp", "torch")
TARGET_ENGINES = {
    "onnx": "onnx",
    "gguf": "llamacpp",
    "transformers": "transformers",
    "transformers-fused": "transformers",
    "vllm": "transformers",
    "torch": "torch",
}
"""Target -> the engine that runs its files."""


class Engine(Protocol):
    """What every engine can do. Decoders: `reset`, `extend`. Encoders: `encode`."""

    task: str
    context: int
    version: str

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def extend(self, ids: NDArray[np.int64], *, every: bool = False) -> NDArray[np.float32]:
        """Logits of new tokens (T,) of one sequence: of the last, or of every one."""
        ...

    def encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Outputs of an encoder for (batch, T) tokens."""
        ...


Opening = Callable[[Path, int | None], Engine]


def open_engine(name: str, threads: int, *, float_cache: bool = False) -> Opening:
    """Load an engine's library and return what opens a model file with it: (file, context) -> engine.

    Args:
        float_cache: keys and values in float32 where the engine would round them (llama.cpp alone does).

    Raises:
        MissingEngineError: it is not installed. EngineError: no such engine, or too old.
    """
    arguments: dict[str, Any] = {"threads": threads}
    if name == "onnx":
        from cptquant.engines.onnx_runtime import OnnxRuntimeEngine, import_runtime

        import_runtime()
        return lambda file, context: OnnxRuntimeEngine(file, context=context, **arguments)
    if name == "llamacpp":
        from cptquant.engines.llama_cpp import LlamaCppEngine, import_llama_cpp

        import_llama_cpp()
        return lambda file, context: LlamaCppEngine(file, context=context, float_cache=float_cache, **arguments)
    if name in ("transformers", "transformers-bf16"):
        from cptquant.engines.transformers import TransformersEngine

        dtype = "bfloat16" if name.endswith("bf16") else "float32"
        return lambda file, context: TransformersEngine(file, context=context, dtype=dtype, **arguments)
    if name == "torch":
        from cptquant.engines.transformers import SegmentsEngine

        return lambda file, context: SegmentsEngine(file, context=context, **arguments)
    raise EngineError(f"--engine {name!r} is unknown; choose one of: {', '.join(ENGINE_NAMES)}")
