"""The whole chain at real size on random weights: time stage by stage, and peak memory.

    python benchmarks/rehearsal.py opt-125m
    python benchmarks/rehearsal.py qwen3-0.6b

The model has the shape of the original and random bf16 weights: time and memory are those of the real model, quality is
meaningless. The tokenizer is that of embedded:opt-mini, whose 2,048 tokens fit into either vocabulary. Budgets count
the blocks' linear layers: the embedding, which compressed-tensors holds in no fewer than 8 bits, is so much of OPT-125M
that 4 bits per weight of the whole file are out of reach.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from results_file import write_results

GIGABYTE = 10**9
EXTRA_BYTES_ALLOWED = 3 * GIGABYTE // 2


@dataclass(frozen=True)
class Shape:
    """A real model's shape and the time the chain may take on two cores."""

    config: dict[str, Any]
    limit_minutes: float


SHAPES = {
    "opt-125m": Shape(
        dict(
            model_type="opt", num_hidden_layers=12, hidden_size=768, ffn_dim=3072, num_attention_heads=12,
            word_embed_proj_dim=768, vocab_size=50272, max_position_embeddings=2048, tie_word_embeddings=True,
            do_layer_norm_before=True, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        ),
        limit_minutes=8,
    ),
    "qwen3-0.6b": Shape(
        dict(
            model_type="qwen3", num_hidden_layers=28, hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        ),
        limit_minutes=40,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--budget", default="4bpw@sites")
    parser.add_argument("--sensitivity", default=None, help="cptquant's default if absent")
    parser.add_argument("--threads", type=int, default=None, help="OMP_NUM_THREADS; the library's choice if absent")
    parser.add_argument("--work", type=Path, help="folder for model and run, kept; a temporary one if absent")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix=f"rehearsal-{args.shape}-"))
    try:
        content = rehearse(args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    name = args.shape + (f"_{args.sensitivity}" if args.sensitivity else "")
    write_results(f"rehearsal_{name}", content)
    print_report(content)
    if content["return_code"]:
        raise SystemExit(content["return_code"])


def rehearse(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build, run, and read the seconds of each stage from what the run left."""
    shape = SHAPES[args.shape]
    model = work / "model"
    if not (model / "config.json").exists():
        run_measured([sys.executable, __file__.replace("rehearsal.py", "random_model.py"), model,
                      json.dumps(shape.config)], make_folder(work) / "build.log")  # fmt: skip
    model_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not model_bytes:
        raise SystemExit((work / "build.log").read_text())
    options = ["--sensitivity", args.sensitivity] if args.sensitivity else []
    command = [
        CPTQUANT, "quantize", model, "--budget", args.budget, "--output", work / "run", *options
    ]  # fmt: skip
    environment = {"HF_HUB_OFFLINE": "1"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    machine = describe_machine()
    measured = run_measured(command, work / "quantize.log", environment=environment)
    stages = stage_seconds(work / "run")
    counted = sum(stage["wall_seconds"] for stage in stages)
    return {
        "shape": args.shape,
        "config": shape.config,
        "budget": args.budget,
        "sensitivity": args.sensitivity or "default",
        "machine": machine | {"load_average_1_5_15_at_the_end": [round(load, 2) for load in os.getloadavg()]},
        "model_bytes": model_bytes,
        **measured.figures(),
        "stages": stages,
        "outside_stages_wall_seconds": measured.wall_seconds - counted,
        "limits": {
            "wall_seconds": 60 * shape.limit_minutes,
            "peak_memory_bytes": model_bytes + EXTRA_BYTES_ALLOWED,
        },
        "output_tail": measured.output[-2000:].splitlines() if measured.return_code else [],
    }


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def stage_seconds(run: Path) -> list[dict[str, Any]]:
    """Seconds and peak memory so far from the provenance of every artifact, in the order they were made."""
    found = []
    for path in sorted(run.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        provenance = json.loads(path.read_text()).get("provenance") or {}
        if provenance.get("wall_seconds") is None or path.name == "sensitivity.json":  # a copy of sensitivity-METHOD
            continue
        found.append(
            {
                "file": path.name,
                "wall_seconds": provenance["wall_seconds"],
                "cpu_seconds": provenance["cpu_seconds"],
                "peak_memory_bytes_so_far": provenance["peak_memory_bytes"],
            }
        )
    return found


def print_report(content: dict[str, Any]) -> None:
    """For people."""
    for line in content["output_tail"]:
        print(line)
    print(f"{content['shape']}: {content['model_bytes'] / GIGABYTE:.3f} GB of weights, return code "
          f"{content['return_code']}")  # fmt: skip
    for stage in content["stages"]:
        print(f"  {stage['file']:32} {stage['wall_seconds']:8.1f} s wall {stage['cpu_seconds']:8.1f} s CPU  "
              f"peak so far {stage['peak_memory_bytes_so_far'] / GIGABYTE:.2f} GB")  # fmt: skip
    print(f"  {'guard, checkpoint reading, rest':32} {content['outside_stages_wall_seconds']:8.1f} s wall")
    limits = content["limits"]
    print(f"  in all {content['wall_seconds']:.0f} s of {limits['wall_seconds']:.0f} allowed, "
          f"{content['cpu_seconds']:.0f} s CPU; peak {content['peak_memory_bytes'] / GIGABYTE:.2f} GB = model + "
          f"{(content['peak_memory_bytes'] - content['model_bytes']) / GIGABYTE:.2f} GB (1.50 allowed)")  # fmt: skip


if __name__ == "__main__":
    main()
