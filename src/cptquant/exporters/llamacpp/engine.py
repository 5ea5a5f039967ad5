"""Find an interpreter with llama-cpp-python and run the worker in it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import CptquantError, UserError

PYTHON_VARIABLE = "CPTQUANT_LLAMACPP_PYTHON"
"""Another interpreter that has llama-cpp-python, for those who keep engines in environments of their own."""
INSTALL = (
    "pip install 'cptquant[llamacpp]' (compiles llama.cpp: about 20 minutes on 2 cores), or point "
    f"{PYTHON_VARIABLE} at an interpreter that has llama-cpp-python"
)
OLDEST_VERSION = (0, 3, 0)
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class LlamaCpp:
    """An installed engine.

    Attributes:
        python: interpreter. version: of llama-cpp-python.
    """

    python: str
    version: str

    def tokenize(self, file: Path, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of texts; `special` adds what the file says belongs at the ends."""
        reply, _ = self._run({"model": str(file), "task": "tokenize", "texts": list(texts), "special": special}, False)
        return [list(map(int, ids)) for ids in reply["ids"]]

    def logits(self, file: Path, sequences: Sequence[Sequence[int]], *, threads: int = 1) -> NDArray[np.float32]:
        """Next-token logits, float32 (sequences, T, vocabulary); sequences of one length."""
        _, found = self._run(_request(file, "logits", sequences, threads), True)
        assert found is not None
        return found

    def embeddings(self, file: Path, sequences: Sequence[Sequence[int]], *, threads: int = 1) -> NDArray[np.float32]:
        """Mean-pooled embeddings, float32 (sequences, width)."""
        _, found = self._run(_request(file, "embed", sequences, threads), True)
        assert found is not None
        return found

    def _run(self, request: dict[str, Any], has_output: bool) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
        with tempfile.TemporaryDirectory(prefix="cptquant-") as folder:
            output = Path(folder) / "output.npy"
            request = {**request, "output": str(output)}
            done = subprocess.run(
                [self.python, str(_WORKER)], input=json.dumps(request), capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise CptquantError(
                    f"llama.cpp (llama-cpp-python {self.version}) failed on {request['model']}: "
                    f"{_last_line(done.stderr) or f'exit code {done.returncode}'}"
                )
            reply = json.loads(done.stdout[done.stdout.index("{") :])
            return reply, np.load(output) if has_output else None


def _request(file: Path, task: str, sequences: Sequence[Sequence[int]], threads: int) -> dict[str, Any]:
    ids = [[int(token) for token in sequence] for sequence in sequences]
    return {"model": str(file), "task": task, "sequences": ids, "threads": threads}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def find_llamacpp() -> LlamaCpp | None:
    """The engine in this environment or in the one named by CPTQUANT_LLAMACPP_PYTHON; None if there is none.

    Raises:
        UserError: the variable names an interpreter without it, or the version is too old.
    """
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None and find_spec("llama_cpp") is None:
        return None
    version = _version(python or sys.executable)
    if version is None:
        raise UserError(f"{PYTHON_VARIABLE}={python} has no llama-cpp-python that can be imported; {INSTALL}")
    if tuple(int(part) for part in version.split(".")[:3]) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UserError(f"llama-cpp-python {version} is too old, {oldest} or newer is needed; {INSTALL}")
    return LlamaCpp(python or sys.executable, version)


@lru_cache(maxsize=4)
def _version(python: str) -> str | None:
    code = "import llama_cpp; print(llama_cpp.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None
