"""One engine in a process of its own: `python -m cptquant.engines.worker REQUEST.json RESULT.json`.

A process of its own because its peak memory is then the engine's, because some engines end the process on a damaged
file, and because two engines' thread pools disturb each other. Loads torch only for the transformers engine.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cptquant.core.errors import EngineError, MissingEngineError, UserError
from cptquant.engines.bandwidth import read_bandwidth
from cptquant.engines.registry import open_engine
from cptquant.engines.speed import measure_speed


def main(request_file: str, result_file: str) -> int:
    """Carry out one request; a UserError's message is handed back, anything else ends the process."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    answer = Path(result_file)
    try:
        result = run_request(request, answer.with_suffix(".loaded"))
    except UserError as error:
        result = {"error": str(error), "missing": isinstance(error, MissingEngineError)}
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(answer)  # an answer is whole or is none
    return 0


def run_request(request: dict[str, Any], loaded: Path) -> dict[str, Any]:
    """Load the engine's library, then the model, then do what is asked.

    Args:
        loaded: an empty file to make once the model is loaded, for those who ask what a process was doing that ended.

    Raises:
        MissingEngineError: not installed. EngineError: the file cannot be loaded, or what failed while running it.
    """
    name, threads, do, model = request["engine"], int(request["threads"]), request["do"], Path(request["model"])
    if do == "bandwidth":
        return {"bytes_per_second": read_bandwidth(threads)}
    if do == "tokenize":
        return {"ids": _tokenize(name, model, request["texts"])}
    opening = open_engine(name, threads, float_cache=bool(request.get("float_cache")))
    base_bytes = peak_bytes()
    began = time.perf_counter()
    engine = opening(model, request.get("context"))
    load_seconds = getattr(engine, "load_seconds", time.perf_counter() - began)
    loaded.touch()
    result: dict[str, Any] = {"load_seconds": load_seconds, "base_bytes": base_bytes, "version": engine.version}
    try:
        result |= _TASKS[do](engine, request)
    except UserError:
        raise
    except Exception as error:
        raise EngineError(
            f"{engine.version} loaded {model} and failed in the request {do!r}: {type(error).__name__}: {error}"
        ) from error
    result["peak_bytes"] = peak_bytes()
    return result


def _tokenize(name: str, model: Path, texts: list[str]) -> list[list[int]]:
    """By the engine's own tokenizer."""
    if name != "llamacpp":
        raise EngineError(f"the engine {name} has no tokenizer of its own")
    from cptquant.engines.llama_cpp import tokenize

    return tokenize(model, texts)


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


def _write_outputs(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Logits (hidden states, embeddings) of every sequence, float32, as one array file a sequence."""
    ids, mask = np.load(request["ids"]), np.load(request["mask"])
    folder = Path(request["outputs"])
    for index in range(len(ids)):
        if engine.task == "causal_lm":
            engine.reset()
            output = engine.extend(ids[index], every=True)
        else:
            output = engine.encode(ids[index : index + 1], mask[index : index + 1])[0]
        np.save(folder / f"{index}.npy", np.asarray(output, dtype=np.float32))
    return {}


def _generate(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The most likely continuation, token by token."""
    if engine.task != "causal_lm":
        raise EngineError(f"{request['model']} is an encoder, which continues no prompt")
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
    return {"ids": made}


def _fill(engine: Any, _request: dict[str, Any]) -> dict[str, Any]:
    """A prompt of up to 512 tokens and then the cache to its end in such pieces: the most memory a run takes."""
    if engine.task != "causal_lm":
        ids = np.ones((1, min(engine.context, 512)), np.int64)
        engine.encode(ids, np.ones_like(ids))
        return {}
    left = engine.context
    while left:
        count = min(left, 512)
        engine.extend(np.ones(count, np.int64))
        left -= count
    return {}


def _time(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    return dict(measure_speed(engine, **request["arguments"]))


_TASKS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "outputs": _write_outputs,
    "speed": _time,
    "generate": _generate,
    "fill": _fill,
}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
