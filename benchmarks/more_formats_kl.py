"""KL at equal bytes of whole models whose knapsack may take options of `format_options.py`, or whose heads are rotated.

    OMP_NUM_THREADS=1 python benchmarks/more_formats_kl.py [--models reference-opt] [--lists "weights apart"]

The budget counts the blocks' linear layers, everything an option needs included. TDMPQ scores the plain formats; an
option's damage is that of the format of its codes times the ratio of their output errors after GPTQ in the original
model: for single weights the mean over the sites that `more_formats.py` measured, all models together; columns are
offered at those sites alone, each with its own ratio. GPTQ goes through the blocks on the stream of the quantized
blocks before. Everything is held in memory as the weights that would be read back. Calibration draws (the plan is made
with the first); validation and test text, n = windows x 255 tokens each. A figure's first standard error is by document
for the mean over draws; differences to "plain" are paired, with standard errors by document and over draws.

Rotations take the plan of "plain". "heads rotated": v's rows and o's columns by one Hadamard matrix a head, which folds
exactly in both families; "all heads rotated": rows of q and k too, OPT only (no rotary embedding). "residual rotated":
all that reads or writes the residual stream of a model with RMSNorm, after its gains are folded into the matrices.
"inputs rotated" turns the inputs of every site and folds nowhere: a bound.
Goes on where an earlier call stopped. Adds to results/more_formats.json.
"""

import argparse
import copy
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from format_options import Columns, Entries, Option, Plain, Rotated
from head_rotation import largest_logit_change
from joint_formats import LISTS, Bench
from machine import describe_machine
from more_formats import MODELS, load_texts, original, storage_dtype
from more_formats import measure_model as measure_sites
from results_file import FOLDER, REPOSITORY, write_results
from torch import Tensor

from cptquant.allocation.knapsack import solve_knapsack
from cptquant.core.artifact import digest_json
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.evaluation.lockstep import run_blocks
from cptquant.evaluation.scored_text import prepare_text
from cptquant.evaluation.scores import collect_scores
from cptquant.models.arithmetic import coarse_products
from cptquant.models.estimates import cluster_by_document, estimate_ratio
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules, write_weight_
from cptquant.models.text import TokenSet
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import collect_block_hessians

PLAIN_LIST = LISTS["transformers"]["g64, g128"]
_CODES = [QuantFormat.parse(f"int{bits}-g64") for bits in (2, 3, 4)]
_WEIGHTS = tuple(Entries(base, share, 8, "magnitude") for base in _CODES for share in (0.005, 0.01, 0.02))
_COLUMNS = tuple(Columns(base, share, 8) for base in _CODES for share in (0.01, 0.02, 0.04))
CHOOSING: dict[str, tuple[Option, ...]] = {
    "plain": (),
    "weights apart": _WEIGHTS,
    "columns apart": _COLUMNS,
    "weights or columns apart": (*_WEIGHTS, *_COLUMNS),
}
"""Lists whose options the knapsack may take beside the plain formats."""
ROTATING = ("heads rotated", "all heads rotated", "inputs rotated", "residual rotated")
ONLY_IN = {"residual rotated": "llama", "all heads rotated": "opt"}
Choices = dict[str, Option]
"""Site -> how it is held."""


