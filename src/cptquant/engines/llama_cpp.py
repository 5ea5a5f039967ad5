"""llama.cpp through llama-cpp-python: runs what `exporters/gguf` writes.

Weights are kept as they stand in the file. A cache of 16 bits, llama.cpp's own default, unless floats are asked for.
"""

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import EngineError, MissingEngineError
from cptquant.engines.llamacpp_python import INSTALL, OLDEST

_BATCH_TOKENS = 512
_LEAST_TOKENS = 32
"""llama.cpp's buffers are made for at least so many."""


class LlamaCppEngine:
    """One loaded .gguf.

    Args:
        model_file: the .gguf. threads: of the computation. context: room of the cache; by default the model's.
        float_cache: keys and values in float32, so that the cache rounds nothing.

    Attributes:
        load_seconds: of the model alone; its metadata is read before, to know what to open it for.

    Raises:
        EngineError: the package is missing or too old, the file is damaged, the context is longer than the model's.
    """

    def __init__(
        self, model_file: Path, *, threads: int = 1, context: int | None = None, float_cache: bool = False
    ) -> None:
        library = import_llama_cpp()
        self.version = f"llama-cpp-python {library.__version__}"
        longest, architecture = _read_facts(library, model_file)
        if context is not None and context > longest:
            raise EngineError(f"--context {context} is longer than the {longest} positions of {model_file}")
        self.context = context or longest
        self.task = "encoder" if "bert" in architecture else "causal_lm"
        room = max(self.context, _LEAST_TOKENS)
        batch = room if self.task == "encoder" else min(_BATCH_TOKENS, room)  # an encoder takes a text at once
        cache_type = library.GGML_TYPE_F32 if float_cache else library.GGML_TYPE_F16
        self._library = library
        began = time.perf_counter()
        self._model: Any = _open(
            library, model_file, n_ctx=room, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0,
            logits_all=self.task == "causal_lm", embedding=self.task == "encoder", n_batch=batch, n_ubatch=batch,
            type_k=cache_type, type_v=cache_type,
        )  # fmt: skip
        self.load_seconds = time.perf_counter() - began

    def reset(self) -> None:
        """Forget all tokens."""
        self._model.reset()

    def extend(self, ids: NDArray[np.int64], *, every: bool = False) -> NDArray[np.float32]:
        """Logits of new tokens of one sequence: of the last, or of every one."""
        model, before = self._model, self._model.n_tokens
        if before + len(ids) > self.context:
            raise EngineError(f"{before + len(ids)} tokens do not fit the context of {self.context}")
        model._logits_all = every
        model.eval([int(token) for token in ids])
        if every:
            return np.array(model.scores[before : before + len(ids)], np.float32)
        count = model._model.n_vocab()
        return np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(count,)).reshape(1, -1).copy()

    def encode(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings (batch, width) of an encoder's texts, pooled as the file says (ours say: mean); padding is cut."""
        rows = [self._embed([int(token) for token in row[keep > 0]]) for row, keep in zip(ids, mask, strict=True)]
        return np.stack(rows)

    def _embed(self, ids: list[int]) -> NDArray[np.float32]:
        model = self._model
        if len(ids) > self.context:
            raise EngineError(f"{len(ids)} tokens do not fit the context of {self.context}")
        model._batch.reset()
        model._batch.add_sequence(ids, 0, True)
        model._ctx.kv_cache_clear()
        model._ctx.decode(model._batch)
        found = self._library.llama_get_embeddings_seq(model._ctx.ctx, 0)
        if not found:
            raise EngineError("the file names no pooling, so that llama.cpp gives no embedding of a text")
        return np.array(found[: model.n_embd()], np.float32)


def tokenize(model_file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by the file's own tokenizer, with what it says belongs at the ends.

    Raises:
        EngineError: as `LlamaCppEngine`.
    """
    library = import_llama_cpp()
    opened = _open(library, model_file, vocab_only=True)
    found = [opened.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    opened.close()
    return found


def _read_facts(library: Any, model_file: Path) -> tuple[int, str]:
    """(longest context, architecture) as the file says."""
    opened = _open(library, model_file, vocab_only=True)
    metadata: dict[str, str] = opened.metadata
    architecture = metadata.get("general.architecture", "")
    context = int(metadata.get(f"{architecture}.context_length", "0"))
    opened.close()
    return context, architecture


def _open(library: Any, model_file: Path, **arguments: Any) -> Any:
    if not model_file.is_file():
        raise EngineError(f"{model_file} does not exist; write it with: cptquant export RUN --target gguf")
    _keep_plain_layouts(library)
    try:
        return library.Llama(model_path=str(model_file), verbose=False, **arguments)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise EngineError(
            f"llama.cpp cannot load {model_file} ({type(error).__name__}: {reason}); is the file whole? Write it again "
            "with: cptquant export RUN --target gguf"
        ) from error


def _keep_plain_layouts(library: Any) -> None:
    """Weights as they stand in the file: the repacked layouts (AMX) of some builds crash on some machines."""
    defaults = library.llama_model_default_params
    if getattr(defaults, "is_plain", False):
        return

    def plain() -> Any:
        parameters = defaults()
        if hasattr(parameters, "use_extra_bufts"):
            parameters.use_extra_bufts = False
        return parameters

    plain.is_plain = True  # type: ignore[attr-defined]
    library.llama_cpp.llama_model_default_params = plain
    library.llama_model_default_params = plain


def import_llama_cpp() -> Any:
    """The package.

    Raises:
        MissingEngineError: not installed in this interpreter. EngineError: too old.
    """
    try:
        library: Any = importlib.import_module("llama_cpp")  # by name: not among what the checkers see installed
    except ImportError as error:
        raise MissingEngineError(f"llama-cpp-python cannot be imported ({error}); {INSTALL}") from None
    if tuple(int(part) for part in library.__version__.split(".")[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"llama-cpp-python {library.__version__} is too old, {oldest} is needed; upgrade it")
    return library
