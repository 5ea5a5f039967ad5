"""Would the knapsack ever choose rotation, a low-rank residual, or outliers in 8 or 16 bits? Errors at equal bits.

    OMP_NUM_THREADS=1 python benchmarks/more_formats.py              # all sites of three blocks a model
    OMP_NUM_THREADS=1 python benchmarks/more_formats_kl.py           # the KL of whole models, afterwards

Per site of the first, a middle and the last block, with the second moments of its inputs in the original model on 128 x
256 calibration tokens: tr(E H E') / tr(W H W') after GPTQ with its descent, for plain formats and for each option of
`format_options.py` on codes of 2, 3 and 4 bits in groups of 64. Also under the moments of 64 windows of validation
text, which nothing was fitted to. An option is compared at its own bits, everything counted, with

    plain      ln error of int2 to int6-g64, linear between them: one format of any width
    chord      the lower convex hull of the errors of all plain formats, g64 and g128: what a knapsack can mix from
               many sites like this one; an option below it would be chosen

Figures are geometric means of the ratio over sites, with standard errors over sites. Goes on where an earlier call
stopped. Writes results/more_formats.json.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from format_options import Columns, Entries, LowRank, Option, Plain, Rotated, output_error
from machine import describe_machine
from results_file import FOLDER, REPOSITORY, SHARED, model_folder, write_results
from torch import Tensor

from cptquant.core.artifact import digest_json
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import ModelStream, read_weight, site_modules
from cptquant.models.text import TokenSet, load_tokens
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import collect_block_hessians

MODELS = ("reference-llama", "reference-opt", "embedded:opt-mini")
CODE_BITS = (2, 3, 4)
SHARES = (0.005, 0.01, 0.02, 0.04)
PLAIN = tuple(QuantFormat.parse(f"int{bits}-g{group}") for bits in (2, 3, 4, 5, 6) for group in (64, 128))


def load_texts(model: LoadedModel, name: str, windows: int, seed: int = 0) -> dict[str, TokenSet]:
    """Calibration, validation and test text of a model."""
    general = None if name.startswith("embedded:") else SHARED / "data" / "text" / "general"

    def tokens(file: str, split: Any, sequences: int, seed: int) -> TokenSet:
        source = None if general is None else general / file
        return load_tokens(model, source, split, sequences=sequences, length=256, seed=seed)

    return {
        "calibration": tokens("train.txt", "calibration", 128, seed),
        "validation": tokens("test.txt", "validation", windows, 0),
        "test": tokens("test.txt", "test", windows, 0),
    }


def storage_dtype(model: LoadedModel) -> torch.dtype:
    """Of scales and of what is kept in 16 bits."""
    return torch.float16 if model.layout.storage_dtype == "float16" else torch.bfloat16


def original(model: LoadedModel, site: Site) -> Tensor:
    """The site's weight, (out, in) float32."""
    return read_weight(model.module.get_submodule(site.name), site).detach().float()


