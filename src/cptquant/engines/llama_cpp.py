"""llama.cpp through llama-cpp-python: runs what `exporters/gguf` writes."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import EngineError

OLDEST = (0, 3, 9)


class LlamaCppEngine:
    """One loaded .gguf.

    Args:
        model_file: the .gguf. threads: of the computation. context: room of the cache; by default the model's.

    Raises:
        EngineError: the package is missing or too old, the file is damaged, the context is longer than the model's.
    """

    def __init__(self, model_file: Path, *, threads: int = 1, context: int | None = None) -> None:
        library = import_llama_cpp()
        self.version = f"llama-cpp-python {library.__version__}"
        facts = self._facts(library, model_file)
        longest, architecture = facts["context"], facts["architecture"]
        if context is not None and context > longest:
            raise EngineError(f"--context {context} is longer than the {longest} positions of {model_file}")
        self.context = context or longest
        self.task = "encoder" if "bert" in architecture else "causal_lm"
        self._model: Any = _open(
            library, model_file, n_ctx=self.context, n_threads=threads, n_threads_batch=threads,
            logits_all=self.task == "causal_lm", embedding=self.task == "encoder", n_batch=min(512, self.context),
            n_ubatch=min(512, self.context),
        )  # fmt: skip

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
        """Hidden states of a bare encoder for one sequence; padding is cut off."""
        raise EngineError("encoders in llama.cpp are compared by their pooled embeddings only")

    @staticmethod
    def _facts(library: Any, model_file: Path) -> dict[str, Any]:
        opened = _open(library, model_file, vocab_only=True)
        metadata: dict[str, str] = opened.metadata
        architecture = metadata.get("general.architecture", "")
        context = int(metadata.get(f"{architecture}.context_length", "0"))
        opened.close()
        return {"architecture": architecture, "context": context}


def _open(library: Any, model_file: Path, **arguments: Any) -> Any:
    if not model_file.is_file():
        raise EngineError(f"{model_file} does not exist; write it with: cptquant export RUN --target gguf")
    _keep_plain_layouts(library)
    try:
        return library.Llama(model_path=str(model_file), verbose=False, **arguments)
    except Exception as error:
        raise EngineError(
            f"llama.cpp cannot load {model_file} ({str(error).strip().splitlines()[0][:200]}); is the file whole? "
            "Write it again with: cptquant export RUN --target gguf"
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
        EngineError: missing, or too old.
    """
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EngineError(
            "llama-cpp-python is not installed; build it with: pip install cptquant[llamacpp] (about 20 minutes on 2 "
            "cores, needs a C++ compiler)"
        ) from None
    version = tuple(int(part) for part in importlib.metadata.version("llama-cpp-python").split(".")[:3])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"llama-cpp-python {llama_cpp.__version__} is too old, {oldest} is needed; upgrade it")
    return llama_cpp
