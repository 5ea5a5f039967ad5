"""Is the frontier's band honest? Predicted against measured loss at budgets that the band was not fitted on.

    python benchmarks/frontier.py                          # goes on where an earlier call stopped
    python benchmarks/frontier.py --models embedded:opt-mini --quantizers gptq

Each model is measured once (cptquant's defaults), its frontier traced, and the plan of every budget is quantized and
judged on held-out text. Four bands are checked, none of which saw the checked point: from all other points of the model
(`others`, what frontier.json holds), from the first, a middle and the last point (`three`), from no point of the model
(`prior`; the model's family is left out of the prior), and from all other points without a prior (`no prior`).
Reference models and their text are expected in ../shared; without them only the embedded model is run.
Writes results/frontier.json.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine
from results_file import FOLDER, REPOSITORY, SHARED, model_folder, write_results

from cptquant.core.forecast import Interval
from cptquant.core.frontier import BandPrior, BudgetPoint, DamageCalibration, Frontier
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.laws.frontier_band import calibrate, vague_prior
from cptquant.stages.calibration import choose_prior
from cptquant.stages.frontier import FrontierRequest, frontier_model

MODELS = ("embedded:opt-mini", "reference-llama", "reference-opt")
QUANTIZERS = ("gptq", "rtn")
BUDGETS = tuple(f"{bits}bpw@sites" for bits in ("2.4", "3", "3.5", "4", "5", "6"))
Band = Callable[[BudgetPoint], Interval | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None)
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "frontier", help="run folders")
    args = parser.parse_args()
    models = args.models or [name for name in MODELS if name.startswith("embedded:") or model_folder(name).is_dir()]
    path = FOLDER / "frontier.json"
    before = json.loads(path.read_text())["runs"] if path.exists() else []
    runs: dict[str, dict[str, Any]] = {f"{run['model']} {run['quantizer'].split()[0]}": run for run in before}
    for name in models:
        for quantizer in args.quantizers:
            folder = args.work / f"{name.replace(':', '-')}-{quantizer}"
            made = describe_run(name, trace(name, quantizer, folder), folder)
            runs[f"{name} {quantizer}"] = made
            found = coverage(list(runs.values()))
            write_results("frontier", {"machine": describe_machine(), "coverage": found, "runs": list(runs.values())})
            print(name, quantizer, coverage([made]), flush=True)
    print(path, coverage(list(runs.values())))


def trace(name: str, quantizer: str, folder: Path) -> Frontier:
    """The frontier with every budget measured; texts of the reference models are general English."""
    text = SHARED / "data" / "text" / "general"
    own = name.startswith("embedded:")
    texts = {} if own else {"calibration": str(text / "train.txt"), "eval_text": str(text / "test.txt")}
    request = FrontierRequest(budgets=BUDGETS, measure=len(BUDGETS))
    model = name if own else str(model_folder(name))
    return frontier_model(model, folder, request, quantizer=quantizer, **texts)


def describe_run(name: str, frontier: Frontier, folder: Path) -> dict[str, Any]:
    """One model and quantizer: every point, with the four bands and whether the measured loss lies inside."""
    bands = find_bands(frontier, folder)
    rows: list[dict[str, Any]] = []
    for point in frontier.points:
        assert point.measured is not None
        row: dict[str, Any] = {
            "budget": point.budget,
            "bits_per_weight_sites": point.bits_per_weight_sites,
            "damage": point.damage,
            "kl_nats_per_token": point.measured.value,
            "stderr": point.measured.stderr,
            "n": point.measured.n,
        }
        for label, band in bands.items():
            found = band(point)
            if found is not None:
                inside = found.low <= point.measured.value <= found.high
                row[label] = {**found.model_dump(), "inside": inside}
        rows.append(row)
    return {
        "model": name,
        "quantizer": frontier.quantizer,
        "text": frontier.text,
        "vertices": len(frontier.vertices),
        "points": rows,
    }


def find_bands(frontier: Frontier, folder: Path) -> dict[str, Band]:
    """Label -> the band at a point, from calibrations that never saw it."""
    layout, table = ModelLayout.load(folder / "layout.json"), SensitivityTable.load(folder / "sensitivity.json")
    plans = [Plan.load(folder / point.plan_file).quant_formats for point in frontier.points]
    prior = choose_prior(layout, table, frontier.quantizer, plans)
    assert prior is not None
    vague = vague_prior(sorted(point.damage for point in frontier.points)[len(frontier.points) // 2])
    places = {0, len(frontier.points) // 2, len(frontier.points) - 1}
    three = [point for index, point in enumerate(frontier.points) if index in places]
    return {
        "others": lambda point: point.check,
        "three": lambda point: None if point in three else _predict(_fit(three, prior), point),
        "prior": lambda point: _predict(_fit([], prior), point),
        "no prior": lambda point: _predict(_fit([p for p in frontier.points if p is not point], vague), point),
    }


def _fit(points: Sequence[BudgetPoint], prior: BandPrior) -> DamageCalibration | None:
    return calibrate([p.damage for p in points], [p.measured.value for p in points if p.measured], prior)


def _predict(calibration: DamageCalibration | None, point: BudgetPoint) -> Interval | None:
    return None if calibration is None else calibration.predict(point.damage)


def coverage(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each band: points inside, points checked, and the median factor between the value and the band's end."""
    found: dict[str, Any] = {}
    for label in ("others", "three", "prior", "no prior"):
        rows = [row[label] for run in runs for row in run["points"] if label in row]
        factors = sorted(row["high"] / row["value"] for row in rows)
        misses = sorted(
            abs(math.log(row["kl_nats_per_token"] / row[label]["value"]))
            for run in runs for row in run["points"] if label in row
        )  # fmt: skip
        found[label] = {
            "inside": sum(row["inside"] for row in rows),
            "checked": len(rows),
            "median_band_factor": round(factors[len(factors) // 2], 3) if factors else None,
            "median_miss_factor": round(math.exp(misses[len(misses) // 2]), 3) if misses else None,
        }
    return found


if __name__ == "__main__":
    main()
