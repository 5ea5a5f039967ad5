"""SliM-LLM against uniform GPTQ at equal stored bits, and the paper's ablations, on the reference models.

    python benchmarks/slim.py                                       # all; goes on where an earlier call stopped
    python benchmarks/slim.py --models reference-opt --bits 2 --rows "GPTQ, ours" "SliM, ours"

Rows "..., then Block-AP" train the blocks afterwards on the same windows, twice (EfficientQAT's first phase; the bit
map stays). SliM-LLM+ of the paper trains too, the clips of weights that are rounded to nearest (OmniQuant).

Every linear layer of the blocks gets one format, embedding and head stay in 16 bits. Calibration: 64 windows of 256
tokens, drawn with each of three seeds. Held-out text: standard errors of one run are clustered by document; those of
the table are over the seeds. Writes results/slim.json and prints the table.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, SHARED, model_folder, write_results

from cptquant.core.artifact import digest_json
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan, SolverStatus
from cptquant.evaluation.evaluate import evaluate
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import StoredWeight, encode
from cptquant.packing.segments import SegmentedWeight
from cptquant.quantizers.first_pass import FinishedInMemory
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.learned_blocks import LearnedBlocks, learn_blocks
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.slim import PUBLISHED, Slim
from cptquant.quantizers.slim_scale import ScaleSearch

MODELS = ("reference-llama", "reference-opt", "embedded:opt-mini")
GROUP = 64
OUR_GPTQ, OURS = Gptq(), Slim()


@dataclass(frozen=True)
class Row:
    """One way to quantize: a format's name with N in it, GPTQ, what it does on groups of mixed width, Block-AP."""

    format: str
    gptq: Gptq = OUR_GPTQ
    slim: Slim = OURS
    trained: bool = False


UNIFORM, MIXED, SORTED = f"int{{}}-g{GROUP}", f"slim{{}}-g{GROUP}", f"slim{{}}-g{GROUP}-sorted"
PAPER_GPTQ = Gptq(clip_search=False, diagonal_importance=False, descent_rounds=0)
ROWS: dict[str, Row] = {
    "GPTQ, the paper's": Row(UNIFORM, PAPER_GPTQ),
    "GPTQ, the paper's, with SQC": Row(MIXED, PAPER_GPTQ, replace(PUBLISHED, fixed_pairs=0)),
    "GPTQ, scale search": Row(UNIFORM, Gptq(descent_rounds=0)),
    "GPTQ, ours": Row(UNIFORM),
    "SliM, the paper's": Row(MIXED, slim=PUBLISHED),
    "SliM, the paper's, by MSE": Row(MIXED, slim=replace(PUBLISHED, objective="mse")),
    "SliM, the paper's, by magnitude": Row(MIXED, slim=replace(PUBLISHED, ranking="magnitude")),
    "SliM, the paper's, random groups": Row(MIXED, slim=replace(PUBLISHED, ranking="random")),
    "GPTQ, ours, then Block-AP": Row(UNIFORM, trained=True),
    "SliM, the paper's, then Block-AP": Row(MIXED, slim=PUBLISHED, trained=True),
    "SliM, ours, then Block-AP": Row(MIXED, trained=True),
    "SliM, ours": Row(MIXED),
    "SliM, ours, p by KL": Row(MIXED, slim=replace(OURS, objective="kl")),
    "SliM, ours, p by KL of min-max rounding": Row(MIXED, slim=replace(OURS, objective="kl", search_clip=False)),
    "SliM, ours, p by MSE": Row(MIXED, slim=replace(OURS, objective="mse")),
    "SliM, ours, by magnitude": Row(MIXED, slim=replace(OURS, ranking="magnitude")),
    "SliM, ours, random groups": Row(MIXED, slim=replace(OURS, ranking="random")),
    "SliM, ours, no descent": Row(MIXED, slim=replace(OURS, descent_rounds=0)),
    "SliM, ours, salient errors x 5": Row(MIXED, slim=replace(OURS, scale=ScaleSearch(steps=10, salient_weight=5.0))),
    "SliM, ours, exponent 2.4": Row(MIXED, slim=replace(OURS, scale=ScaleSearch(steps=10, exponent=2.4))),
    "SliM, ours, with SQC": Row(MIXED, slim=replace(OURS, scale=ScaleSearch(steps=10))),
    "sorted columns, ours": Row(SORTED),
    "sorted columns, ours, p = 0": Row(SORTED, slim=replace(OURS, fixed_pairs=0)),
}


def stored_weights(model: LoadedModel, kept: FinishedInMemory) -> list[StoredWeight]:
    """Every quantized matrix."""
    return [weight for site in model.layout.sites if (weight := kept.quantized(site.name)) is not None]


def uniform_plan(model: LoadedModel, fmt: QuantFormat) -> Plan:
    """Every linear site of the blocks in one format, the rest kept."""
    layout = model.layout
    blocks = {site.name for site in layout.block_sites}
    formats = {s.name: fmt if s.name in blocks else layout.keep_format for s in layout.sites}
    size = layout.block_site_bytes(formats)
    count = sum(site.weight_count for site in layout.block_sites)
    return Plan(
        target="transformers", allocator="uniform", budget=f"{8 * size / count}bpw@sites", budget_scope="sites",
        limit_bytes=size, formats={name: f.name for name, f in formats.items()}, size_bytes=layout.plan_bytes(formats),
        site_bytes=size, bits_per_weight=0.0, bits_per_weight_sites=8 * size / count, status=SolverStatus.HEURISTIC,
    )  # fmt: skip


