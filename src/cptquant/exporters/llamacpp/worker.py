"""Runs inside an interpreter that has llama-cpp-python; knows nothing of cptquant.

    python worker.py < request.json > reply.json

Request: {"model": FILE, "threads": N, "task": "tokenize" | "logits" | "embed", ...}. tokenize takes "texts" and
"special"; logits and embed take "sequences" (lists of ids) and "output" (a .npy file to write: float32 (sequences, T,
vocabulary) or (sequences, width)). The reply has the version, seconds to load and to run, and peak resident bytes.
"""

import json
import resource
import sys
import time

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    started = time.perf_counter()
    longest = max((len(ids) for ids in request.get("sequences", [[0] * 32])), default=32)
    embed = request["task"] == "embed"
    _keep_plain_layouts()
    model = llama_cpp.Llama(
        model_path=request["model"],
        n_ctx=max(32, longest),
        n_batch=max(32, longest),
        n_ubatch=max(32, longest),
        n_threads=request.get("threads", 1),
        n_threads_batch=request.get("threads", 1),
        n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32,  # what the cache rounds is not the question here
        type_v=llama_cpp.GGML_TYPE_F32,
        logits_all=not embed,
        embedding=embed,
        verbose=False,
        vocab_only=request["task"] == "tokenize",
    )
    loaded = time.perf_counter()
    reply = {"version": llama_cpp.__version__, "load_seconds": loaded - started}
    if request["task"] == "tokenize":
        special = request.get("special", True)
        reply["ids"] = [model.tokenize(text.encode(), add_bos=special, special=False) for text in request["texts"]]
    elif embed:
        rows = [_embed(model, ids) for ids in request["sequences"]]
        np.save(request["output"], np.stack(rows).astype(np.float32))
    else:
        rows = []
        for ids in request["sequences"]:
            model.reset()
            model.eval(ids)
            rows.append(np.array(model.scores[: len(ids)], dtype=np.float32))
        np.save(request["output"], np.stack(rows))
    reply["run_seconds"] = time.perf_counter() - loaded
    reply["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    json.dump(reply, sys.stdout)


def _keep_plain_layouts() -> None:
    """Weights as they stand in the file: the repacked layouts (AMX) of some builds crash on some machines."""
    defaults = llama_cpp.llama_model_default_params

    def plain() -> object:
        parameters = defaults()
        if hasattr(parameters, "use_extra_bufts"):
            parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = plain
    llama_cpp.llama.llama_cpp.llama_model_default_params = plain


def _embed(model: "llama_cpp.Llama", ids: list[int]) -> np.ndarray:
    """Mean-pooled embedding of one sequence, as the file's pooling type says."""
    model._batch.reset()
    model._batch.add_sequence(ids, 0, True)
    model._ctx.kv_cache_clear()
    model._ctx.decode(model._batch)
    found = llama_cpp.llama_get_embeddings_seq(model._ctx.ctx, 0)
    return np.array(found[: model.n_embd()], dtype=np.float32)


if __name__ == "__main__":
    main()
