"""Run an engine in a process of its own and get its answer."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cptquant.core.errors import EngineError

LLAMACPP_PYTHON = "CPTQUANT_LLAMACPP_PYTHON"
"""Another interpreter that has numpy and llama-cpp-python (`exporters.llamacpp.engine`)."""


def run_engine(
    engine: str, model: Path, do: str, *, threads: int = 1, context: int | None = None, **request: Any
) -> dict[str, Any]:
    """Carry out one request of `engines.worker`.

    Args:
        engine: name. model: file or folder. do: "outputs", "speed", "generate", "fill" or "load".

    Raises:
        EngineError: the engine is missing, too old, refuses the file, or its process ends without an answer.
    """
    with tempfile.TemporaryDirectory() as work:
        asked, answer = Path(work) / "request.json", Path(work) / "result.json"
        content = {"engine": engine, "model": str(model), "do": do, "threads": threads, "context": context, **request}
        asked.write_text(json.dumps(content))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        python = sys.executable
        if (
            engine == "llamacpp" and LLAMACPP_PYTHON in os.environ
        ):  # an environment of its own, given this package's path
            python = os.environ[LLAMACPP_PYTHON]
            environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run(
            [python, "-m", "cptquant.engines.worker", str(asked), str(answer)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not answer.is_file():
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise EngineError(
                f"the {engine} engine ended with code {done.returncode} on {model} "
                f"({lines[-1] if lines else 'no message'}); is the file whole? Export it again"
            )
        result: dict[str, Any] = json.loads(answer.read_text())
    if "error" in result:
        raise EngineError(result["error"])
    return result
