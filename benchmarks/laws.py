"""What the scaling laws are worth: recovery of planted laws, and data nobody here made.

    OMP_NUM_THREADS=1 python benchmarks/laws.py                    # every part; about ten CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/laws.py recovery --seeds 5

Parts: recovery (50 simulated D-CPT grids: parameter errors, held-out ratios, coverage of intervals, time of a fit),
extension (general loss that rises with D), chinchilla, overtraining, critical_ratio, trajectories. The published points
are expected in ../shared/data/laws beside the repository; parts without their data say so. Each part replaces its own
entry of results/laws.json.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from machine import describe_machine
from results_file import FOLDER, SHARED, write_results

from cptquant.laws.bootstrap import bootstrap, interval, new_run_losses, scatter, widening
from cptquant.laws.compare import held_out_predictions, make_folds
from cptquant.laws.fit import fit
from cptquant.laws.fit_law import FitOptions, fit_loss, problem_of, r_squared
from cptquant.laws.forms import Points
from cptquant.laws.methods import FORMS
from cptquant.laws.observations import Observations, Reading, read_observations
from cptquant.laws.simulate import DOMAIN, GENERAL, Simulation, planted_losses, simulate

L3 = FORMS["dcpt"]
POINTS = SHARED / "data/laws"
PUBLISHED_CHINCHILLA = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def summary(values: list[float] | np.ndarray) -> dict[str, float]:
    array = np.asarray(values, dtype=float)
    stderr = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else float("nan")
    return {"mean": float(array.mean()), "stderr": stderr, "median": float(np.median(array)), "n": len(array)}


def recovery(seeds: int) -> dict[str, Any]:
    """50 grids of 3 sizes x 9 ratios x 20 evaluations, noise 0.003 nats a row; and the same with noise by run."""
    return {
        "noise by row": _recover(seeds, Simulation(noise=0.003)),
        "noise by run and row": _recover(max(2, seeds // 2), Simulation(noise=0.002, run_noise=0.002)),
    }


def _recover(seeds: int, kind: Simulation) -> dict[str, Any]:
    errors: list[float] = []
    parameter_hits: list[float] = []
    mean_hits: list[float] = []
    new_hits: list[float] = []
    r2: list[float] = []
    seconds: list[float] = []
    for seed in range(seeds):
        data = simulate(replace(kind, seed=seed))
        rng = np.random.default_rng(10_000 + seed)
        size, tokens, ratio = rng.uniform(0.5e9, 4e9, 40), rng.uniform(2e9, 26e9, 40), rng.uniform(0.03, 0.97, 40)
        truth = dict(zip(("general_nll", "domain_nll"), planted_losses(size, tokens, ratio), strict=True))
        for name, planted in (("general_nll", GENERAL), ("domain_nll", DOMAIN)):
            problem = problem_of(data, L3, name, FitOptions())
            begin = time.process_time()
            theta = fit(problem, starts=40 if seed < 5 else 6, seed=seed).theta
            if seed < 5:
                seconds.append(time.process_time() - begin)
            draws, factor = bootstrap(problem, theta, draws=100, seed=seed), widening(problem)
            true_theta = L3.vector(planted)
            errors += list(np.abs(L3.natural(theta) / L3.natural(true_theta) - 1))
            low, high = interval(theta, draws, factor)
            parameter_hits.append(float(np.mean((low <= true_theta) & (true_theta <= high))))
            share = 1 - ratio if name == "general_nll" else ratio
            points = Points(size / 1e9, tokens / 1e9, share)
            value, samples = L3.log_loss(theta[None], points)[0][0], L3.log_loss(draws, points)[0]
            low, high = np.exp(interval(value, samples, factor))
            mean_hits.append(float(np.mean((low <= truth[name]) & (truth[name] <= high))))
            seen = truth[name] + rng.normal(0, np.hypot(kind.noise, kind.run_noise), len(size))
            low, high = np.exp(new_run_losses(value, samples, factor, scatter(problem, theta)))
            new_hits.append(float(np.mean((low <= seen) & (seen <= high))))
            if seed < 3:
                folds = make_folds(data, "r")
                predicted = held_out_predictions(data, L3, name, folds, FitOptions(starts=3))
                held = np.isfinite(predicted)
                r2.append(r_squared(data.losses[name][held], (predicted - data.losses[name])[held]))
        print(f"recovery {kind}: seed {seed} done", flush=True)
    return {
        "seeds": seeds,
        "noise": kind.noise,
        "run_noise": kind.run_noise,
        "relative_parameter_error": summary(errors),
        "coverage_of_parameters": summary(parameter_hits),
        "coverage_of_the_law_at_new_points": summary(mean_hits),
        "coverage_of_new_observations": summary(new_hits),
        "held_out_ratio_r2": {"lowest": min(r2, default=float("nan")), **summary(r2)},
        "fit_40_starts_cpu_seconds": {"max": max(seconds), **summary(seconds)},
    }


def extension(seeds: int) -> dict[str, Any]:
    """General loss that rises with D at large r, by a mechanism of no form; inner ratios held out one at a time.

    Errors are split into held-out runs whose noiseless general loss rises from first to last evaluation, and the rest.
    """
    names = ("dcpt", "dcpt-inflection", "dcpt-forgetting")
    table: dict[str, Any] = {}
    for forgetting in (0.4, 0.15, 0.0):
        rising_errors: dict[str, list[float]] = {name: [] for name in names}
        other_errors: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(max(2, seeds // 10)):
            data = simulate(Simulation(forgetting=forgetting, seed=100 + seed))
            clean = planted_losses(data.size, data.tokens, np.asarray(data.ratio), forgetting)[0]
            first, last = np.flatnonzero(np.diff(data.run, prepend=-1)), np.flatnonzero(np.diff(data.run, append=99))
            rising = (clean[last] > clean[first])[data.run]
            folds = make_folds(data, "r")
            for name in names:
                predicted = held_out_predictions(data, FORMS[name], "general_nll", folds, FitOptions(starts=4))
                error = np.abs(predicted - data.losses["general_nll"])
                for mask, errors in ((rising, rising_errors[name]), (~rising, other_errors[name])):
                    rows = mask & np.isfinite(predicted)
                    errors += [float(error[rows & (data.run == run)].mean()) for run in np.unique(data.run[rows])]
            print(f"extension {forgetting}: seed {seed} done", flush=True)
        table[f"forgetting {forgetting} nats"] = {
            name: {
                "mae where loss rises": summary(rising_errors[name]) if rising_errors[name] else None,
                "mae elsewhere": summary(other_errors[name]),
            }
            for name in names
        } | {"grids": max(2, seeds // 10), "first_seed": 100}
    return table


def chinchilla(_seeds: int) -> dict[str, Any]:
    """Refit of the digitised Chinchilla points, five highest losses dropped, as arXiv 2404.10102 does."""
    data = read_observations(POINTS / "chinchilla_epoch_points.csv", Reading(columns={"nll": "loss"}))
    result: dict[str, Any] = {}
    for dropped in (5, 0):
        fitted, _ = fit_loss(data, FORMS["chinchilla"], "nll", FitOptions(drop_highest=dropped, draws=400))
        draws = np.array(fitted.draws)
        names = [p.name for p in fitted.parameters]
        values = np.array([[p.value for p in fitted.parameters], *draws])
        for amplitude, exponent in (("A", "alpha"), ("B", "beta")):  # from billions to parameters and tokens
            values[:, names.index(amplitude)] *= 1e9 ** values[:, names.index(exponent)]
        logs = np.log(values)
        low, high = np.exp(np.quantile(logs[0] + fitted.widening * (logs[1:] - logs[0]), (0.05, 0.95), axis=0))
        result[f"{dropped} dropped"] = {
            name: {
                "value": values[0, k], "low": low[k], "high": high[k], "published": PUBLISHED_CHINCHILLA[name],
                "relative_difference": values[0, k] / PUBLISHED_CHINCHILLA[name] - 1,
                "published_inside": bool(low[k] <= PUBLISHED_CHINCHILLA[name] <= high[k]),
            }
            for k, name in enumerate(names)
        }  # fmt: skip
    return result


def _table(name: str) -> list[dict[str, str]]:
    text = (POINTS / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in text if not line.startswith("#")))


def overtraining(_seeds: int) -> dict[str, Any]:
    """Chinchilla's law fitted on small or shortly trained models predicts larger and overtrained ones (2403.08540)."""
    rows = _table("overtrain_gadre2024_losses.csv")
    result: dict[str, Any] = {}
    for train_set in sorted({row["train_set"] for row in rows}):
        for eval_set in ("c4_val", "openlm"):
            chosen = [row for row in rows if row["train_set"] == train_set and row["eval_set"] == eval_set]
            data = _scratch_runs(chosen)
            multiple = np.array([float(row["tok_mult"]) for row in chosen])
            for label, held in (
                ("largest size", data.size == data.size.max()),
                ("beyond 2x the largest fitted tokens per parameter", multiple > 20),
            ):
                if held.sum() < 2 or (~held).sum() < 8:
                    continue
                problem = problem_of(data.take(~held), FORMS["chinchilla"], "nll", FitOptions())
                theta = fit(problem, starts=40).theta
                predicted = FORMS["chinchilla"].loss(theta[None], data.points("nll").take(held))[0]
                relative = np.abs(predicted / data.losses["nll"][held] - 1)
                result[f"{train_set}, {eval_set}, held out: {label}"] = {
                    "fitted": int((~held).sum()), "relative_error": summary(relative), "worst": float(relative.max()),
                }  # fmt: skip
    return result


