"""What a sensitivity score costs in the end: KL of the plan made with it, less KL of the plan made with the oracle.

    python benchmarks/sensitivity_regret.py                                  # goes on where an earlier call stopped
    python benchmarks/sensitivity_regret.py --models embedded:opt-mini --split validation --quantizers rtn

Every score measures the same candidates (`intN-g64` at the widths of sensitivity_agreement.py) on calibration text, the
oracle's table is measured on held-out text of its own. The knapsack turns each table into a plan of no more bytes
(linear layers of the blocks, scales included), which is rounded to nearest or by GPTQ and judged on text that neither
has seen. The regret of a plan is a mean of paired differences, its standard error clustered by document. Plans that
coincide are judged once. "sketch, pairs" starts from the knapsack's plan and exchanges formats of one or two sites as
long as the sketches' estimate of the whole plan, interactions included, falls.

CPU seconds are the process's, with one thread; GPTQ's are those of one pass of uniform 4 bits over the same text.
Writes "regret" into results/sensitivity_agreement.json and its table into docs/sensitivity.md.
"""

import argparse
import json
import math
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from equal_bytes import MemoryWeights
from machine import describe_machine
from pair_swaps import improve_plan
from results_file import write_results
from sensitivity_agreement import (
    BITS,
    METHODS,
    ORACLE,
    PAGE,
    RESULTS,
    Subject,
    find_subjects,
    measure_once,
    table_path,
)

from cptquant.allocation.allocate import allocate
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.methods import find_allocator
from cptquant.core.artifact import digest_json, write_whole
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.core.progress import ignore_progress
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet, load_tokens
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.estimates import estimate_ratio
from cptquant.sensitivity.loss import Objective, SequenceTotals, pose_question
from cptquant.sensitivity.sketch import Sketch, Sketches

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "sensitivity_regret"
MODELS = ("embedded:opt-mini", "reference-llama", "reference-opt")
BUDGETS = ("2.5bpw@sites", "3bpw@sites", "4bpw@sites")
TARGET = find_target("transformers")
FORMATS = tuple(QuantFormat.parse(f"int{bits}-g64") for bits in BITS)
SCORES = ("TDMPQ", "path", "path, curvature along 3 bits", "sketch", "TDMPQ, first order", "CMPQ", "PMPQ")
PAIRS = {
    "sketch, pairs": ("sketch", False),
    "TDMPQ, pairs of the sketches": ("TDMPQ", False),
    "sketch, shrunk pairs": ("sketch", True),
    "path, shrunk pairs": ("path", True),
}
"""Rows whose plans are improved with the sketches' interactions: the score of single options they start from, and
whether interactions are shrunk to what halves of the text agree on."""
MARKS = ("<!-- begin benchmarks/sensitivity_regret.py -->", "<!-- end benchmarks/sensitivity_regret.py -->")


class Ruler:
    """KL(original ‖ changed) per sequence, on text of its own."""

    def __init__(self, model: LoadedModel, tokens: TokenSet) -> None:
        self._model, self._question = model, pose_question(model, tokens)
        self._original = self._run(None)
        self._objective = Objective(self._original, self._question)
        self.counts = self._divergences(self._original).counts

    def _run(self, weights: MemoryWeights | None) -> ModelStream:
        stream = ModelStream(self._model, self._question.tokens, weights=weights)
        for _ in range(stream.layout.block_count):
            stream.advance(stream.load_block())
        return stream

    def measure(self, weights: MemoryWeights) -> list[float]:
        """Summed KL of each sequence."""
        stream = self._run(weights)
        return self._divergences(stream).sums.tolist()

    def _divergences(self, stream: ModelStream) -> SequenceTotals:
        return self._objective.divergences(stream.hidden, self._original.hidden, changed=stream)

    def estimate(self, sums: list[float]) -> tuple[float, float]:
        """Mean and standard error per token."""
        values = torch.tensor(sums, dtype=torch.float64)
        found = estimate_ratio(values, self.counts, self._question.tokens.documents)
        return found.value, found.stderr or 0.0


