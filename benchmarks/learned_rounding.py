"""Learned rounding against GPTQ: KL on held-out text and processor seconds, uniform widths and one mixed plan.

    OMP_NUM_THREADS=1 python benchmarks/learned_rounding.py --models reference-llama --plans int2-g64 int3-g64
    ... --plans 3bpw@sites --quantizers gptq kl-rounding

A plan is a format for all sites inside the blocks, or a budget for the knapsack on TDMPQ's table. Embedding and head
stay in 16 bits. Calibration 128 x 256 tokens, test 64 x 256 held-out tokens; standard errors are clustered by document.
Goes on where an earlier call stopped. Writes results/learned_rounding.json.
"""

import argparse
import json
import time
from typing import Any

from equal_bytes import FORMATS, TARGET, Laboratory, MemoryWeights, read_budget
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, write_results

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.evaluation.evaluate import evaluate
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites


def make_plan(laboratory: Laboratory, text: str) -> Plan:
    """A plan under a budget, or one format for all sites inside the blocks."""
    layout = laboratory.model.layout
    if "bpw" in text:
        budget, table = read_budget(laboratory.model, text), laboratory.table("tdmpq")
        return allocate(layout, table, budget, TARGET, find_allocator("knapsack"), formats=FORMATS, seed=0)
    budget, fmt = read_budget(laboratory.model, f"as {text}"), QuantFormat.parse(text)
    formats = (fmt, layout.keep_format)
    return allocate(layout, None, budget, TARGET, find_allocator("uniform"), formats=formats, seed=0)


def run(laboratory: Laboratory, text: str, name: str) -> dict[str, Any]:
    """Quantize and judge one plan."""
    plan, quantizer, weights = make_plan(laboratory, text), find_quantizer(name), MemoryWeights()
    learning: list[dict[str, Any]] = []

    def keep(index: int | None, found: Any, records: Any) -> None:
        weights.keep(index, found, records)
        learning.extend(record.learning.model_dump() for record in records if record.learning is not None)

    start = time.process_time()
    quantize_sites(laboratory.model, plan, quantizer, laboratory.calibration, keep)
    seconds = time.process_time() - start
    kl = next(
        found
        for found in evaluate(laboratory.model, {name: weights}, laboratory.test)
        if found.name == "kl_nats_per_token" and found.subject == name
    )
    return {
        "model": laboratory.name,
        "plan": text,
        "quantizer": name,
        "options": repr(quantizer),
        "bits_per_weight_sites": plan.bits_per_weight_sites,
        "kl_nats_per_token": kl.value,
        "stderr": kl.stderr,
        "n": kl.n,
        "cpu_seconds": seconds,
        "held_out_before": sum(entry["held_out_before"] for entry in learning) / max(1, len(learning)),
        "held_out_after": sum(entry["held_out_after"] for entry in learning) / max(1, len(learning)),
        "codes_changed": sum(entry["codes_changed"] for entry in learning) / max(1, len(learning)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference-llama", "reference-opt", "embedded:opt-mini"])
    parser.add_argument("--plans", nargs="+", default=["int2-g64", "int3-g64", "int4-g64", "3bpw@sites"])
    parser.add_argument("--quantizers", nargs="+", default=["gptq", "signround", "kl-rounding"])
    parser.add_argument("--windows", type=int, default=64, help="of 256 held-out tokens")
    parser.add_argument("--work", type=type(REPOSITORY), default=REPOSITORY / "build" / "learned_rounding")
    args = parser.parse_args()
    path = FOLDER / "learned_rounding.json"
    content = json.loads(path.read_text()) if path.exists() else {"cells": []}
    content["machine"] = describe_machine()
    for model in args.models:
        laboratory = Laboratory(model, args)
        for text in args.plans:
            for name in args.quantizers:
                key = (model, text, name, repr(find_quantizer(name)))
                done = [(c["model"], c["plan"], c["quantizer"], c["options"]) for c in content["cells"]]
                if key in done:
                    continue
                cell = run(laboratory, text, name)
                content["cells"].append(cell)
                write_results("learned_rounding", content)
                print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