def input_moments(model: LoadedModel, tokens: TokenSet, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Site -> second moments of its inputs in the original model."""
    stream, found = ModelStream(model, tokens), {}
    for index in range(model.layout.block_count):
        block = stream.load_block()
        if index in blocks:
            modules = site_modules(block, model.layout, index)
            hessians = collect_block_hessians(stream, block, modules, coarse=True)
            found |= {name: hessians.hessian(name) for name in modules}
        with coarse_products(True):
            stream.advance(block)
    return found


Families = dict[str, list[Option]]
"""Family -> options measured at a site."""


def options_of(site: Site, head_width: int) -> Families:
    """What is measured at a site."""
    bases = [QuantFormat.parse(f"int{bits}-g64") for bits in CODE_BITS]
    families: Families = {"plain": [Plain(fmt) for fmt in PLAIN]}
    families["low rank"] = [LowRank(b, rank, kept) for b in bases for rank in (2, 4, 8, 16) for kept in (8, 16)]
    families["columns"] = [Columns(b, s, kept) for b in bases for s in SHARES for kept in (8, 16)]
    families["weights"] = [Entries(b, s, 8, by) for b in bases for s in SHARES for by in ("magnitude", "group")]
    families["weights"] += [Entries(b, s, 16, "magnitude") for b in bases for s in SHARES]
    families["weights"] += [Entries(b, 0.01, 8, by) for b in bases for by in ("salience", "correction")]
    families["rotated inputs"] = [Rotated(b, "columns") for b in bases]
    families["rotated inputs, by head width"] = [Rotated(b, "columns", head_width) for b in bases]
    families["rotated outputs"] = [Rotated(b, "rows") for b in bases]
    families["both rotated"] = [Rotated(b, "both") for b in bases]
    if site.role in ("v", "o"):
        side = "rows" if site.role == "v" else "columns"
        families["heads rotated"] = [Rotated(b, side, head_width, same=True) for b in bases]
    return families


def measure_site(model: LoadedModel, site: Site, moments: dict[str, Tensor], families: Families) -> dict[str, Any]:
    """Errors of every option of one site."""
    weight, gptq, dtype = original(model, site), Gptq(), storage_dtype(model)
    power = {text: output_error(weight, hessian) for text, hessian in moments.items()}
    rows: list[dict[str, Any]] = []
    start = time.process_time()
    for family, options in families.items():
        for option in options:
            error = option.quantize(weight, moments["calibration"], gptq, dtype) - weight
            errors = {text: output_error(error, hessian) / power[text] for text, hessian in moments.items()}
            bits = option.bits(*weight.shape) / weight.numel()
            rows.append({"family": family, "option": option.name, "base": option.base.name, "bits": bits, **errors})
    return {"site": site.name, "role": site.role, "shape": list(weight.shape), "rows": rows,
            "cpu_seconds": time.process_time() - start}  # fmt: skip


def lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Vertices of the lower convex hull, left to right, as far as errors fall."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through sorted points, the end pieces prolonged."""
    index = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def compare_site(site: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """Each option's ratio to the plain line and to the chord; whether it is a vertex of the hull of everything."""
    plain = [row for row in site["rows"] if row["family"] == "plain"]
    line = sorted((row["bits"], math.log(row[text])) for row in plain if row["option"].endswith("-g64"))
    chord = lower_hull([(row["bits"], row[text]) for row in plain])
    vertices = set(lower_hull([(row["bits"], row[text]) for row in site["rows"]]))
    return [
        {
            **row,
            "to_plain": row[text] / math.exp(interpolate(line, row["bits"])),
            "to_chord": row[text] / max(interpolate(chord, row["bits"]), chord[-1][1]),
            "vertex": (row["bits"], row[text]) in vertices,
        }
        for row in site["rows"]
    ]


def summarise(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over sites of every option, and the share of sites where the option is on the hull."""
    compared = {text: [compare_site(site, text) for site in sites] for text in ("calibration", "validation")}
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for text, found in compared.items():
        for row in (row for site in found for row in site):
            values = rows.setdefault((row["family"], row["option"]), {})
            for name in ("to_plain", "to_chord"):
                values.setdefault(f"{name}_{text}", []).append(math.log(row[name]))
            values.setdefault(f"below_chord_{text}", []).append(float(row["to_chord"] < 1 - 1e-9))
            values.setdefault(f"vertex_{text}", []).append(float(row["vertex"]))
            if text == "calibration":
                values.setdefault("bits", []).append(row["bits"])
    result: list[dict[str, Any]] = []
    for (family, option), values in rows.items():
        if len(values["bits"]) < 2:
            continue  # no spread to read
        entry: dict[str, Any] = {"family": family, "option": option, "n": len(values["bits"])}
        for name, list_of in values.items():
            if name.startswith("to_"):
                spread = statistics.stdev(list_of) / len(list_of) ** 0.5
                entry[name] = [math.exp(statistics.mean(list_of)), math.exp(statistics.mean(list_of)) * spread]
            else:
                entry[name] = statistics.mean(list_of)
        result.append(entry)
    return result


def print_table(model: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        plain, chord, held = row["to_plain_calibration"], row["to_chord_calibration"], row["to_chord_validation"]
        print(
            f"{model:18} {row['family']:30} {row['option']:50} n={row['n']:2} {row['bits']:.3f} bits  plain "
            f"{plain[0]:.3f} ± {plain[1]:.3f}  chord {chord[0]:.3f} ± {chord[1]:.3f}  held out {held[0]:.3f} ± "
            f"{held[1]:.3f}  below {row['below_chord_calibration']:.2f}  vertex {row['vertex_calibration']:.2f}",
            flush=True,
        )


def measure_model(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The sites of three blocks; finished ones are read again."""
    model = load_model(str(model_folder(name)))
    layout, config = model.layout, cast(Any, model.module.config)
    blocks = args.blocks or sorted({0, layout.block_count // 2, layout.block_count - 1})
    head_width = layout.hidden_size // config.num_attention_heads
    moments: dict[str, dict[str, Tensor]] = {}
    found: list[dict[str, Any]] = []
    for site in (site for site in layout.block_sites if site.block_index in blocks):
        families = options_of(site, head_width)
        path = args.work / f"site-{digest_json([layout.digest(), site.name, repr(families)])[:24]}.json"
        if not path.exists():
            if args.finished:
                continue
            if not moments:
                texts = load_texts(model, name, args.windows)
                moments = {text: input_moments(model, texts[text], blocks) for text in ("calibration", "validation")}
            own = {text: hessians[site.name] for text, hessians in moments.items()}
            path.write_text(json.dumps(measure_site(model, site, own, families)))
        found.append(json.loads(path.read_text()))
        print(name, site.name, f"{found[-1]['cpu_seconds']:.1f} CPU s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--blocks", nargs="+", type=int, help="the first, a middle and the last")
    parser.add_argument("--finished", action="store_true", help="report sites that earlier calls finished, no others")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens of validation text")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "more_formats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "more_formats.json"
    for name in args.models:
        sites = measure_model(name, args)
        content = json.loads(path.read_text()) if path.exists() else {}
        rows = summarise(sites)
        print_table(name, rows)
        seconds = sum(site["cpu_seconds"] for site in sites)
        content.setdefault("sites", {})[name] = {
            "machine": describe_machine(), "sites": [site["site"] for site in sites], "cpu_seconds": seconds,
            "rows": rows,
        }  # fmt: skip
        write_results("more_formats", content)


if __name__ == "__main__":
    main()