class Laboratory:
    """One model with its texts, its tables, and what is finished."""

    def __init__(self, subject: Subject, split: str, windows: int) -> None:
        self.subject, self.model = subject, load_model(subject.source)
        self.calibration = self._tokens(subject.calibration, "calibration", 128)
        names = {"validation": "valid.txt", "test": "test.txt"}
        text = subject.validation and str(Path(subject.validation).with_name(names[split]))
        self.held_out = self._tokens(text, split, windows)
        self.ruler = Ruler(self.model, self.held_out)
        layout = self.model.layout
        self.candidates = {site.name: candidate_formats(site, layout, TARGET, FORMATS) for site in layout.sites}
        self._path = WORK / f"{subject.label.replace(':', '-')}-{split}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.finished: dict[str, list[float]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def _tokens(self, source: str | None, split: Any, sequences: int) -> TokenSet:
        return load_tokens(self.model, source, split, sequences=sequences, length=256, seed=0)

    def tables(self) -> dict[str, SensitivityTable]:
        """The oracle's, on validation text, and every score's, on calibration text."""
        validation = self._tokens(self.subject.validation, "validation", 128)
        texts = {ORACLE: validation, **dict.fromkeys(SCORES, self.calibration)}
        methods = {ORACLE: Ablation(sequences=16, examples=128), **{name: METHODS[name] for name in SCORES}}
        return {
            name: measure_once(table_path(self.subject, name), self.model, texts[name], self.candidates, method)
            for name, method in methods.items()
        }

    @cached_property
    def sketches(self) -> Sketches:
        """The sketches themselves; not kept between runs."""
        return Sketch().measure(self.model, self.calibration, self.candidates, ignore_progress)

    def judge(self, plan: Plan, quantizer: str) -> list[float]:
        """Summed KL of each held-out sequence under the plan."""
        key = digest_json(
            [plan.formats, repr(find_quantizer(quantizer)), self.calibration.digest, self.held_out.digest]
        )
        if key not in self.finished:
            weights = MemoryWeights()
            quantize_sites(self.model, plan, find_quantizer(quantizer), self.calibration, weights.keep)
            self.finished[key] = self.ruler.measure(weights)
            write_whole(self._path, json.dumps(self.finished).encode())
        return self.finished[key]

    def plans(self, tables: Mapping[str, SensitivityTable], budget: Budget, rows: Collection[str]) -> dict[str, Plan]:
        """Row -> plan at one budget."""
        layout = self.model.layout
        plans = {
            name: allocate(layout, table, budget, TARGET, Knapsack(), formats=FORMATS) for name, table in tables.items()
        }
        for row, (start, shrunk) in PAIRS.items():
            if row not in rows:
                continue
            limit = budget.limit_bytes(layout)
            formats, _ = improve_plan(
                layout, TARGET, plans[start].formats, tables[start], self.sketches, limit, shrunk=shrunk
            )
            plans[row] = plans[start].model_copy(update={"formats": formats})
        return {row: plan for row, plan in plans.items() if row in rows}

    def gptq_seconds(self) -> float:
        """CPU seconds of one GPTQ pass, uniform 4 bits, over the calibration text."""
        budget = Budget.parse("4.25bpw@sites")
        plan = allocate(self.model.layout, None, budget, TARGET, find_allocator("uniform"), formats=FORMATS)
        start = time.process_time()
        quantize_sites(self.model, plan, find_quantizer("gptq"), self.calibration, MemoryWeights().keep)
        return time.process_time() - start


def measure_subject(
    laboratory: Laboratory, quantizers: list[str], budgets: list[str], rows: list[str]
) -> dict[str, Any]:
    """Each row at every budget."""
    tables = laboratory.tables()
    cells: list[dict[str, Any]] = []
    for text in budgets:
        plans = laboratory.plans(tables, Budget.parse(text), {ORACLE, *rows})
        for quantizer in quantizers:
            found = {row: laboratory.judge(plan, quantizer) for row, plan in plans.items()}
            for row, sums in found.items():
                kl, stderr = laboratory.ruler.estimate(sums)
                paired = [mine - best for mine, best in zip(sums, found[ORACLE], strict=True)]
                regret, regret_stderr = laboratory.ruler.estimate(paired)
                cells.append(
                    {
                        "budget": text, "quantizer": quantizer, "score": row, "kl_nats_per_token": kl,
                        "stderr": stderr, "regret_nats_per_token": regret, "regret_stderr": regret_stderr,
                        "n": int(laboratory.ruler.counts.sum()), "plan": digest_json(plans[row].formats)[:12],
                        **(estimates(laboratory, plans[row]) if set(rows) & set(PAIRS) else {}),
                    }
                )  # fmt: skip
            print(f"{laboratory.subject.label}, {text}, {quantizer}", flush=True)
            for cell in cells[-len(found) :]:
                regret = f"{cell['regret_nats_per_token']:+.5f} ({cell['regret_stderr']:.5f})"
                print(f"  {cell['score']:16s} {cell['kl_nats_per_token']:.5f} {regret} {cell['plan']}", flush=True)
    return {
        "calibration": laboratory.calibration.description,
        "held_out": laboratory.held_out.description,
        "cells": cells,
        "cpu_seconds": {name: table.provenance.cpu_seconds for name, table in tables.items()},
    }


