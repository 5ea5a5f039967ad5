"""What swaps judged on the true KL gain over the knapsack's plan, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/swaps.py [--models reference-llama] [--budgets 3bpw@sites] [--rounds 4]

TDMPQ's table, the knapsack, GPTQ on 128 x 256 calibration tokens; the search sees those tokens only. Both plans are
then quantized by `quantize_sites` and judged on validation and test text, n = windows x 255 tokens each; the difference
is paired, standard errors by document. Goes on where an earlier call stopped. Writes results/swaps.json.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from equal_bytes import MemoryWeights
from joint_formats import LISTS, Bench
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, write_results

from cptquant.allocation.choices import build_problem
from cptquant.allocation.swaps import SwapSearch
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.models.estimates import cluster_by_document, estimate_ratio
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.plan_loss import PlanLoss
from cptquant.stages.refine import QuantizedPlan, search_swaps


def carry_out(bench: Bench, plan: Plan) -> tuple[MemoryWeights, float]:
    """GPTQ, and its CPU seconds."""
    start, weights = time.process_time(), MemoryWeights()
    quantize_sites(bench.model, plan, find_quantizer("gptq"), bench.calibration, weights.keep)
    return weights, time.process_time() - start


def compare(bench: Bench, before: MemoryWeights, after: MemoryWeights) -> dict[str, Any]:
    """Paired KL of two quantized models on held-out text."""
    found: dict[str, Any] = {}
    for split, tokens in bench.texts.items():
        every = range(tokens.sequence_count)
        kl = [
            torch.from_numpy(PlanLoss(bench.model, weights, tokens).losses([{}], every)[0])
            for weights in (before, after)
        ]
        per, clusters = tokens.input_ids.shape[1] - 1, cluster_by_document(tokens.documents)
        sizes = torch.full((len(kl[0]),), per)
        for name, values in (("before", kl[0]), ("after", kl[1]), ("difference", kl[1] - kl[0])):
            estimate = estimate_ratio(values * per, sizes, clusters)
            found.setdefault(split, {})[name] = [estimate.value, estimate.stderr]
        found[split]["n"] = int(sizes.sum())
    return found


def run(bench: Bench, formats: tuple[str, ...], budget: str, search: SwapSearch, seed: int) -> dict[str, Any]:
    """One budget of one model."""
    parsed = [QuantFormat.parse(name) for name in formats]
    table = bench.table(list(LISTS["transformers"].values())[-1])
    plan = bench.plan(table, formats, budget)
    weights, gptq_seconds = carry_out(bench, plan)
    problem = build_problem(bench.model.layout, table, bench.target, parsed, plan.budget_scope)
    problem = problem.with_limit(plan.limit_bytes, plan.budget)
    start = time.process_time()
    quantized = QuantizedPlan(plan, weights, find_quantizer("gptq"), bench.calibration)

    def tell(stage: str, done: int, total: int) -> None:
        print(f"{bench.name} {budget} {stage} {done}/{total} {time.process_time() - start:.0f} CPU s", flush=True)

    refined = search_swaps(bench.model, problem, quantized, search, seed=seed, progress=tell)
    seconds = time.process_time() - start
    chosen = {name: fmt.name for name, fmt in problem.formats(refined.choice).items()}
    after = Plan.model_validate({**plan.model_dump(), "formats": chosen})  # a copy would keep the parsed formats
    other = weights if chosen == plan.formats else carry_out(bench, after)[0]
    return {
        "model": bench.name, "budget": budget, "formats": formats, "seed": seed, "search": asdict(search),
        "gptq_cpu_seconds": gptq_seconds, "search_cpu_seconds": seconds,
        "bytes": [plan.site_bytes, problem.counted_bytes(refined.choice)],
        "limit_bytes": plan.limit_bytes,
        "changed": {name: [plan.formats[name], fmt] for name, fmt in chosen.items() if fmt != plan.formats[name]},
        "rounds": [
            {"steps": r.step_count, "moves": r.move_count, "passes": r.passes, "taken": r.taken,
             "changes": 0 if r.move is None else len(r.move.changes),
             "expected": 0 if r.move is None else r.move.expected,
             "difference": r.difference, "stderr": r.stderr, "n": r.sequence_count}
            for r in refined.rounds
        ],
        **compare(bench, weights, other),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference-llama", "reference-opt", "embedded:opt-mini"])
    parser.add_argument("--target", choices=list(LISTS), default="transformers")
    parser.add_argument("--list", choices=list(LISTS["transformers"]), default="g64")
    parser.add_argument("--budgets", nargs="+", default=["2.5bpw@sites", "3bpw@sites", "3.5bpw@sites"])
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, of each of the two texts")
    parser.add_argument("--rounds", type=int, default=SwapSearch().rounds)
    parser.add_argument("--moves", type=int, default=SwapSearch().moves)
    parser.add_argument("--first", type=int, default=SwapSearch().first_sequences)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "joint_formats", help="tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = FOLDER / "swaps.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    content["machine"] = describe_machine()
    search = SwapSearch(rounds=args.rounds, moves=args.moves, first_sequences=args.first)
    for name in args.models:
        bench = Bench(name, args)
        for budget in args.budgets:
            key = {"model": name, "budget": budget, "formats": list(LISTS[args.target][args.list]), "seed": args.seed,
                   "search": asdict(search)}  # fmt: skip
            if any(all(row[field] == value for field, value in key.items()) for row in content["rows"]):
                continue
            row = run(bench, LISTS[args.target][args.list], budget, search, args.seed)
            if path.exists():  # another call may have written meanwhile
                content["rows"] = json.loads(path.read_text())["rows"]
            content["rows"].append({**row, "formats": list(row["formats"])})
            print(json.dumps(row), flush=True)
            write_results("swaps", content)


if __name__ == "__main__":
    main()
