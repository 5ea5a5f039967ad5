"""How a product of low rank is best made beside the codes, at equal bits; and what the scores expect of it.

    OMP_NUM_THREADS=1 python benchmarks/low_rank_construction.py

The sites, texts and chord of `columns_construction.py`. Each option's error tr(E H E') is set over the chord's at its
own bits: below 1 a knapsack of such sites would take it. All products are stored as the format does it: 8 bits, one
scale a product.

    codes first       GPTQ, then the SVD of what it leaves (LQER, SLiM)
    weights first     the weights' leading product is taken out, then GPTQ under all of H (SVDQuant's order)
    by error          codes under S, directions of the error of rounding to nearest, weights left whole
    product last      as the format does it, without descent of the codes after the product
    as the format     weights' directions taken out, codes under S, both factors fitted again, descent

`prediction`: what the scores expect of the codes' error after GPTQ over what it was. Geometric means over sites,
standard errors over sites. Writes results/low_rank_construction.json.
"""

import argparse
import math
import statistics
import time
from typing import Any

import torch
from columns_construction import BASES, SITES, SiteProblem, mean_of
from machine import describe_machine
from more_formats import input_moments, load_texts, original, storage_dtype
from results_file import model_folder, write_results
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.models.load import load_model
from cptquant.packing.low_rank import RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.low_rank import LowRankSearch, quantize_with_low_rank
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.corrections import low_rank_power

RANKS = (1, 2, 4, 8)


def fitted(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, B rounded to 8 bits, that leave least of tr((error - A B) H (error - A B)')."""
    root = torch.linalg.cholesky(hessian)
    rows = torch.linalg.svd(error @ root, full_matrices=False).Vh[:rank]
    right = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    right = (right / right.abs().amax(dim=1, keepdim=True) * 127).round() / RIGHT_UNIT
    return left_for(error, hessian, right), right


def left_for(error: Tensor, hessian: Tensor, right: Tensor) -> Tensor:
    """The best A for given rows."""
    moved = right @ hessian
    return torch.linalg.solve(moved @ right.t(), moved @ error.t()).t()


def stored(base: QuantizedWeight, left: Tensor, right: Tensor, fmt: QuantFormat) -> Tensor:
    """Values once A has 8 bits."""
    rounded = Rtn()(left.t().contiguous(), QuantFormat.parse("int8-channel"), base.scales.dtype)
    assert isinstance(rounded, QuantizedWeight)
    codes = (right * RIGHT_UNIT).to(torch.int8)
    product = LowRankCorrection(rounded.codes.t().contiguous(), codes, rounded.scales.flatten())
    return CorrectedWeight(fmt, base, product).dequantize()


def constructions(problem: SiteProblem, fmt: QuantFormat) -> dict[str, Tensor]:
    """Option -> values."""
    weight, damped, moments = problem.weight, problem.damped, problem.moments["calibration"]

    def codes(values: Tensor, metric: Tensor) -> QuantizedWeight:
        made = Gptq()(values, metric, fmt.base, problem.dtype).weight
        assert isinstance(made, QuantizedWeight)
        return made

    def finish(base: QuantizedWeight) -> Tensor:
        return stored(base, *fitted(weight - base.dequantize(), damped, fmt.rank), fmt)

    first = codes(weight, moments)
    left, right = fitted(weight, damped, fmt.rank)
    rounding = Rtn()(weight, fmt.base, problem.dtype, importance=damped.diagonal()).dequantize()
    _, directions = fitted(weight - rounding, damped, fmt.rank)
    moved = directions @ damped
    under = damped - moved.t() @ torch.linalg.solve(moved @ directions.t(), moved)
    by_error = codes(weight, (under + under.t()) / 2)
    error = weight - by_error.dequantize()
    undescended = quantize_with_low_rank(weight, damped, fmt, problem.dtype, codes)
    return {
        "codes first": finish(first),
        "weights first": finish(codes(weight - left @ right, moments)),
        "by error": stored(by_error, left_for(error, damped, directions), directions, fmt),
        "product last": undescended.dequantize(),
        "as the format": problem.codes(fmt),
    }


def measure_site(problem: SiteProblem) -> list[dict[str, Any]]:
    """Every width and rank."""
    search, rows = LowRankSearch(problem.weight, problem.damped, problem.dtype), list[dict[str, Any]]()
    for base in BASES:
        alone = problem.error(problem.plain[base.name], "calibration")
        for rank in RANKS:
            fmt = QuantFormat.parse(f"{base.name}-r{rank}")
            values, size = constructions(problem, fmt), fmt.stored_bytes(*problem.weight.shape)
            rows.append({
                "format": fmt.name, "to_chord": {name: problem.to_chord(v, size) for name, v in values.items()},
                "ratio": problem.error(values["as the format"], "calibration") / alone,
                "expected": search.ratio(rank) ** low_rank_power(fmt),
            })  # fmt: skip
    return rows


def summarise(sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over sites, and how well the scores predict."""
    options: dict[str, Any] = {}
    for place, first in enumerate(sites[0]["rows"]):
        for name in first["to_chord"]:
            found = [site["rows"][place]["to_chord"][name] for site in sites]
            options[f"{first['format']} {name}"] = {
                text: mean_of([row[text] for row in found]) for text in ("calibration", "validation")
            } | {"below": sum(row["validation"] < 1 for row in found)}
    off = [math.log(row["expected"] / row["ratio"]) for site in sites for row in site["rows"]]
    prediction = {"n": len(off), "mean_log": statistics.mean(off), "sd_log": statistics.stdev(off)}
    return {"n": len(sites), "options": options, "prediction": prediction}


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
            rows = measure_site(SiteProblem(original(model, site), own, storage_dtype(model)))
            seconds = time.process_time() - start
            sites.append({"model": name, "site": site.name, "rows": rows, "cpu_seconds": seconds})
            print(site.name, f"{seconds:.1f} CPU s", flush=True)
    summary = summarise(sites)
    for key, row in summary["options"].items():
        print(
            f"{key:32}",
            [round(x, 3) for x in row["calibration"]],
            [round(x, 3) for x in row["validation"]],
            row["below"],
        )
    print(summary["prediction"])
    write_results("low_rank_construction", {"machine": describe_machine(), **summary, "sites": sites})


if __name__ == "__main__":
    main()
