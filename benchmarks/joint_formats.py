"""Do more group sizes, and asymmetric codes, help the knapsack? KL at equal bytes for several lists of formats.

    OMP_NUM_THREADS=1 python benchmarks/joint_formats.py
    ... --target onnx --models reference-llama reference-opt
    ... --target "onnx, halves"
    ... --target "onnx, columns" --budgets 2.5bpw@sites 3bpw@sites 3.5bpw@sites     (and "torch, columns")
    ... --target "onnx, low rank" --budgets 2.5bpw@sites 3bpw@sites 3.5bpw@sites     (and "torch, low rank")

TDMPQ scores the longest list once (its CPU seconds, and those of the first list alone, are in the results); the
knapsack chooses from each list under the same budget; GPTQ carries the plans out. Budgets count the blocks' linear
layers, scales and zero points included. Validation text (on which the default list was chosen) and test text apart,
n = windows x 255 tokens each, standard errors by document. Goes on where an earlier call stopped.
Writes results/joint_formats.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from equal_bytes import MemoryWeights
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, SHARED, model_folder, write_results

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.artifact import digest_json
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import candidate_formats, find_target
from cptquant.evaluation.evaluate import evaluate
from cptquant.models.load import load_model
from cptquant.models.text import load_tokens
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method


def _names(widths: tuple[int, ...], *granularities: str) -> tuple[str, ...]:
    return tuple(f"int{bits}-{granularity}" for bits in widths for granularity in granularities)


def _corrected(*names: str) -> tuple[str, ...]:
    """Each with 1, 2 and 4 % of its columns corrected."""
    return tuple(f"{name}-c{percent}" for name in names for percent in (1, 2, 4))


def _low_rank(*names: str) -> tuple[str, ...]:
    """Each with products of rank 1, 2 and 4."""
    return tuple(f"{name}-r{rank}" for name in names for rank in (1, 2, 4))


_WIDE, _KERNELS = (2, 3, 4, 5, 6, 8), (2, 4, 8)
_ONNX_COLUMNS = _corrected("int2-g64", "int4-g64")
_ONNX_LOW_RANK = _low_rank("int2-g64", "int4-g64")
LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers": {
        "g64": _names(_WIDE, "g64"),
        "g64, g128": _names(_WIDE, "g64", "g128"),
        "g32, g64, g128": _names(_WIDE, "g32", "g64", "g128"),
        "g32, g64, g128, channel": _names(_WIDE, "g32", "g64", "g128", "channel"),
    },
    "onnx": {
        "g64": _names(_KERNELS, "g64"),
        "g32, g64, g128": _names(_KERNELS, "g32", "g64", "g128"),
        "g32, g64, g128, both asym too": _names(
            _KERNELS, *[group + zeros for group in ("g32", "g64", "g128") for zeros in ("", "-asym")]
        ),
    },
    "onnx, halves": {
        "g64": _names(_KERNELS, "g64"),
        "g64, halves": (*_names(_KERNELS, "g64"), "slim3-g64-halves"),
        "g64, sorted": (*_names(_KERNELS, "g64"), "slim3-g64-sorted-halves"),
        "g64, halves, sorted": (*_names(_KERNELS, "g64"), "slim3-g64-halves", "slim3-g64-sorted-halves"),
    },
    "onnx, columns": {
        "g64": _names(_KERNELS, "g64"),
        "g64, columns": (*_names(_KERNELS, "g64"), *_ONNX_COLUMNS),
        "g64, halves": (*_names(_KERNELS, "g64"), "slim3-g64-halves"),
        "g64, halves, columns": (*_names(_KERNELS, "g64"), "slim3-g64-halves", *_ONNX_COLUMNS),
    },
    "onnx, low rank": {
        "g64": _names(_KERNELS, "g64"),
        "g64, halves, sorted": (*_names(_KERNELS, "g64"), "slim3-g64-halves", "slim3-g64-sorted-halves"),
        "g64, columns": (*_names(_KERNELS, "g64"), *_ONNX_COLUMNS),
        "g64, low rank": (*_names(_KERNELS, "g64"), *_ONNX_LOW_RANK),
        "g64, columns, low rank": (*_names(_KERNELS, "g64"), *_ONNX_COLUMNS, *_ONNX_LOW_RANK),
        "g64, halves, sorted, low rank": (
            *_names(_KERNELS, "g64"),
            "slim3-g64-halves",
            "slim3-g64-sorted-halves",
            *_ONNX_LOW_RANK,
        ),
        "all": (
            *_names(_KERNELS, "g64"),
            "slim3-g64-halves",
            "slim3-g64-sorted-halves",
            *_ONNX_COLUMNS,
            *_ONNX_LOW_RANK,
        ),
    },
    "torch, low rank": {
        "g64, g128": _names(_WIDE, "g64", "g128"),
        "g64, g128, low rank": (*_names(_WIDE, "g64", "g128"), *_low_rank(*_names((2, 3, 4), "g64", "g128"))),
    },
    "torch, columns": {
        "g64, g128": _names(_WIDE, "g64", "g128"),
        "g64, g128, columns": (
            *_names(_WIDE, "g64", "g128"),
            *_corrected(*_names((2, 3, 4), "g64")),
            *(f"int{bits}-g128-c2" for bits in (2, 3, 4)),
        ),
    },
}
"""By target; what follows a comma only tells two of one target apart."""


class Bench:
    """One model under one target."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.model, self.target = (
            name,
            load_model(str(model_folder(name))),
            find_target(args.target.split(",")[0]),
        )
        own = name.startswith("embedded:")
        general = SHARED / "data" / "text" / "general"

        def tokens(file: str, split: Any, sequences: int) -> Any:
            source = None if own else general / file
            return load_tokens(self.model, source, split, sequences=sequences, length=256, seed=0)

        self.calibration = tokens("train.txt", "calibration", 128)
        self.texts = {split: tokens("test.txt", split, args.windows) for split in ("validation", "test")}
        self.folder: Path = args.work / f"{name.replace(':', '-')}-{args.target.replace(', ', '-')}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def table(self, formats: tuple[str, ...]) -> SensitivityTable:
        """TDMPQ on a list of formats; read again where it stands."""
        path = self.folder / f"sensitivity-{digest_json(list(formats))[:8]}.json"
        if path.exists():
            return SensitivityTable.load(path)
        parsed, layout = [QuantFormat.parse(name) for name in formats], self.model.layout
        candidates = {site.name: candidate_formats(site, layout, self.target, parsed) for site in layout.block_sites}
        candidates |= {site.name: (layout.keep_format,) for site in layout.sites if site.name not in candidates}
        start = time.process_time()
        made = measure_sensitivity(self.model, self.calibration, candidates, find_method("tdmpq"))
        seconds = time.process_time() - start
        made = made.model_copy(update={"metadata": {**made.metadata, "cpu_seconds": seconds}})
        made.save(path)
        return made

    def plan(self, table: SensitivityTable, formats: tuple[str, ...], budget: str) -> Plan:
        """The knapsack's."""
        parsed = [QuantFormat.parse(name) for name in formats]
        allocator = find_allocator("knapsack")
        return allocate(self.model.layout, table, Budget.parse(budget), self.target, allocator, formats=parsed)

    def judge(self, plans: dict[str, Plan]) -> dict[str, dict[str, Any]]:
        """Quantize by GPTQ and measure; equal plans once. Finished budgets are read again."""
        path = self.folder / f"judged-{digest_json({name: plan.formats for name, plan in plans.items()})[:12]}.json"
        if path.exists():
            return json.loads(path.read_text())
        sources: dict[str, MemoryWeights] = {}
        seconds: dict[str, float] = {}
        for plan in plans.values():
            key = digest_json(plan.formats)
            if key not in sources:
                start, sources[key] = time.process_time(), MemoryWeights()
                quantize_sites(self.model, plan, find_quantizer("gptq"), self.calibration, sources[key].keep)
                seconds[key] = time.process_time() - start
        found: dict[str, dict[str, Any]] = {name: {"quantize_cpu_seconds": seconds[digest_json(plan.formats)]}
                                            for name, plan in plans.items()}  # fmt: skip
        for split, tokens in self.texts.items():
            for measurement in evaluate(self.model, sources, tokens):
                if measurement.name == "kl_nats_per_token":
                    for name, plan in plans.items():
                        if digest_json(plan.formats) == measurement.subject:
                            found[name][split] = [measurement.value, measurement.stderr, measurement.n]
        path.write_text(json.dumps(found))
        return found


