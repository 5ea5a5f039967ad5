"""One engine in a process of its own: `python -m cptquant.engines.worker REQUEST.json RESULT.json`.

A process of its own because its peak memory is then the engine's, because some engines end the process on a damaged
file, and because two engines' thread pools disturb each other. Loads torch only for the transformers engine.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cptquant.core.errors import UserError
from cptquant.engines.bandwidth import read_bandwidth
from cptquant.engines.registry import open_engine
from cptquant.engines.speed import measure_speed


def main(request_file: str, result_file: str) -> int:
    """Carry out one request; a UserError's message is handed back, anything else ends the process."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    try:
        result = run_request(request)
    except UserError as error:
        result = {"error": str(error)}
    Path(result_file).write_text(json.dumps(result))
    return 0


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """Load the engine's library, then the model, then do what is asked."""
    name, threads = request["engine"], int(request["threads"])
    if request["do"] == "bandwidth":
        return {"bytes_per_second": read_bandwidth(threads)}
    opening = open_engine(name, threads)
    base_bytes = peak_bytes()
    began = time.perf_counter()
    engine = opening(Path(request["model"]), request.get("context"))
    load_seconds = time.perf_counter() - began
    result: dict[str, Any] = {"load_seconds": load_seconds, "base_bytes": base_bytes, "version": engine.version}
    task = request["do"]
    if task == "outputs":
        _write_outputs(engine, request)
    elif task == "speed":
        result |= measure_speed(engine, **request["arguments"])
    elif task == "generate":
        result["ids"] = _generate(engine, request)
    elif task == "fill":
        _fill(engine)
    result["peak_bytes"] = peak_bytes()
    return result


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    try:  # ru_maxrss of a child starts from its parent's; the kernel's own mark belongs to this program alone
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write_outputs(engine: Any, request: dict[str, Any]) -> None:
    """Logits (or hidden states) of every sequence, float32, as one array file a sequence."""
    ids, mask = np.load(request["ids"]), np.load(request["mask"])
    folder = Path(request["outputs"])
    for index in range(len(ids)):
        if engine.task == "causal_lm":
            engine.reset()
            output = engine.extend(ids[index], every=True)
        else:
            output = engine.encode(ids[index : index + 1], mask[index : index + 1])[0]
        np.save(folder / f"{index}.npy", np.asarray(output, dtype=np.float32))


def _generate(engine: Any, request: dict[str, Any]) -> list[int]:
    """The most likely continuation, token by token."""
    ids = [int(token) for token in request["ids"]]
    stop = set(request["stop"])
    made: list[int] = []
    fed = np.array(ids, np.int64)
    for _ in range(request["tokens"]):
        token = int(np.argmax(engine.extend(fed)[-1]))
        if token in stop:
            break
        made.append(token)
        fed = np.array([token], np.int64)
    return made


def _fill(engine: Any) -> None:
    """A prompt of up to 512 tokens and then the cache to its end in such pieces: the most memory a run takes."""
    if engine.task != "causal_lm":
        ids = np.ones((1, min(engine.context, 512)), np.int64)
        engine.encode(ids, np.ones_like(ids))
        return
    left = engine.context
    while left:
        count = min(left, 512)
        engine.extend(np.ones(count, np.int64))
        left -= count


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