class Held:
    """Weights as read back, in memory: a source for the stream."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def weight(self, site_name: str) -> Tensor | None:
        return self.weights.get(site_name)


class Costs:
    """Bytes and damages of every option at every site of a model."""

    def __init__(self, bench: Bench, work: Path) -> None:
        self.model, self.table = bench.model, bench.table(PLAIN_LIST)
        files = [json.loads(path.read_text()) for path in sorted(work.glob("site-*.json"))]
        self._all = [{row["option"]: row["calibration"] for row in site["rows"]} for site in files]
        every = argparse.Namespace(blocks=range(bench.model.layout.block_count), finished=True, work=work)
        self._own = {
            site["site"]: {row["option"]: row["calibration"] for row in site["rows"]}
            for site in measure_sites(bench.name, every)
        }
        self._means: dict[str, float] = {}

    def damage(self, site: Site, option: Option) -> float:
        """Expected; infinite where it is not known."""
        known = self.table.damages[site.name][option.base.name].value
        if isinstance(option, Plain):
            return known
        if isinstance(option, Entries):
            return known * self._mean_ratio(option)
        errors = self._own.get(site.name)
        return math.inf if errors is None else known * errors[option.name] / errors[option.base.name]

    def _mean_ratio(self, option: Option) -> float:
        """Of all measured sites, all models together; it hardly differs between sites."""
        if option.name not in self._means:
            logs = [math.log(errors[option.name] / errors[option.base.name]) for errors in self._all]
            self._means[option.name] = math.exp(statistics.mean(logs))
            print(f"{option.name}: {self._means[option.name]:.3f}, ± {statistics.stdev(logs):.3f} a site, {len(logs)}")
        return self._means[option.name]

    def choose(self, extra: tuple[Option, ...], budget: str) -> tuple[Choices, int, float]:
        """The knapsack's choices, their bytes and predicted damage."""
        sites = self.model.layout.block_sites
        options: list[list[Option]] = []
        for site in sites:
            names = [name for name in PLAIN_LIST if name in self.table.damages[site.name]]
            options.append([*(Plain(QuantFormat.parse(name)) for name in names), *extra])
        width = max(map(len, options))
        sizes, damages = np.zeros((len(sites), width), dtype=np.int64), np.full((len(sites), width), np.inf)
        for row, (site, own) in enumerate(zip(sites, options, strict=True)):
            sizes[row, : len(own)] = [math.ceil(o.bits(site.out_features, site.in_features) / 8) for o in own]
            damages[row, : len(own)] = [self.damage(site, o) for o in own]
        chosen, _, _ = solve_knapsack(sizes, damages, Budget.parse(budget).limit_bytes(self.model.layout))
        rows = np.arange(len(sites))
        picked = {site.name: own[int(j)] for site, own, j in zip(sites, options, chosen, strict=True)}
        return picked, int(sizes[rows, chosen].sum()), float(damages[rows, chosen].sum())


def rotate(kind: str, choices: Choices, model: LoadedModel) -> Choices:
    """The same formats behind a rotation."""
    config: Any = model.module.config
    width, turned = model.layout.hidden_size // config.num_attention_heads, dict(choices)
    for site in model.layout.block_sites:
        base = choices[site.name].base
        if kind == "inputs rotated":
            turned[site.name] = Rotated(base, "columns")
        elif site.role in (("q", "k", "v", "o") if kind == "all heads rotated" else ("v", "o")) and "heads" in kind:
            turned[site.name] = Rotated(base, "columns" if site.role == "o" else "rows", width, same=True)
        elif kind == "residual rotated":
            turned[site.name] = Rotated(base, "rows" if site.role in ("o", "down") else "columns", 0)
    return turned


def fold_gains(model: LoadedModel) -> LoadedModel:
    """A float32 copy of a Llama with the gains of its blocks' norms in the matrices behind them."""
    module: Any = copy.deepcopy(model.module).float()
    for layer in module.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, linears in readers.items():
            for linear in linears:
                linear.weight.data *= norm.weight.data
            norm.weight.data.fill_(1.0)
    return replace(model, module=module)


def carry_out(model: LoadedModel, tokens: TokenSet, choices: Choices) -> Held:
    """GPTQ block after block on the quantized stream, as `quantize_sites` does it."""
    held, gptq, dtype = Held(), Gptq(), storage_dtype(model)
    stream = ModelStream(model, tokens, weights=held)
    for index in range(model.layout.block_count):
        block = stream.load_block()
        modules = site_modules(block, model.layout, index)
        hessians = collect_block_hessians(stream, block, modules, coarse=True)
        for name, module in modules.items():
            site = model.layout.site_by_name[name]
            weight = choices[name].quantize(original(model, site), hessians.hessian(name), gptq, dtype)
            write_weight_(module, site, weight)
            held.weights[name] = weight
        with coarse_products(True):
            stream.advance(block)
    return held


def sequence_kl(original_model: LoadedModel, model: LoadedModel, held: Held, tokens: TokenSet) -> Tensor:
    """KL to the original summed over each sequence, (n,) float64 nats."""
    text = prepare_text(original_model, tokens)
    streams = {
        "original": ModelStream(original_model, text.tokens),
        "changed": ModelStream(model, text.tokens, weights=held),
    }
    run_blocks(streams)
    kl = collect_scores(streams, text)["changed"].kl_nats
    assert kl is not None
    return kl


