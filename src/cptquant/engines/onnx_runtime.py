"""ONNX Runtime on the CPU: runs what `exporters/onnx` writes. Loads no torch, so that its memory is its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import EngineError, MissingEngineError

OLDEST = (1, 23)
"""2-bit MatMulNBits and GatherBlockQuantized on packed bytes need at least this version."""


class OnnxRuntimeEngine:
    """One loaded model.

    Args:
        model_file: `model.onnx`, its tensors beside it. threads: of the computation.
        context: room of a decoder's cache; by default the model's.

    Raises:
        EngineError: the package is missing or too old, the file damaged, or the context longer than the model's.
    """

    def __init__(self, model_file: Path, *, threads: int = 1, context: int | None = None) -> None:
        runtime = import_runtime()
        self.version = f"onnxruntime {runtime.__version__}"
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime {runtime.__version__} cannot load {model_file} ({_first_line(error)}); is the file "
                "whole? Write it again with: cptquant export RUN --target onnx"
            ) from error
        facts: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        if "cptquant.task" not in facts:
            raise EngineError(
                f"{model_file} was not written by cptquant; give a folder of: cptquant export --target onnx"
            )
        self.task = facts["cptquant.task"]
        longest = int(facts["cptquant.context"])
        if context is not None and context > longest:
            raise EngineError(
                f"--context {context} is longer than the {longest} positions {model_file} was written for"
            )
        self.context = context or longest
        self._names = [node.name for node in self._session.get_inputs()]
        self._cache: dict[str, Any] = {}
        if self.task == "causal_lm":
            shape = (1, int(facts["cptquant.kv_heads"]), self.context, int(facts["cptquant.head_size"]))
            for layer in range(int(facts["cptquant.layers"])):
                for part in ("key", "value"):
                    buffer = runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                    self._cache[f"{layer}.{part}"] = buffer
        self.filled = 0

    def reset(self) -> None:
        """Forget the tokens in the cache."""
        self.filled = 0

    def extend(self, ids: NDArray[np.int64], *, every: bool = False) -> NDArray[np.float32]:
        """Run new tokens of one sequence after those in the cache.

        Args:
            ids: (T,). every: logits of all T tokens; by default of the last only.

        Returns:
            (T, vocabulary) or (1, vocabulary).

        Raises:
            EngineError: the cache would overflow.
        """
        count = len(ids)
        if self.filled + count > self.context:
            raise EngineError(f"{self.filled + count} tokens do not fit the context of {self.context}")
        wanted = np.arange(count) if every else np.array([count - 1])
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids.reshape(1, -1))
        binding.bind_cpu_input("logit_positions", wanted)
        self.filled += count
        binding.bind_cpu_input("seqlens_k", np.array([self.filled - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(self.filled, np.int32))
        if "position_ids" in self._names:
            binding.bind_cpu_input("position_ids", np.arange(self.filled - count, self.filled).reshape(1, -1))
        binding.bind_output("logits", "cpu")
        for name, buffer in self._cache.items():  # one buffer for input and output: new entries are written in place
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[0]

    def encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """An encoder's output for (batch, T) tokens: logits, or the last hidden state of a bare encoder."""
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return self._session.run(None, {name: feeds[name] for name in self._names})[0]


def import_runtime() -> Any:
    """The package.

    Raises:
        MissingEngineError: not installed. EngineError: too old.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingEngineError("ONNX Runtime is not installed; install it with: pip install cptquant[onnx]") from None
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} is too old, {oldest} is needed; upgrade it with: pip install "
            f"'onnxruntime>={oldest}'"
        )
    return onnxruntime


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
