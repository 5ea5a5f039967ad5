"""What the knapsack would choose among the options that `more_formats.py` measured, and what it expects to gain.

    OMP_NUM_THREADS=1 python benchmarks/more_formats_choice.py

Quantizes nothing. A knapsack over the measured sites of a model alone, at 2.5, 3, 3.5 and 4 bits per weight of these
sites: plain formats, then plain formats and one family of options, then all families. An option's damage is TDMPQ's for
the format of its codes, times the ratio of their output errors after GPTQ at that site. Plans are made with the errors
on calibration text; their expected damage is given with those and with the errors on validation text, over the same of
the plain plan. Single weights are also offered to every site of the model, at the mean ratio of the measured sites.
Rotations cost no bytes here and are chosen site by site, which no folding allows: a bound. Adds to
results/more_formats.json.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from joint_formats import Bench
from more_formats import MODELS, measure_model
from more_formats_kl import CHOOSING, PLAIN_LIST, Costs
from results_file import FOLDER, REPOSITORY, write_results

from cptquant.allocation.knapsack import solve_knapsack

BITS = (2.5, 3.0, 3.5, 4.0)
ROTATIONS = ("rotated inputs", "rotated inputs, by head width", "rotated outputs", "both rotated")
FAMILIES: dict[str, tuple[str, ...]] = {
    "low rank": ("low rank",),
    "columns": ("columns",),
    "weights": ("weights",),
    "rotated": ROTATIONS,
    "all": ("low rank", "columns", "weights", *ROTATIONS),
}


class SiteChoice:
    """The knapsack over measured sites."""

    def __init__(self, bench: Bench, sites: list[dict[str, Any]]) -> None:
        self._damages, self._sites = bench.table(PLAIN_LIST).damages, sites
        self._weights = sum(math.prod(site["shape"]) for site in sites)

    def choose(self, families: tuple[str, ...], bits: float) -> tuple[list[dict[str, Any]], float, float]:
        """Chosen row of each site, expected damage by calibration and by validation errors."""
        offered = [
            [row for row in site["rows"] if row["family"] in ("plain", *families) and self._is_legal(site, row)]
            for site in self._sites
        ]
        width = max(map(len, offered))
        shape = (len(offered), width)
        sizes, damages = np.zeros(shape, dtype=np.int64), np.full(shape, np.inf)
        for index, (site, rows) in enumerate(zip(self._sites, offered, strict=True)):
            weights = math.prod(site["shape"])
            sizes[index, : len(rows)] = [math.ceil(row["bits"] * weights / 8) for row in rows]
            damages[index, : len(rows)] = [self._damage(site, row, "calibration") for row in rows]
        chosen, _, _ = solve_knapsack(sizes, damages, int(bits * self._weights / 8))
        picked = [rows[int(column)] for rows, column in zip(offered, chosen, strict=True)]
        expected, held_out = (
            sum(self._damage(site, row, text) for site, row in zip(self._sites, picked, strict=True))
            for text in ("calibration", "validation")
        )
        return picked, expected, held_out

    def _is_legal(self, site: dict[str, Any], row: dict[str, Any]) -> bool:
        """Groups of 128 do not divide every row, and only plain formats have them here."""
        return row["base"] in self._damages[site["site"]]

    def _damage(self, site: dict[str, Any], row: dict[str, Any], text: str) -> float:
        plain = next(other for other in site["rows"] if other["option"] == row["base"])
        return self._damages[site["site"]][row["base"]].value * row[text] / plain[text]


def expect_measured(bench: Bench, work: Path) -> list[dict[str, Any]]:
    """Every family at every size."""
    every = argparse.Namespace(blocks=range(bench.model.layout.block_count), finished=True, work=work)
    sites = measure_model(bench.name, every)
    choice, rows = SiteChoice(bench, sites), []
    for bits in BITS:
        _, expected, held_out = choice.choose((), bits)
        for name, families in FAMILIES.items():
            picked, own, own_held_out = choice.choose(families, bits)
            used = [row["option"] for row in picked if row["family"] != "plain"]
            rows.append({"bits": bits, "offered": name, "ratio": own / expected, "n": len(sites),
                         "ratio_held_out": own_held_out / held_out, "sites_with_it": len(used),
                         "used": sorted(used)})  # fmt: skip
            print(bench.name, rows[-1], flush=True)
    return rows


def expect_everywhere(bench: Bench, work: Path) -> list[dict[str, Any]]:
    """Single weights apart at every site of the model."""
    costs, rows = Costs(bench, work), []
    for bits in BITS:
        budget = f"{bits:g}bpw@sites"
        _, size, plain = costs.choose((), budget)
        choices, own_size, damage = costs.choose(CHOOSING["weights apart"], budget)
        used = [option.name for option in choices.values() if option.name != option.base.name]
        rows.append({"bits": bits, "offered": "weights", "ratio": damage / plain, "n": len(choices),
                     "bytes": [size, own_size], "sites_with_it": len(used)})  # fmt: skip
        print(bench.name, rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "more_formats")
    args = parser.parse_args()
    args.windows, args.target = 2, "transformers"
    path = FOLDER / "more_formats.json"
    for name in args.models:
        bench = Bench(name, args)
        found = {"measured_sites": expect_measured(bench, args.work), "all_sites": expect_everywhere(bench, args.work)}
        content = json.loads(path.read_text()) if path.exists() else {}
        content.setdefault("expected", {})[name] = found
        write_results("more_formats", content)


if __name__ == "__main__":
    main()