def measure_list(bench: Bench, choices: Choices, label: str, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Text -> per seed the KL of every sequence; seeds that are finished are read again."""
    result: dict[str, list[list[float]]] = {text: [] for text in bench.texts}
    model = fold_gains(bench.model) if label == "residual rotated" else bench.model
    described = {name: repr(option) for name, option in choices.items()}
    folded = "gains folded" if label == "residual rotated" else ""
    for seed in args.seeds:
        key = [bench.model.layout.digest(), folded, described, args.windows, seed]
        path = args.work / f"kl-{digest_json(key)[:24]}.json"
        if not path.exists():
            calibration = load_texts(bench.model, bench.name, args.windows, seed)["calibration"]
            held = carry_out(model, calibration, choices)
            found = {text: sequence_kl(bench.model, model, held, tokens) for text, tokens in bench.texts.items()}
            path.write_text(json.dumps({text: kl.tolist() for text, kl in found.items()}))
        for text, values in json.loads(path.read_text()).items():
            result[text].append(values)
    return result


def compare(found: dict[str, list[list[float]]], plain: dict[str, list[list[float]]], bench: Bench) -> dict[str, Any]:
    """Mean over seeds, and the paired difference to plain."""
    result: dict[str, Any] = {}
    for text, tokens in bench.texts.items():
        own, other = (torch.tensor(values, dtype=torch.float64) for values in (found[text], plain[text]))
        clusters = cluster_by_document(tokens.documents)
        sizes = torch.full((own.shape[1],), tokens.input_ids.shape[1] - 1)
        kl, difference = (estimate_ratio(v.mean(dim=0), sizes, clusters) for v in (own, own - other))
        by_seed = (own - other).sum(dim=1) / sizes.sum()
        over_seeds = float(by_seed.std() / len(by_seed) ** 0.5) if len(by_seed) > 1 else None
        base = estimate_ratio(other.mean(dim=0), sizes, clusters).value
        result[text] = {
            "kl_nats_per_token": [kl.value, kl.stderr], "n": kl.n, "ratio": kl.value / base,
            "difference": [difference.value, difference.stderr, over_seeds],
        }  # fmt: skip
    return result


def measure_model(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every list under every budget."""
    costs, rows = Costs(bench, args.work), []
    for budget in args.budgets:
        plain, plain_bytes, predicted = costs.choose((), budget)
        reference = measure_list(bench, plain, "plain", args)
        for label in args.lists:
            if ONLY_IN.get(label, bench.model.layout.model_type) != bench.model.layout.model_type:
                continue
            if label in CHOOSING:
                choices, size, damage = costs.choose(CHOOSING[label], budget)
            else:
                choices, size, damage = rotate(label, plain, bench.model), plain_bytes, predicted
            found = compare(measure_list(bench, choices, label, args), reference, bench)
            taken = sum(not isinstance(option, Plain) for option in choices.values())
            used: dict[str, int] = {}
            for option in choices.values():
                used[option.name] = used.get(option.name, 0) + 1
            rows.append({"model": bench.name, "budget": budget, "list": label, "seeds": list(args.seeds),
                         "site_bytes": size, "predicted_damage": damage, "sites_with_the_option": taken,
                         "site_count": len(choices), "used": used, **found})  # fmt: skip
            print_row(rows[-1])
    return rows


def check_fold(bench: Bench) -> dict[str, Any]:
    """The unquantized model with its heads rotated, in float64: largest change of a logit, beside the largest logit."""
    some = bench.texts["validation"].input_ids[:4]
    found: dict[str, Any] = {"tokens": some.numel()}
    found["v, o"], found["largest_logit"] = largest_logit_change(bench.model, some)
    if bench.model.layout.model_type == "opt":
        found["q, k, v, o"], _ = largest_logit_change(bench.model, some, queries=True)
    return found


def print_row(row: dict[str, Any]) -> None:
    texts = [
        f"{text} {row[text]['kl_nats_per_token'][0]:.5f} ± {row[text]['kl_nats_per_token'][1]:.5f}, ratio "
        f"{row[text]['ratio']:.3f}, difference {row[text]['difference']}"
        for text in ("validation", "test")
    ]
    print(row["model"], row["budget"], row["list"], row["site_bytes"], row["predicted_damage"],
          f"{row['sites_with_the_option']}/{row['site_count']}", *texts, sep="; ", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", default=["2.5bpw@sites", "3bpw@sites"])
    parser.add_argument("--lists", nargs="+", default=[*CHOOSING, *ROTATING])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens, of each of the two texts")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "more_formats")
    parser.add_argument("--target", default="transformers", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "more_formats.json"
    for name in args.models:
        bench = Bench(name, args)
        folded, rows = check_fold(bench), measure_model(bench, args)
        content = json.loads(path.read_text()) if path.exists() else {}
        keys = {(row["model"], row["budget"], row["list"]) for row in rows}
        kept = [r for r in content.get("models", []) if (r["model"], r["budget"], r["list"]) not in keys]
        content.setdefault("head_rotation_float64", {})[name] = folded
        content["models"], content["models_machine"] = kept + rows, describe_machine()
        write_results("more_formats", content)


if __name__ == "__main__":
    main()
