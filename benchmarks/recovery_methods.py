"""Loss won back against training time: every method of `cptquant recover`, from the same quantized starts.

    OMP_NUM_THREADS=1 python benchmarks/recovery_methods.py                     # goes on where a call stopped
    ... --models reference-llama --plans int2-g64 --starts kl-rounding --methods qat scales --steps 100 400

A start is a format for all linear layers of the blocks or a budget for the knapsack, made by `gptq` or `kl-rounding`;
embedding and head stay in 16 bits. Training text: 512 windows of 256 tokens of the model's calibration text and 1,024
that the model writes itself; of block-wise methods 128 of these windows. --data FILE is other text. Figures on test
text, standard errors by document; CPU seconds of training without writing own text, which are beside them.
Writes results/recovery.json and, of mixed plans from GPTQ's start, docs/recovery.png; --draw only draws and prints.
"""

import argparse
import json
from typing import Any

import matplotlib
from machine import describe_machine
from recovery_lab import Start, start_row, train, training_text
from results_file import FOLDER, REPOSITORY, model_folder, write_results

from cptquant.core.recovery import RecoveryRequest
from cptquant.recovery.methods import BLOCK_BY_BLOCK, METHODS

matplotlib.use("Agg")

MODELS = ("embedded:opt-mini", "reference-llama", "reference-opt")
PLANS = ("int2-g64", "int3-g64")
SEQUENCES, OWN_TEXT = 512, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--starts", nargs="+", default=["gptq", "kl-rounding"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 400])
    parser.add_argument("--flags", default="{}", help="JSON of further fields of the request")
    parser.add_argument("--data", default=None, help="training text in place of the model's calibration text")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--own-text", type=int, default=OWN_TEXT)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    flags = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(args.flags).items()}
    models = args.models or [name for name in MODELS if name.startswith("embedded:") or model_folder(name).is_dir()]
    path = FOLDER / "recovery.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    if args.draw:
        draw(rows)
        print_table(rows)
        return
    texts_of: dict[str, Any] = {}
    for start in (Start(m, plan, quantizer) for m in models for plan in args.plans for quantizer in args.starts):
        keep(rows, start, RecoveryRequest(method="none"), lambda start=start: start_row(start))
        wanted = [
            RecoveryRequest(method=method, steps=steps, **flags)
            for method in args.methods
            for steps in ([None] if method in BLOCK_BY_BLOCK else args.steps)
        ]
        source = f"{args.data or 'calibration text'}, {args.sequences} windows, {args.own_text} of its own"
        if any(find(rows, start, request, source) is None for request in wanted):
            if start.model not in texts_of:  # the original's own words: the same for all of its plans
                texts_of[start.model] = training_text(start, args.sequences, args.own_text, args.data)
            texts = texts_of[start.model]
            for request in wanted:
                keep(rows, start, request, lambda r=request, s=start, t=texts: train(s, r, t), source)
    draw(rows)


def find(rows: list[dict[str, Any]], start: Start, request: RecoveryRequest, text: str) -> dict[str, Any] | None:
    """The row of that training, if it was run."""
    wanted = (start.model, start.plan, start.quantizer, request.model_dump(exclude_defaults=True, mode="json"), text)
    for row in rows:
        if (row["model"], row["plan"], row["start"], row["request"], row["text"]) == wanted:
            return row
    return None


def keep(rows: list[dict[str, Any]], start: Start, request: RecoveryRequest, make: Any, text: str = "") -> None:
    """Run what is not there yet."""
    if find(rows, start, request, text) is not None:
        return
    row = {**make(), "request": request.model_dump(exclude_defaults=True, mode="json"), "text": text}
    rows.append(row)
    write_results("recovery", {"machine": describe_machine(), "rows": rows})
    test = {name: found["value"] for name, found in row["test"].items() if isinstance(found, dict)}
    print(start.model, start.plan, start.quantizer, row["request"], test, row.get("training_cpu_seconds"), flush=True)


def draw(rows: list[dict[str, Any]]) -> None:
    """Rise of the NLL and CPU seconds of training, a panel a model and budget; only plain requests."""
    import matplotlib.pyplot as plt

    mixed = [row for row in rows if "bpw" in row["plan"] and row["start"] == "gptq" and plain(row)]
    models = [model for model in MODELS if any(row["model"] == model for row in mixed)]
    plans = sorted({row["plan"] for row in mixed}, key=lambda plan: float(plan.partition("bpw")[0]))
    if not models:
        return
    figure, axes = plt.subplots(
        len(models), len(plans), figsize=(3 * len(plans), 2.6 * len(models)), squeeze=False, sharex=True
    )
    marks = dict(zip(METHODS, "osv^DPX*", strict=False))
    for line, model in zip(axes, models, strict=True):
        for panel, plan in zip(line, plans, strict=True):
            for row in (row for row in mixed if (row["model"], row["plan"]) == (model, plan)):
                method = row["request"].get("method", "qat")
                found = row["test"]["nll_increase_nats_per_token"]
                if method == "none":
                    panel.axhline(found["value"], color="0.6", linestyle="--", linewidth=1, label="GPTQ, not trained")
                else:
                    panel.errorbar(
                        row["training_cpu_seconds"], found["value"], found["stderr"], marker=marks[method],
                        color=f"C{list(METHODS).index(method)}", label=method, capsize=2, linestyle="",
                    )  # fmt: skip
            panel.set_title(f"{model.removeprefix('embedded:')}, {plan.partition('@')[0]}", fontsize=9)
            panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        line[0].set_ylabel("NLL +, nats/token", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("CPU seconds of training", fontsize=8)
    axes[0][0].set_xlim(left=0)
    named = {label: mark for panel in axes.flat for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), ncols=len(named), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(REPOSITORY / "docs" / "recovery.png", dpi=110)


def print_table(rows: list[dict[str, Any]]) -> None:
    """NLL's rise and KL of every method, and as parts of GPTQ's, in Markdown."""
    print("| model, bits of the layers | method | CPU s | perplexity | NLL + | of GPTQ's | KL | of GPTQ's |")
    print("|---|---|---|---|---|---|---|---|")
    starts = {(row["model"], row["plan"]): row for row in rows if row["request"].get("method") == "none"}
    for row in rows:
        if "bpw" not in row["plan"] or row["start"] != "gptq":
            continue
        rise, kl = (row["test"][name] for name in ("nll_increase_nats_per_token", "kl_nats_per_token"))
        start = starts[row["model"], row["plan"]]["test"]
        first, first_kl = (start[name]["value"] for name in ("nll_increase_nats_per_token", "kl_nats_per_token"))
        asked = dict(row["request"])
        name = " ".join([asked.pop("method", "qat"), *(f"{k} {v}" for k, v in asked.items() if k != "steps")])
        print(
            f"| {row['model'].removeprefix('embedded:')}, {row['bits_per_weight_sites']:.2f} "
            if name == "none" else "| ",
            f"| {name} | {row.get('training_cpu_seconds', 0):.0f} | {row['test']['perplexity']['value']:.2f} "
            f"| {rise['value']:.4f} ± {rise['stderr']:.4f} | {rise['value'] / first:.2f} "
            f"| {kl['value']:.4f} ± {kl['stderr']:.4f} | {kl['value'] / first_kl:.2f} |",
        )  # fmt: skip


def plain(row: dict[str, Any]) -> bool:
    """Whether nothing but method and steps was asked for."""
    return set(row["request"]) <= {"method", "steps"}


if __name__ == "__main__":
    main()