def _scratch_runs(rows: list[dict[str, str]]) -> Observations:
    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    stderr = (column("ci_hi") - column("ci_lo")) / 3.92
    return Observations(
        "overtrain_gadre2024_losses.csv", column("N"), column("D"), None, None, np.arange(len(rows)),
        ("",) * len(rows), {"nll": column("loss")}, {"nll": np.sqrt(stderr**2 + 0.005**2)},
    )  # fmt: skip


def critical_ratio(_seeds: int) -> dict[str, Any]:
    """Domain loss against share fitted on R >= 1/3; R = 1/4 was printed in the paper and is not in the fit."""
    measured = {"460M": 1.5561, "940M": 1.4538, "1.6B": 1.3994, "3.1B": 1.3305}
    theirs = {"460M": 1.5566, "940M": 1.4546, "1.6B": 1.3999, "3.1B": 1.3303}
    rows = _table("cmr_table2_domain_loss_vs_ratio.csv")
    result: dict[str, Any] = {}
    for model in measured:
        chosen = [row for row in rows if row["model"] == model]
        ratio = np.array([float(row["R"]) for row in chosen])
        ones = np.full(len(ratio), 1e9)
        data = Observations(
            "cmr_table2", ones, ones, ratio, None, np.arange(len(ratio)), ("",) * len(ratio),
            {"domain_nll": np.array([float(row["loss"]) for row in chosen])},
        )  # fmt: skip
        theta = fit(problem_of(data, FORMS["cmr"], "domain_nll", FitOptions()), starts=40).theta
        at = replace(data.take(np.array([0])), ratio=np.array([0.25])).points("domain_nll")
        predicted = float(FORMS["cmr"].loss(theta[None], at)[0, 0])
        result[model] = {
            "s": float(theta[2]), "predicted": predicted, "measured": measured[model],
            "error": predicted - measured[model], "error_of_the_paper": theirs[model] - measured[model],
        }  # fmt: skip
    return result


