"""How well the table tells whether llama.cpp's preset is worth comparing: predicted against measured disadvantage.

    OMP_NUM_THREADS=1 python benchmarks/preset_guard.py [--models reference-opt]

At the bytes of each preset: the knapsack's plan, the preset's own types (`core.targets.gguf_presets`, no engine
needed), the predicted damage of both by TDMPQ, and the KL of both under GPTQ as results/gguf_presets.json has it.
Writes results/preset_guard.json.
"""

import argparse
import json
import math
from typing import Any

import torch
from machine import describe_machine
from results_file import FOLDER, SHARED, model_folder, write_results

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.targets import candidate_formats, find_target
from cptquant.core.targets.gguf_presets import PRESETS, preset_formats
from cptquant.models.load import load_model
from cptquant.models.text import load_tokens
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method
from cptquant.stages.presets import CLEARLY_WORSE, find_preset

GGUF = find_target("gguf")
FORMATS = tuple(QuantFormat.parse(name) for name in GGUF.default_formats)


def run(name: str) -> list[dict[str, Any]]:
    """One row a preset."""
    model = load_model(str(model_folder(name)))
    layout = model.layout
    source = None if name.startswith("embedded:") else SHARED / "data" / "text" / "general" / "train.txt"
    tokens = load_tokens(model, source, "calibration", sequences=128, length=256, seed=0)
    presets = {preset: preset_formats(layout, preset) for preset in PRESETS}
    extra = {fmt for formats in presets.values() for fmt in formats.values() if not fmt.is_float}
    offered = tuple(dict.fromkeys((*FORMATS, *sorted(extra, key=str))))
    candidates = {site.name: candidate_formats(site, layout, GGUF, offered) for site in layout.sites}
    table = measure_sensitivity(model, tokens, candidates, find_method("tdmpq"))
    known = json.loads((FOLDER / "gguf_presets.json").read_text())["rows"]
    measured = {(row["preset"], row["method"]): row["kl_nats_per_token"] for row in known if row["model"] == name}
    rows: list[dict[str, Any]] = []
    for preset, formats in presets.items():
        budget = Budget(GGUF.plan_bytes(layout, formats), "bytes")
        plan = allocate(layout, table, budget, GGUF, find_allocator("knapsack"), formats=FORMATS)
        damage = math.fsum(table.damages[site][fmt.name].value for site, fmt in formats.items())
        assert plan.predicted_damage is not None
        kl = [measured[preset, method] for method in ("ours, preset's types", "ours, mixed")]
        rows.append(
            {
                "model": name, "preset": preset, "bytes": GGUF.plan_bytes(layout, formats),
                "predicted_times": damage / plan.predicted_damage, "measured_times": kl[0] / kl[1],
                "quantized": find_preset(layout, plan.model_copy(update={"size_bytes": budget.limit_bytes(layout)}),
                                         table).plan is not None,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference-llama", "reference-opt", "embedded:opt-mini"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.models for row in run(name)]
    write_results("preset_guard", {"machine": describe_machine(), "clearly_worse": CLEARLY_WORSE, "rows": rows})


if __name__ == "__main__":
    main()
