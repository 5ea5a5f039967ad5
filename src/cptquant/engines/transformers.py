"""Hugging Face transformers on the CPU: the baseline, in float32 or bfloat16; and its model with segmented layers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from cptquant.core.errors import EngineError
from cptquant.core.layout import Task
from cptquant.models.load import load_any, quiet_transformers
from cptquant.models.segmented import load_segmented
from cptquant.models.source import find_model


class TransformersEngine:
    """One loaded model folder.

    Args:
        folder: a Hugging Face folder; a compressed-tensors one is dequantized. dtype: in which it computes.
        threads: of the computation. context: at most the model's positions, which is the default.

    Raises:
        ModelError: the folder cannot be loaded. EngineError: the context is longer than the model's.
    """

    def __init__(self, folder: Path, *, threads: int = 1, context: int | None = None, dtype: str = "float32") -> None:
        torch.set_num_threads(threads)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}"
        self.task, self._module, positions = self._load(folder, getattr(torch, dtype))
        longest = positions or 1 << 20
        if context is not None and context > longest:
            raise EngineError(f"--context {context} is longer than the {longest} positions of {folder}")
        self.context = context or longest
        self._cache: Any = None

    def _load(self, folder: Path, dtype: torch.dtype) -> tuple[Task, Any, int | None]:
        """Task, module and the longest context."""
        loaded = load_any(folder)
        module: Any = loaded.module
        return loaded.layout.task, module.to(dtype), loaded.layout.max_positions

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache = None

    def extend(self, ids: NDArray[np.int64], *, every: bool = False) -> NDArray[np.float32]:
        """Logits of new tokens of one sequence: of the last, or of every one."""
        with torch.inference_mode():
            output = self._module(
                input_ids=torch.from_numpy(ids).reshape(1, -1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if every else 1,
            )
        self._cache = output.past_key_values
        return output.logits[0].float().numpy()

    def encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Outputs of an encoder."""
        with torch.inference_mode():
            output = self._module(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        return (output.last_hidden_state if self.task == "encoder" else output.logits).float().numpy()


class SegmentsEngine(TransformersEngine):
    """A folder written for --target torch: linear layers stay packed and are dequantized when they are used."""

    def _load(self, folder: Path, dtype: torch.dtype) -> tuple[Task, Any, int | None]:
        with quiet_transformers():
            found = find_model(folder)
            module = load_segmented(folder, dtype=dtype)
        return found.task, module, getattr(found.config, "max_position_embeddings", None)