def trajectories(_seeds: int) -> dict[str, Any]:
    """Delphi mid-training at 3.4B and learning-rate factor 0.5, shares .33, .5, .67: what they hold and what not."""
    path = POINTS / "delphi_midtrain_trajectory_sample.csv"
    names = {"N": "N_total", "D": "tokens", "r": "r_math", "domain_nll": "math_loss"}
    half = [row["lr_factor"] == "0.5" for row in _table(path.name) if float(row["tokens"]) > 0]
    data = read_observations(path, Reading(columns=names)).take(np.array(half))
    held = {"A": 0.0, "alpha": 1.0}
    options = FitOptions(fixed=held)
    fitted, _ = fit_loss(data, L3, "domain_nll", options)
    result: dict[str, Any] = {
        "all points": {
            "rows": fitted.rows, "r2": fitted.r2, "mae": fitted.mae_nats,
            "statuses": [status.value for status in fitted.statuses],
            "not_identified": [p.name for p in fitted.parameters if not p.identified],
            "at_bound": [p.name for p in fitted.parameters if p.at_bound],
        }
    }  # fmt: skip
    ratio = np.asarray(data.ratio)
    early = data.tokens < data.tokens.max() / 2
    loose = replace(options, fixed={**held, "gamma": 0.5, "eps": 0.05})
    for label, mask, chosen in (
        ("fit shares .33 and .67, predict .5 (gamma, eps held)", ratio != 0.5, loose),
        ("fit the first half of the tokens, predict the second", early, options),
    ):
        problem = problem_of(data.take(mask), _without_ratio_check(chosen), "domain_nll", chosen)
        theta = fit(problem, starts=40).theta
        error = L3.loss(theta[None], data.points("domain_nll").take(~mask))[0] - data.losses["domain_nll"][~mask]
        result[label] = {
            "mae": float(np.abs(error).mean()), "bias": float(error.mean()), "rows": int((~mask).sum()),
            "r2": r_squared(data.losses["domain_nll"][~mask], error),
        }  # fmt: skip
    return result


def _without_ratio_check(_options: FitOptions) -> Any:
    """Two ratios are refused by `problem_of`; here that is the point, so r is declared unneeded."""
    return replace(L3, needs=("N", "D"))


PARTS: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "chinchilla": (chinchilla, "chinchilla_epoch_points.csv"),
    "overtraining": (overtraining, "overtrain_gadre2024_losses.csv"),
    "critical_ratio": (critical_ratio, "cmr_table2_domain_loss_vs_ratio.csv"),
    "trajectories": (trajectories, "delphi_midtrain_trajectory_sample.csv"),
    "extension": (extension, ""),
    "recovery": (recovery, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--seeds", type=int, default=50)
    options = parser.parse_args()
    path = FOLDER / "laws.json"
    for name in options.parts or PARTS:
        run, needed = PARTS[name]
        if needed and not (POINTS / needed).exists():
            print(f"{name}: {needed} is not in {POINTS}; left out")
            continue
        begin = time.process_time()
        found = run(options.seeds)
        results = json.loads(path.read_text()) if path.exists() else {}
        results["machine"] = describe_machine()
        results[name] = {"cpu_seconds": round(time.process_time() - begin, 1), **found}
        write_results("laws", results)
        print(json.dumps({name: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
