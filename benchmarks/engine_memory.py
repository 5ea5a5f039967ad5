"""Peak memory of an engine with its cache filled, beside what `--memory` and `export` predict for it.

    python benchmarks/engine_memory.py [--engines gguf,onnx] [--shapes opt-125m,...]

Models of known shapes with random weights and a vocabulary of full size (llama.cpp keeps tokens and merges in memory)
are rounded to random mixed plans and written for each engine, which then runs in a process of its own until its cache
is full. Peak: the kernel's high-water mark of that process's resident set, so Python, numpy, the engine's library and
the touched pages of mapped files are in it. The constants of `core/memory.py` were fitted on the cases under `FIT`; the
others only check them. The aim is a prediction within 10 % of the peak.

llama.cpp runs in the interpreter of CPTQUANT_LLAMACPP_PYTHON where that is set.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine
from results_file import model_folder, write_results

from cptquant.core.artifact import Artifact
from cptquant.core.engine_memory import predict_memory
from cptquant.core.layout import ModelLayout
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.models.load import load_model
from cptquant.stages.synthetic import write_for_target

SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
    },
    "llama-0.3b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 2048,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "llama-wide": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "neox-160m": {
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
    },
}  # fmt: skip
BUDGETS = {"opt-125m": ("4.2bpw", "11bpw")}
"""The second plan of a shape keeps some matrices in 16 bits."""
CONTEXTS = (512, 2048)
FIT = ("opt-125m", "llama-0.3b")
AIM = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="gguf,onnx")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--work", type=Path, help="folder for layouts and plans of the cases, kept")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as work:
            rows += measure_shape(shape, args.engines.split(","), Path(work), args.work)
    checked = [row for row in rows if row["use"] == "check"]
    write_results("engine_memory", {
        "machine": describe_machine(), "aim": f"prediction within {AIM:.0%} of the peak", "fitted_on": FIT,
        "n": len(rows), "n_checked": len(checked),
        "largest_deviation_fitted": _largest([row for row in rows if row["use"] == "fit"]),
        "largest_deviation_checked": _largest(checked), "rows": rows,
    })  # fmt: skip


def _largest(rows: list[dict[str, Any]]) -> float | None:
    return max((abs(row["predicted_by_measured"] - 1) for row in rows), default=None)


def measure_shape(shape: str, targets: list[str], work: Path, keep: Path | None) -> list[dict[str, Any]]:
    """Every target, plan and context of one shape."""
    folder = work / "model"
    script = Path(__file__).with_name("random_model.py")
    subprocess.run([sys.executable, script, folder, json.dumps(SHAPES[shape])], check=True)
    _enlarge_vocabulary(folder, SHAPES[shape]["vocab_size"])
    model = load_model(folder)
    rows: list[dict[str, Any]] = []
    for target in targets:
        for budget in BUDGETS.get(shape, ("4.2bpw",)):
            file, plan = write_for_target(model, target, budget, work / target / budget)
            if keep is not None:
                _keep(keep / f"{shape}-{target}-{budget}", model.layout, plan)
            for context in CONTEXTS:
                answer = run_engine(TARGET_ENGINES[target], file, "fill", threads=1, context=context)
                predicted = predict_memory(model.layout, target, plan.quant_formats, context)
                peak = int(answer["peak_bytes"])
                row = {
                    "use": "fit" if shape in FIT else "check", "target": target, "engine": answer["version"],
                    "shape": shape, "budget": budget, "context": context,
                    "file_bytes": sum(path.stat().st_size for path in file.parent.glob("model*")),
                    "library_bytes": int(answer["base_bytes"]), "predicted_bytes": predicted.predicted_bytes,
                    "measured_bytes": peak, "predicted_by_measured": round(predicted.predicted_bytes / peak, 4),
                }  # fmt: skip
                print({name: row[name] for name in row if name not in ("engine",)}, flush=True)
                rows.append(row)
    return rows


def _keep(folder: Path, *artifacts: Artifact) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for artifact in artifacts:
        artifact.save(folder / ("layout.json" if isinstance(artifact, ModelLayout) else "plan.json"))


def _enlarge_vocabulary(folder: Path, size: int) -> None:
    """Random merges on top of the embedded tokenizer's, so that there are as many tokens as rows."""
    path = folder / "tokenizer.json"
    content = json.loads((model_folder("embedded:opt-mini") / path.name).read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    tokens = [token for token in vocabulary if not token.startswith("<")]
    generator = random.Random(0)
    while len(vocabulary) < size:
        pair = generator.choice(tokens), generator.choice(tokens)
        joined = "".join(pair)
        if len(joined) <= 12 and joined not in vocabulary:
            vocabulary[joined] = len(vocabulary)
            tokens.append(joined)
            merges.append(list(pair))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
