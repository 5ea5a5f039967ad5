"""Which way of spending the bytes is best: KL at equal bytes for every method, allocator and quantizer.

    python benchmarks/equal_bytes.py                        # all; goes on where an earlier call stopped
    python benchmarks/equal_bytes.py --models reference-opt --budgets 3bpw@sites

Damages are measured once per method and model (cptquant's defaults, but groups of 64 only). Budgets count the blocks'
linear layers, scales included; embedding and head stay in 16 bits. Beside the plain budgets stand the exact bytes of
uniform 3 and 4 bits with groups of 64, so that uniform bits are also met where they fit without a rest. k-means has a
size of its own: it is given under each budget (widths stepped down) and as the paper has it (16/8/4 bits), each next to
the knapsack at the same bytes. Held-out text; standard errors are clustered by document.
Writes results/equal_bytes.json, docs/equal_bytes.md.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from equal_bytes_table import write_table
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, SHARED, model_folder, write_results
from torch import Tensor

from cptquant.allocation.allocate import allocate
from cptquant.allocation.kmeans import LADDER, KMeans
from cptquant.allocation.methods import find_allocator
from cptquant.allocation.problem import Allocator
from cptquant.core.artifact import digest_json
from cptquant.core.budget import Budget
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteRecord
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import candidate_formats, find_target
from cptquant.core.targets.compressed_tensors import GROUPS_OF_64
from cptquant.evaluation.evaluate import evaluate
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method

MODELS = ("embedded:opt-mini", "reference-llama", "reference-opt")
BUDGETS = ("3bpw@sites", "3.5bpw@sites", "4bpw@sites", "5bpw@sites", "as int3-g64", "as int4-g64")
METHODS = ("cmpq", "pmpq", "tdmpq")
QUANTIZERS = ("rtn", "gptq")
RANDOM_SEEDS = 5
TARGET = find_target("transformers")
FORMATS = tuple(QuantFormat.parse(name) for name in GROUPS_OF_64)
EVALUATED_TOGETHER = 4
"""Models judged in one pass beside the original: bounds memory, shares the original's pass."""


@dataclass(frozen=True)
class Cell:
    """One line of the table at one budget, before it is quantized."""

    budget: str
    row: str
    seed: int
    plan: Plan


class MemoryWeights:
    """Quantized weights in memory, as a source for the stream."""

    def __init__(self) -> None:
        self._weights: dict[str, QuantizedWeight] = {}

    def keep(self, block_index: int | None, weights: dict[str, QuantizedWeight], records: list[SiteRecord]) -> None:
        """The sink of `quantize_sites`."""
        self._weights.update(weights)

    def weight(self, site_name: str) -> Tensor | None:
        """Float32 (out_features, in_features), None where the original's stays."""
        found = self._weights.get(site_name)
        return None if found is None else found.dequantize()


