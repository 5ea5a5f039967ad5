"""Run an engine in a process of its own and get its answer."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cptquant.core.errors import EngineError, MissingEngineError
from cptquant.engines.llamacpp_python import PYTHON_VARIABLE, find_llamacpp

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Large pages for large allocations, where glibc and the kernel have them: decoding reads every weight once a token,
and ONNX Runtime did that 1.3 times faster on a virtual machine, where looking up a page is dear. For every engine."""
_WORKER = "import sys; sys.path.append(sys.argv.pop(1)); from cptquant.engines.worker import main; main(*sys.argv[1:])"
"""For another interpreter: this package from where it stands, everything else from there."""


def run_engine(
    engine: str, model: Path, do: str, *, threads: int = 1, context: int | None = None, **request: Any
) -> dict[str, Any]:
    """Carry out one request of `engines.worker`.

    Args:
        engine: name. model: file or folder. do: "outputs", "speed", "generate", "fill", "tokenize" or "bandwidth".

    Raises:
        MissingEngineError: the engine is not installed. EngineError: it is too old, refuses the file, fails while it
        runs, or its process ends without an answer.
    """
    python, environment = sys.executable, {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES.partition("=")[0] not in tunables:  # a person's own choice stays
        environment["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}".lstrip(":")
    start = ["-m", "cptquant.engines.worker"]
    if engine == "llamacpp":
        python = find_llamacpp().python
        if PYTHON_VARIABLE in os.environ:  # an environment of its own; its own packages come before ours
            start = ["-c", _WORKER, str(Path(__file__).parents[2])]
    with tempfile.TemporaryDirectory(prefix="cptquant-") as work:
        asked, answer = Path(work) / "request.json", Path(work) / "result.json"
        content = {"engine": engine, "model": str(model), "do": do, "threads": threads, "context": context, **request}
        try:
            asked.write_text(json.dumps(content))
        except OSError as error:
            raise EngineError(
                f"the temporary folder {work} takes no files ({error.strerror}); free space there, or set TMPDIR"
            ) from None
        done = subprocess.run(
            [python, *start, str(asked), str(answer)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not answer.is_file():
            loaded = answer.with_suffix(".loaded").exists()
            raise EngineError(_spell_end(engine, model, done, doing=do if loaded else ""))
        result: dict[str, Any] = json.loads(answer.read_text())
    if "error" in result:
        raise (MissingEngineError if result["missing"] else EngineError)(result["error"])
    return result


def _spell_end(engine: str, model: Path, done: subprocess.CompletedProcess[str], *, doing: str) -> str:
    """A process that ended without an answer: how, in what, and its last words; only loading blames the file."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    code = done.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    where = f"after loading {model}, in its request {doing!r}" if doing else f"while loading {model}"
    remedy = "" if doing else "; is the file whole? Write it again with: cptquant export RUN"
    return f"the {engine} engine {how} {where} ({lines[-1][:300] if lines else 'no message'}){remedy}"
