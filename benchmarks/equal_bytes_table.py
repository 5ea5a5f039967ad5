"""docs/equal_bytes.md from results/equal_bytes.json.

python benchmarks/equal_bytes_table.py
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from results_file import FOLDER, REPOSITORY

METHODS = ("cmpq", "pmpq", "tdmpq")
BUDGET_ROWS = ("uniform", "random", *(f"{method} knapsack" for method in (*METHODS, "ablation")),
               *(f"{method} kmeans" for method in METHODS))  # fmt: skip
Cells = dict[tuple[str, str, str], list[dict[str, Any]]]
"""Budget, row, quantizer -> its cells (several seeds for random)."""


def write_table(content: dict[str, Any], path: Path) -> None:
    """Write the page; figures come from the results file only."""
    machine = content["machine"]
    lines = [
        "# KL at equal bytes",
        "",
        "Made by `python benchmarks/equal_bytes.py` (the docstring says what is compared); figures in "
        "`benchmarks/results/equal_bytes.json`. KL(original‖quantized) in nats per token on held-out text, mean ± "
        "standard error clustered by document. Bits per weight are those of the blocks' linear layers, scales "
        "included; embedding and head stay in 16 bits. In brackets: the bits really used, where they are below the "
        "budget by more than 0.02. Random: mean over 5 seeds ± standard deviation between seeds. Bold: the best of a "
        "column that needs no ablation.",
        "",
        f"Versions: torch {machine['versions'].get('torch')}, transformers {machine['versions'].get('transformers')}, "
        f"cptquant {machine['versions'].get('cptquant')}; {machine['processor']}, {machine['cores']} cores.",
    ]
    for name, model in content["models"].items():
        lines += ["", f"## {name}", "", f"Calibration: {model['calibration']}. Test: {model['test']}."]
        cells = group_cells(model["cells"])
        for quantizer in model["quantizers"]:
            lines += ["", f"### {quantizer.upper()}", "", *budget_table(cells, quantizer)]
            lines += ["", "k-means beside the knapsack at exactly its bytes:", "", *kmeans_table(cells, quantizer)]
        lines += ["", *reading(cells, tuple(model["quantizers"]))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def group_cells(cells: list[dict[str, Any]]) -> Cells:
    """By budget, row and quantizer."""
    grouped: Cells = defaultdict(list)
    for cell in cells:
        grouped[cell["budget"], cell["row"], cell["quantizer"]].append(cell)
    return dict(grouped)


def budgets_of(cells: Cells) -> list[str]:
    """In order of first appearance, without the paper's own size."""
    return list(dict.fromkeys(budget for budget, _, _ in cells if budget != "16/8/4"))


def mean_kl(found: list[dict[str, Any]]) -> float:
    return statistics.mean(cell["kl_nats_per_token"] for cell in found)


def spell(found: list[dict[str, Any]] | None, budget: str, *, best: bool) -> str:
    """Value ± error (bits)."""
    if not found:
        return "over the budget"
    kls = [cell["kl_nats_per_token"] for cell in found]
    error = statistics.stdev(kls) if len(kls) > 1 else found[0]["stderr"]
    digits = 5 if mean_kl(found) < 0.1 else 4
    text = f"{mean_kl(found):.{digits}f} ± {error:.{digits}f}"
    bits = statistics.mean(cell["bits_per_weight_sites"] for cell in found)
    asked = float(budget.removesuffix("bpw@sites")) if budget.endswith("bpw@sites") else None
    text = f"**{text}**" if best else text
    return f"{text} ({bits:.2f})" if asked is None or asked - bits > 0.02 else text


def budget_table(cells: Cells, quantizer: str) -> list[str]:
    """Rows by method, columns by budget."""
    budgets = budgets_of(cells)
    lines = ["| | " + " | ".join(budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    best = {}
    for budget in budgets:
        present = [row for row in BUDGET_ROWS if row != "ablation knapsack" and (budget, row, quantizer) in cells]
        best[budget] = min(present, key=lambda row, budget=budget: mean_kl(cells[budget, row, quantizer]))
    for row in BUDGET_ROWS:
        texts = []
        for budget in budgets:
            if budget.startswith("as ") and row.endswith("kmeans"):
                texts.append("–")
            else:
                found = cells.get((budget, row, quantizer))
                texts.append(spell(found, budget, best=best[budget] == row))
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return lines


def kmeans_table(cells: Cells, quantizer: str) -> list[str]:
    """What clustering costs against the knapsack on the same scores and bytes."""
    lines = ["| method | budget | bits | k-means | knapsack, same bytes | knapsack / k-means |", "|---" * 6 + "|"]
    for method in METHODS:
        for budget in [*budgets_of(cells), "16/8/4"]:
            pair = [cells.get((budget, f"{method} {row}", quantizer)) for row in
                    ("kmeans", "knapsack at the bytes of kmeans")]  # fmt: skip
            if not pair[0] or not pair[1]:
                continue
            clustered, packed = pair[0][0], pair[1][0]
            ratio = packed["kl_nats_per_token"] / clustered["kl_nats_per_token"]
            lines.append(
                f"| {method} | {budget} | {clustered['bits_per_weight_sites']:.2f} "
                f"| {clustered['kl_nats_per_token']:.5f} ± {clustered['stderr']:.5f} "
                f"| {packed['kl_nats_per_token']:.5f} ± {packed['stderr']:.5f} | {ratio:.2f} |"
            )
    return lines


def reading(cells: Cells, quantizers: tuple[str, ...]) -> list[str]:
    """Ratios over all budgets, computed: geometric mean of KL(method with knapsack) to others at the same budget."""
    lines = ["KL with the knapsack relative to others at the same budgets (geometric mean; below 1 is better):", ""]
    lines += ["| | to uniform bits, exactly equal bytes | to random, mean of seeds | to ablation with knapsack |",
              "|---" * 4 + "|"]  # fmt: skip
    for quantizer in quantizers:
        for method in (*METHODS, "ablation"):
            ratios = []
            for other in ("uniform", "random", "ablation knapsack"):
                budgets = [budget for budget in budgets_of(cells) if other != "uniform" or budget.startswith("as ")]
                logs = []
                for budget in budgets:
                    mine, theirs = (cells.get((budget, row, quantizer)) for row in (f"{method} knapsack", other))
                    if mine and theirs:
                        logs.append(mean_kl(mine) / mean_kl(theirs))
                ratios.append(f"{statistics.geometric_mean(logs):.2f}" if logs else "–")
            lines.append(f"| {method}, {quantizer.upper()} | " + " | ".join(ratios) + " |")
    return lines


if __name__ == "__main__":
    write_table(json.loads((FOLDER / "equal_bytes.json").read_text()), REPOSITORY / "docs" / "equal_bytes.md")
