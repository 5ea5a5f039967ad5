"""Which interpreter has llama-cpp-python: this one, or another that a variable names."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from cptquant.core.errors import EngineError, MissingEngineError

PYTHON_VARIABLE = "CPTQUANT_LLAMACPP_PYTHON"
"""Another interpreter that has numpy and llama-cpp-python, for those who keep engines in environments of their own."""
INSTALL = (
    "pip install 'cptquant[llamacpp]' (compiles llama.cpp: about 20 minutes on 2 cores, needs a C++ compiler), or "
    f"point {PYTHON_VARIABLE} at a Python that has llama-cpp-python"
)
OLDEST = (0, 3, 9)
_PROBE = "import sys, numpy, llama_cpp; print(sys.version_info >= (3, 11), llama_cpp.__version__)"


@dataclass(frozen=True)
class LlamaCpp:
    """An installed engine.

    Attributes:
        python: interpreter. version: of llama-cpp-python.
    """

    python: str
    version: str


def find_llamacpp() -> LlamaCpp:
    """The engine in this environment, or in the one that CPTQUANT_LLAMACPP_PYTHON names.

    Raises:
        MissingEngineError: not installed here, and the variable is not set.
        EngineError: the variable names no Python, or one without the package; the package is too old.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named is None and find_spec("llama_cpp") is None:
        raise MissingEngineError(f"llama-cpp-python is not installed; {INSTALL}")
    where = "this environment" if named is None else f"{PYTHON_VARIABLE}={named}"
    python = sys.executable if named is None else shutil.which(named)
    if python is None:
        raise EngineError(f"{where} is no program that runs; name a Python that has llama-cpp-python, or unset it")
    version, problem = _probe(python)
    if version is None:
        raise EngineError(
            f"{where}: llama-cpp-python cannot be imported there ({problem}); name a Python of 3.11 or newer that has "
            f"numpy and llama-cpp-python: {INSTALL}"
        )
    if tuple(int(part) for part in version.split(".")[:3]) < OLDEST:
        raise EngineError(
            f"{where} has llama-cpp-python {version}, {'.'.join(map(str, OLDEST))} or newer is needed; upgrade it there"
        )
    return LlamaCpp(python, version)


@lru_cache(maxsize=8)
def _probe(python: str) -> tuple[str | None, str]:
    """(version of the package, what is wrong where there is none)."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"
    answer = done.stdout.split()[-2:]
    if done.returncode or len(answer) < 2:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1][:300] if lines else f"it ends with code {done.returncode} and no message"
    if answer[0] != "True":
        return None, "its Python is older than 3.11"
    return answer[1], ""
