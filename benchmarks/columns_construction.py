"""How columns are best corrected: constructions, choices of columns and storages at equal bits; and the score's ratio.

    OMP_NUM_THREADS=1 python benchmarks/columns_construction.py

Eleven sites of two models, second moments of inputs in the original model on 128 x 256 calibration tokens and, for what
nothing was fitted to, on 48 x 256 of validation text. Codes int2, int3, int4-g64 by GPTQ with its descent. Each
option's error tr(E H E') is set over the chord's at its own bits: the lower convex hull of int2 to int6 in groups of 64
and 128, which a knapsack can mix from many sites like this one (`more_formats.py`). Below 1 a knapsack would take it.

    codes first     an ordinary GPTQ, then the least-squares correction of the columns that gain most by it
    OWQ's rule      columns of the largest H_jj |E_j|^2; codes of the others under what the correction leaves
    by error        the same, columns greedily from the error of rounding
    by weight       the same, columns greedily from the weights
    both            the best of three, as the format does it
    a scale a row   "by error", the correction stored with one scale a row
    4 bits          "by error", twice the columns, corrected in 4 bits

`ratio`: error with columns over error without, after GPTQ; `prediction`: how the root that the sensitivity scores use
compares. Geometric means over sites, standard errors over sites. Writes results/columns_construction.json.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from format_options import output_error, round_kept
from machine import describe_machine
from more_formats import PLAIN, input_moments, interpolate, load_texts, lower_hull, original, storage_dtype
from results_file import model_folder, write_results
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.models.load import load_model
from cptquant.quantizers.corrected import ColumnSearch, left_over, rank_columns, round_correction
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.rtn import Rtn

SITES = {
    "reference-llama": {(0, "q"), (0, "o"), (0, "gate"), (4, "q"), (4, "o"), (4, "down")},
    "reference-opt": {(0, "q"), (0, "up"), (3, "v"), (3, "o"), (3, "down")},
}
BASES = tuple(QuantFormat.parse(f"int{bits}-g64") for bits in (2, 3, 4))
SHARES = (10, 20, 40)
_UNDAMPED = replace(Gptq(), damping=0.0)


class SiteProblem:
    """One matrix with the second moments of its inputs, and the codes that plain formats get."""

    def __init__(self, weight: Tensor, moments: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.weight, self.moments, self.dtype = weight, moments, dtype
        self.damped = factor_hessian(moments["calibration"], Gptq().damping, by_activation=False).damped
        self.power = {text: output_error(weight, hessian) for text, hessian in moments.items()}
        self.plain = {fmt.name: self.codes(fmt) for fmt in PLAIN}
        self.chords = {text: self._chord(text) for text in moments}

    def codes(self, fmt: QuantFormat) -> Tensor:
        """GPTQ's values, (out, in)."""
        return Gptq()(self.weight, self.moments["calibration"], fmt, self.dtype).weight.dequantize()

    def error(self, values: Tensor, text: str) -> float:
        """Relative output error."""
        return output_error(values - self.weight, self.moments[text]) / self.power[text]

    def to_chord(self, values: Tensor, size_bytes: int) -> dict[str, float]:
        """Error over the chord's at as many bits, by text."""
        bits = 8 * size_bytes / self.weight.numel()
        return {
            text: self.error(values, text) / max(interpolate(chord, bits), chord[-1][1])
            for text, chord in self.chords.items()
        }

    def _chord(self, text: str) -> list[tuple[float, float]]:
        size = self.weight.shape
        return lower_hull(
            [(fmt.bits_per_weight(*size), self.error(self.plain[fmt.name], text)) for fmt in PLAIN]
        )  # fmt: skip

    def under_the_rest(self, base: QuantFormat, columns: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes of the other columns under what the correction of these leaves; the correction, stored in some way."""
        damped, weight = self.damped, self.weight
        others = torch.ones(len(damped), dtype=torch.bool).index_fill_(0, columns, False).nonzero().flatten()
        carried = torch.linalg.solve(damped[columns][:, columns], damped[columns][:, others])
        moments = left_over(damped, columns, others, carried)
        kept = weight.index_fill(1, columns, 0.0)
        values = _UNDAMPED(kept, moments, base, self.dtype).weight.dequantize()
        error = weight - values
        values[:, columns] += store(error[:, columns] + error[:, others] @ carried.t())
        return values

    def eight_bits(self, wanted: Tensor) -> Tensor:
        """Stored as the format does."""
        return round_correction(wanted, torch.arange(wanted.shape[1]), self.dtype).values()

    def four_bits(self, wanted: Tensor) -> Tensor:
        """A code of 4 bits, a scale a column."""
        rows = Rtn()(wanted.t().contiguous(), QuantFormat.parse("int4-channel"), self.dtype)
        return rows.dequantize().t()


def measure_base(problem: SiteProblem, base: QuantFormat) -> dict[str, dict[str, float]]:
    """Every option at 2 % of the columns; name -> text -> error over the chord's."""
    weight, damped, (rows, width) = problem.weight, problem.damped, problem.weight.shape
    fmt = base.with_columns(20)
    count, size = fmt.column_count(width), fmt.stored_bytes(rows, width)
    rounding = Rtn()(weight, base, problem.dtype, importance=damped.diagonal()).dequantize() - weight
    found: dict[str, dict[str, float]] = {}

    def note(name: str, columns: Tensor) -> None:
        values = problem.under_the_rest(base, columns.sort().values, problem.eight_bits)
        found[name] = problem.to_chord(values, size)

    codes = problem.plain[base.name].clone()
    columns = rank_columns(weight - codes, damped, count)
    gained = ((weight - codes) @ damped)[:, columns]
    wanted = torch.linalg.solve(damped[columns][:, columns], gained.t()).t()
    codes[:, columns] += problem.eight_bits(wanted)
    found["codes first"] = problem.to_chord(codes, size)
    note("OWQ's rule", (rounding.square().sum(dim=0) * damped.diagonal()).topk(count).indices)
    by_error = rank_columns(rounding, damped, count)
    note("by error", by_error)
    note("by weight", rank_columns(weight, damped, count))
    found["both"] = problem.to_chord(problem.codes(fmt), size)
    per_row = problem.under_the_rest(base, by_error.sort().values, lambda wanted: round_kept(wanted, 8, problem.dtype))
    found["a scale a row"] = problem.to_chord(per_row, base.stored_bytes(rows, width) + rows * (count + 2) + 2 * count)
    twice = rank_columns(rounding, damped, 2 * count).sort().values
    narrow = problem.under_the_rest(base, twice, problem.four_bits)
    found["4 bits"] = problem.to_chord(narrow, base.stored_bytes(rows, width) + rows * count + 8 * count)
    return found


def measure_shares(problem: SiteProblem, base: QuantFormat) -> list[dict[str, Any]]:
    """The format at 1, 2 and 4 %: error over the chord's, error over the codes' alone, and what the score expects."""
    search, found = ColumnSearch(problem.weight, problem.damped, problem.dtype), []
    alone = problem.error(problem.plain[base.name], "calibration")
    for share in SHARES:
        fmt = base.with_columns(share)
        values = problem.codes(fmt)
        found.append({
            "share": share, **problem.to_chord(values, fmt.stored_bytes(*problem.weight.shape)),
            "ratio": problem.error(values, "calibration") / alone, "expected": search.find(fmt).ratio ** 0.5,
        })  # fmt: skip
    return found


def mean_of(values: list[float]) -> list[float]:
    """Geometric mean and its standard error."""
    logs = [math.log(value) for value in values]
    mean = math.exp(statistics.mean(logs))
    return [mean, mean * statistics.stdev(logs) / len(logs) ** 0.5]


def summarise(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sites, and how well the score's root predicts."""
    options: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for base in sites[0]["options"]:
        for name in sites[0]["options"][base]:
            rows = [site["options"][base][name] for site in sites]
            options[f"{base} {name}"] = {text: mean_of([row[text] for row in rows]) for text in rows[0]} | {
                "below": sum(row["validation"] < 1 for row in rows)
            }
        for place, share in enumerate(SHARES):
            rows = [site["shares"][base][place] for site in sites]
            shares[f"{base}-c{share / 10:g}"] = {
                text: mean_of([row[text] for row in rows]) for text in ("calibration", "validation", "ratio")
            } | {"below": sum(row["validation"] < 1 for row in rows)}
    every = [row for site in sites for rows in site["shares"].values() for row in rows]
    off = [math.log(row["expected"] / row["ratio"]) for row in every]
    slope = sum(2 * math.log(row["expected"]) * math.log(row["ratio"]) for row in every)
    slope /= sum((2 * math.log(row["expected"])) ** 2 for row in every)
    prediction = {"n": len(every), "mean_log": statistics.mean(off), "sd_log": statistics.stdev(off), "slope": slope}
    return {"n": len(sites), "options": options, "shares": shares, "prediction": prediction}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    sites: list[dict[str, Any]] = []
    for name, wanted in SITES.items():
        model = load_model(str(model_folder(name)))
        texts = load_texts(model, name, 48)
        blocks = sorted({block for block, _ in wanted})
        moments = {text: input_moments(model, texts[text], blocks) for text in ("calibration", "validation")}
        for site in model.layout.block_sites:
            if (site.block_index, site.role) not in wanted:
                continue
            start, own = time.process_time(), {text: found[site.name] for text, found in moments.items()}
            problem = SiteProblem(original(model, site), own, storage_dtype(model))
            sites.append({
                "model": name, "site": site.name,
                "options": {base.name: measure_base(problem, base) for base in BASES},
                "shares": {base.name: measure_shares(problem, base) for base in BASES},
                "cpu_seconds": time.process_time() - start,
            })  # fmt: skip
            print(site.name, f"{sites[-1]['cpu_seconds']:.1f} CPU s", flush=True)
    summary = summarise(sites)
    for part in ("options", "shares"):
        for key, row in summary[part].items():
            print(
                f"{key:26}",
                {name: value if name == "below" else [round(v, 3) for v in value] for name, value in row.items()},
            )
    print(summary["prediction"])
    write_results("columns_construction", {"machine": describe_machine(), **summary, "sites": sites})


if __name__ == "__main__":
    main()