class Laboratory:
    """One model with its texts, its measured tables, and the cells that are finished."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.model = name, load_model(str(model_folder(name)))
        own = name.startswith("embedded:")
        general = SHARED / "data" / "text" / "general"
        self.calibration = self._tokens(None if own else general / "train.txt", "calibration", 128)
        self.test = self._tokens(None if own else general / "test.txt", "test", args.windows)
        self.folder = args.work / name.replace(":", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._finished_path = self.folder / "finished.json"
        self.finished: dict[str, dict[str, float]] = (
            json.loads(self._finished_path.read_text()) if self._finished_path.exists() else {}
        )

    def _tokens(self, source: Path | None, split: Any, sequences: int) -> TokenSet:
        return load_tokens(self.model, source, split, sequences=sequences, length=256, seed=0)

    def table(self, method: str) -> SensitivityTable:
        """Measured once; read again while model, text, formats and hyper-parameters are the same."""
        layout = self.model.layout
        candidates = {site.name: candidate_formats(site, layout, TARGET, FORMATS) for site in layout.sites}
        inputs = {
            "layout": layout.digest(),
            "tokens": self.calibration.digest,
            "method": repr(find_method(method)),
            "formats": ",".join(GROUPS_OF_64),
        }
        path = self.folder / f"sensitivity-{method}.json"
        if path.exists() and (found := SensitivityTable.load(path)).inputs == inputs:
            return found
        print(f"{self.name}: measuring {method}", flush=True)
        made = measure_sensitivity(self.model, self.calibration, candidates, find_method(method))
        made = made.model_copy(update={"inputs": inputs})
        made.save(path)
        return made

    def key(self, plan: Plan, quantizer: str) -> str:
        """Equal plans share a result, whoever made them."""
        parts = [plan.formats, repr(find_quantizer(quantizer)), self.calibration.digest, self.test.digest]
        return digest_json([*parts, self.model.layout.digest()])

    def finish(self, wanted: dict[str, tuple[Plan, str]]) -> None:
        """Quantize and evaluate what is not finished yet, a few at a time; each batch is saved."""
        missing = [(key, *rest) for key, rest in wanted.items() if key not in self.finished]
        for start in range(0, len(missing), EVALUATED_TOGETHER):
            sources: dict[str, MemoryWeights] = {}
            for key, plan, quantizer in missing[start : start + EVALUATED_TOGETHER]:
                sources[key] = MemoryWeights()
                quantize_sites(self.model, plan, find_quantizer(quantizer), self.calibration, sources[key].keep)
            for measurement in evaluate(self.model, sources, self.test):
                if measurement.name == "kl_nats_per_token":
                    self.finished[measurement.subject] = {
                        "kl_nats_per_token": measurement.value,
                        "stderr": measurement.stderr or 0.0,
                        "n": measurement.n,
                    }
            self._finished_path.write_text(json.dumps(self.finished))
            print(f"{self.name}: {min(start + EVALUATED_TOGETHER, len(missing))} of {len(missing)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--windows", type=int, default=64, help="of 256 held-out tokens")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "equal_bytes", help="tables and cells")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = FOLDER / "equal_bytes.json"
    content = json.loads(path.read_text()) if path.exists() else {"models": {}}
    content["machine"] = describe_machine()
    for name in args.models:
        content["models"][name] = run_model(Laboratory(name, args), args)
        write_results("equal_bytes", content)
        write_table(content, REPOSITORY / "docs" / "equal_bytes.md")


def run_model(laboratory: Laboratory, args: argparse.Namespace) -> dict[str, Any]:
    """All budgets of one model."""
    cells = [cell for budget in args.budgets for cell in list_cells(laboratory, budget)]
    cells += list(paper_cells(laboratory))
    wanted = {
        laboratory.key(cell.plan, quantizer): (cell.plan, quantizer) for cell in cells for quantizer in args.quantizers
    }
    laboratory.finish(wanted)
    return {
        "calibration": laboratory.calibration.description,
        "test": laboratory.test.description,
        "test_digest": laboratory.test.digest,
        "quantizers": {name: repr(find_quantizer(name)) for name in args.quantizers},
        "methods": {name: laboratory.table(name).inputs["method"] for name in (*METHODS, "ablation")},
        "cells": [
            {
                "budget": cell.budget,
                "row": cell.row,
                "seed": cell.seed,
                "quantizer": quantizer,
                "bits_per_weight_sites": cell.plan.bits_per_weight_sites,
                "site_bytes": cell.plan.site_bytes,
                "plan": hashlib.sha256(json.dumps(cell.plan.formats, sort_keys=True).encode()).hexdigest()[:12],
                **laboratory.finished[laboratory.key(cell.plan, quantizer)],
            }
            for cell in cells
            for quantizer in args.quantizers
        ],
    }


def list_cells(laboratory: Laboratory, text: str) -> Iterator[Cell]:
    """The lines of the table at one budget; k-means only under the plain budgets."""
    budget = read_budget(laboratory.model, text)
    yield from _cell(laboratory, text, "uniform", None, budget, find_allocator("uniform"))
    for seed in range(RANDOM_SEEDS):
        yield from _cell(laboratory, text, "random", None, budget, find_allocator("random"), seed)
    for method in (*METHODS, "ablation"):
        table = laboratory.table(method)
        yield from _cell(laboratory, text, f"{method} knapsack", table, budget, find_allocator("knapsack"))
        if text.startswith("as ") or method == "ablation":
            continue
        for cell in _cell(laboratory, text, f"{method} kmeans", table, budget, find_allocator("kmeans")):
            yield cell
            same = site_budget(cell.plan.site_bytes)
            row = f"{method} knapsack at the bytes of kmeans"
            yield from _cell(laboratory, text, row, table, same, find_allocator("knapsack"))


def paper_cells(laboratory: Laboratory) -> Iterator[Cell]:
    """The paper's 16/8/4 bits by k-means, whatever they take, and the knapsack at those bytes."""
    for method in METHODS:
        table = laboratory.table(method)
        paper = KMeans(ladder=LADDER[:1])
        for cell in _cell(laboratory, "16/8/4", f"{method} kmeans", table, Budget.parse("16bpw@sites"), paper):
            yield cell
            same = site_budget(cell.plan.site_bytes)
            row = f"{method} knapsack at the bytes of kmeans"
            yield from _cell(laboratory, "16/8/4", row, table, same, find_allocator("knapsack"))


def _cell(
    laboratory: Laboratory, text: str, row: str, table: SensitivityTable | None, budget: Budget, allocator: Allocator,
    seed: int = 0,
) -> Iterator[Cell]:  # fmt: skip
    """One cell, or none (said) where the allocator cannot meet the budget."""
    try:
        plan = allocate(laboratory.model.layout, table, budget, TARGET, allocator, formats=FORMATS, seed=seed)
    except BudgetError as error:
        print(f"{laboratory.name}, {text}, {row}: {error}", flush=True)
        return
    yield Cell(text, row, seed, plan)


def read_budget(model: LoadedModel, text: str) -> Budget:
    """`3bpw@sites`, or `as FORMAT`: the bytes of that format at every site inside the blocks."""
    if not text.startswith("as "):
        return Budget.parse(text)
    fmt = QuantFormat.parse(text.removeprefix("as "))
    layout = model.layout
    return site_budget(layout.block_site_bytes({site.name: fmt for site in layout.block_sites}))


def site_budget(size_bytes: int) -> Budget:
    """Exact bytes for the blocks' linear sites."""
    return Budget(size_bytes, "bytes", "sites", f"{size_bytes} bytes (sites)")


if __name__ == "__main__":
    main()