def estimates(laboratory: Laboratory, plan: Plan) -> dict[str, float]:
    """What the sketches expect of a plan, without and with its pairs, in nats per token of their own text."""
    sites = {site.name: plan.formats[site.name] for site in laboratory.model.layout.block_sites}
    alone = [laboratory.sketches.plan({name: fmt}).value for name, fmt in sites.items()]
    return {"expected_sum": math.fsum(alone), "expected_with_pairs": laboratory.sketches.plan(sites).value}


def write_table(results: dict[str, Any]) -> None:
    """The section of docs/sensitivity.md between this benchmark's marks."""
    lines: list[str] = []
    for label, model in results["regret"]["models"].items():
        cells = {(cell["quantizer"], cell["budget"], cell["score"]): cell for cell in model["cells"]}
        columns = list(dict.fromkeys((quantizer, budget) for quantizer, budget, _ in cells))
        rows = list(dict.fromkeys(score for _, _, score in cells))
        gptq = model["gptq_cpu_seconds"]
        lines += [f"**{label}** (n = {model['cells'][0]['n']:,} tokens; one GPTQ pass: {gptq:.1f} CPU seconds)", ""]
        heads = [f"{quantizer}, {budget.removesuffix('bpw@sites')} bits" for quantizer, budget in columns]
        lines += ["| score | " + " | ".join(heads) + " | CPU s / GPTQ's |", "|---|" + "---|" * (len(columns) + 1)]
        for row in rows:
            seconds = model["cpu_seconds"].get(row)
            texts = [_cell_text(cells.get((*column, row)), row) for column in columns]
            texts.append("" if seconds is None else f"{seconds / gptq:.2f}")
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
        lines.append("")
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(MARKS[0])
    content = head + MARKS[0] + "\n\n" + "\n".join(lines) + MARKS[1] + rest.partition(MARKS[1])[2]
    write_whole(PAGE, content.encode())


def _key(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["quantizer"], cell["budget"], cell["score"]


def _cell_text(cell: dict[str, Any] | None, row: str) -> str:
    if cell is None:
        return ""
    if row == ORACLE:
        return f"KL {cell['kl_nats_per_token']:.5f} ± {cell['stderr']:.5f}"
    return f"{cell['regret_nats_per_token']:+.5f} ± {cell['regret_stderr']:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--quantizers", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--rows", nargs="*", default=[*SCORES, *PAIRS], help="of the table; others stay as they are")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="validation writes no results")
    parser.add_argument("--windows", type=int, default=32, help="of 256 held-out tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for subject in find_subjects(options.models):
        laboratory = Laboratory(subject, options.split, options.windows)
        found = measure_subject(laboratory, options.quantizers, options.budgets, options.rows)
        if options.split == "validation":
            continue
        results = json.loads(RESULTS.read_text())
        models = results.setdefault("regret", {"models": {}})["models"]
        before = models.get(subject.label, {"cells": []})
        cells = {_key(cell): cell for cell in (*before["cells"], *found["cells"])}
        found["cells"] = sorted(cells.values(), key=lambda cell: (cell["quantizer"] == "gptq", cell["budget"]))
        found["gptq_cpu_seconds"] = before.get("gptq_cpu_seconds") or laboratory.gptq_seconds()
        models[subject.label] = found
        results["regret"]["machine"] = describe_machine()
        write_results("sensitivity_agreement", results)
        write_table(results)


if __name__ == "__main__":
    main()