def run(bench: Bench, every: dict[str, tuple[str, ...]], wanted: list[str], budgets: list[str]) -> dict[str, Any]:
    """All budgets of one model, for the wanted lists."""
    first, last = next(iter(every.values())), list(every.values())[-1]
    lists = {name: formats for name, formats in every.items() if name in wanted}
    table = bench.table(last)
    cost = {"first list": bench.table(first).metadata["cpu_seconds"], "last list": table.metadata["cpu_seconds"]}
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        plans = {name: bench.plan(table, formats, budget) for name, formats in lists.items()}
        for name, found in bench.judge(plans).items():
            plan = plans[name]
            used = sorted({plan.formats[site.name] for site in bench.model.layout.block_sites})
            rows.append(
                {
                    "budget": budget, "list": name, "site_bytes": plan.site_bytes,
                    "bits_per_weight_sites": plan.bits_per_weight_sites,
                    "predicted_damage": plan.predicted_damage, "status": plan.status, "used": used, **found,
                }
            )  # fmt: skip
            print(bench.name, json.dumps(rows[-1]), flush=True)
    return {"measure_cpu_seconds": cost, "format_count": [len(first), len(last)], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference-llama", "reference-opt", "embedded:opt-mini"])
    parser.add_argument("--target", choices=list(LISTS), default="transformers")
    parser.add_argument("--lists", nargs="+", help="names in LISTS; all of the target")
    parser.add_argument("--budgets", nargs="+", default=["2.5bpw@sites", "3bpw@sites", "3.5bpw@sites", "4bpw@sites"])
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, of each of the two texts")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "joint_formats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = FOLDER / "joint_formats.json"
    content = json.loads(path.read_text()) if path.exists() else {"targets": {}}
    content["machine"] = describe_machine()
    for name in args.models:
        lists = LISTS[args.target]
        found = run(Bench(name, args), lists, args.lists or list(lists), args.budgets)
        if path.exists():  # another call may have written meanwhile
            content["targets"] = json.loads(path.read_text())["targets"]
        before = content["targets"].setdefault(args.target, {}).get(name, {"rows": []})["rows"]
        keys = {(row["budget"], row["list"]) for row in found["rows"]}
        found["rows"] = [row for row in before if (row["budget"], row["list"]) not in keys] + found["rows"]
        content["targets"][args.target][name] = found
        write_results("joint_formats", content)


if __name__ == "__main__":
    main()