def measure(model: LoadedModel, calibration: TokenSet, test: TokenSet, row: Row, bits: int) -> dict[str, Any]:
    plan, kept = uniform_plan(model, QuantFormat.parse(row.format.format(bits))), FinishedInMemory()
    start = time.process_time()
    quantize_sites(model, plan, replace(row.slim, gptq=row.gptq), calibration, kept.keep)
    if row.trained:
        first, kept = kept, FinishedInMemory()
        learn_blocks(model, LearnedBlocks(), calibration, first, kept.keep)
    seconds = time.process_time() - start
    weights = stored_weights(model, kept)
    written = sum(t.numel() * t.element_size() for w in weights for t in encode(w).values())
    if written != plan.site_bytes:
        raise SystemExit(f"{written} bytes of tensors, {plan.site_bytes} in the plan")
    found = {(m.subject, m.name): m for m in evaluate(model, {"quantized": kept}, test)}
    kl = found["quantized", "kl_nats_per_token"]
    nll = {s: found[s, "nll_nats_per_token"].value for s in ("original", "quantized")}
    pairs = [w.pairs / len(w.widths) for w in weights if isinstance(w, SegmentedWeight)]
    return {
        "bits_per_weight_sites": plan.bits_per_weight_sites,
        "kl_nats_per_token": kl.value,
        "kl_stderr": kl.stderr,
        "n": kl.n,
        "perplexity_original": math.exp(nll["original"]),
        "perplexity_increase": math.exp(nll["quantized"]) - math.exp(nll["original"]),
        "share_of_pairs": statistics.mean(pairs) if pairs else 0.0,
        "cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--bits", nargs="+", type=int, default=(2, 3))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--rows", nargs="+", default=tuple(ROWS))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "slim")
    parser.add_argument("--results", default="slim", help="name of the file in results/; '' writes none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    finished: list[dict[str, Any]] = []
    for name in args.models:
        finished += measure_model(name, args)
    if args.results:
        path, rows = FOLDER / f"{args.results}.json", summarise(finished)
        made = {(row["model"], row["bits"], row["row"]) for row in rows}
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        rows += [row for row in earlier if (row["model"], row["bits"], row["row"]) not in made]
        rows.sort(key=lambda row: (row["model"], row["bits"], list(ROWS).index(row["row"])))
        write_results(args.results, {"machine": describe_machine(), "rows": rows})


def measure_model(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of a model, from the work folder where it is finished already."""
    text = None if name.startswith("embedded:") else SHARED / "data" / "text" / "general"
    model = load_model(str(model_folder(name)))

    def tokens(file: str, split: Any, sequences: int, seed: int) -> TokenSet:
        return load_tokens(model, text and text / file, split, sequences=sequences, length=256, seed=seed)

    test = tokens("test.txt", "test", args.windows, 0)
    calibration = {seed: tokens("train.txt", "calibration", args.sequences, seed) for seed in args.seeds}
    cells: list[dict[str, Any]] = []
    for label, bits, seed in product(args.rows, args.bits, args.seeds):
        cell = {"model": name, "bits": bits, "row": label, "seed": seed}
        key = cell | {"options": repr(ROWS[label]), "text": [calibration[seed].digest, test.digest]}
        path = args.work / f"{digest_json(key)[:24]}.json"
        if not path.exists():
            path.write_text(json.dumps(cell | measure(model, calibration[seed], test, ROWS[label], bits)))
        found = json.loads(path.read_text())
        cells.append(found)
        print(
            f"{name} {bits} seed {seed} {label}: KL {found['kl_nats_per_token']:.4f}, perplexity "
            f"+{found['perplexity_increase']:.3f}, {found['bits_per_weight_sites']:.3f} bits, p/k "
            f"{found['share_of_pairs']:.2f}, {found['cpu_seconds']:.0f} s", flush=True,
        )  # fmt: skip
    return cells


def summarise(finished: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of every finished cell, with standard errors over the seeds."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for cell in finished:
        groups.setdefault((cell["model"], cell["bits"], cell["row"]), []).append(cell)
    rows: list[dict[str, Any]] = []
    for model, bits, label in sorted(groups, key=lambda key: (key[0], key[1], list(ROWS).index(key[2]))):
        cells = sorted(groups[model, bits, label], key=lambda cell: cell["seed"])
        row: dict[str, Any] = {"model": model, "bits": bits, "row": label, "seeds": [cell["seed"] for cell in cells]}
        for name in ("kl_nats_per_token", "perplexity_increase"):
            values = [cell[name] for cell in cells]
            row[name] = statistics.mean(values)
            row[f"{name}_stderr_over_seeds"] = statistics.stdev(values) / len(values) ** 0.5 if values[1:] else None
        for name in ("bits_per_weight_sites", "perplexity_original", "share_of_pairs", "cpu_seconds", "kl_stderr", "n"):
            row[name] = statistics.mean(cell[name] for cell in cells)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
