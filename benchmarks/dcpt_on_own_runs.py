"""The D-CPT Law on runs of our own: held-out shares and sizes, and its two uses carried out.

    python benchmarks/dcpt_on_own_runs.py build/dcpt_sweep/sweep --work build/dcpt_sweep
    python benchmarks/dcpt_on_own_runs.py build/dcpt_sweep/sweep --work build/dcpt_sweep --parts fits

The sweep is that of runs/dcpt_sweep.sh. Parts: fits (each form on each domain; inner shares left out one at a time,
sizes left out one at a time, the largest also by itself; about two CPU minutes) and uses (usage 1: lowest domain loss
with the general loss at most 3 % up; usage 2: domain text that ends with the run; the recommended share and its
neighbours are trained, three runs a use and domain; about eight CPU minutes on one thread). Writes
results/dcpt_on_own_runs.json and docs/dcpt-own-runs.png.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from results_file import REPOSITORY, write_results

from cptquant.core.laws import LawFit
from cptquant.core.sweep import GENERAL
from cptquant.core.sweep_record import SweepRecord
from cptquant.laws.compare import compare_forms, held_out_predictions, make_folds
from cptquant.laws.fit_law import FitOptions, fit_law, r_squared
from cptquant.laws.methods import FORMS
from cptquant.laws.observations import Observations, read_observations
from cptquant.laws.optimum import best_ratio_for_domain_tokens, best_ratio_under_limit
from cptquant.laws.predict import predict_law
from cptquant.stages.sweep_point import RunChoice, SweepFolder, train_point

FORM_NAMES = ("dcpt", "dcpt-forgetting", "dcpt-inflection", "l1", "l2", "chinchilla")
OPTIONS = FitOptions(starts=40, draws=200)
LIMIT = 0.03
STEP = 0.1
DOMAIN_TOKENS = 100_000
"""Usage 2: a domain with as many tokens; D = domain tokens / r stays below what the sweep ran for r >= 0.33."""


def fits(data: Observations) -> dict[str, Any]:
    """Every form on one domain's runs, judged on what it has not seen."""
    found: dict[str, Any] = {}
    for name in FORM_NAMES:
        form = FORMS[name]
        law = fit_law(data, form, OPTIONS)
        entry: dict[str, Any] = {
            loss: {
                "status": [status.value for status in fit.statuses], "r2": fit.r2, "mae_nats": fit.mae_nats,
                "parameters": {p.name: {"value": p.value, "low": p.low, "high": p.high, "identified": p.identified}
                               for p in fit.parameters},
            }
            for loss, fit in law.fits.items()
        }  # fmt: skip
        for by in ("r", "N"):
            for error in compare_forms(data, [form], by, OPTIONS):
                entry[error.target][f"held out {by}"] = {
                    k: v for k, v in asdict(error).items() if k not in ("form", "target")
                }
        for loss, values in _largest_size(data, form, law).items():
            entry[loss]["held out largest N"] = values
        found[name] = entry
    return found


def _largest_size(data: Observations, form: Any, law: LawFit) -> dict[str, dict[str, float]]:
    """The largest size predicted from the others: R2 over its own rows, against their own mean."""
    fold = make_folds(data, "N")[-1]
    found: dict[str, dict[str, float]] = {}
    for loss in law.fits:
        predicted = held_out_predictions(data, form, loss, [fold], OPTIONS)[fold]
        observed = data.losses[loss][fold]
        error = predicted - observed
        found[loss] = {
            "rows": int(fold.sum()), "r2": r_squared(observed, error), "mae_nats": float(np.abs(error).mean()),
            "bias_nats": float(error.mean()),
        }  # fmt: skip
    return found


def uses(sweep: SweepFolder, domain: str, law: LawFit, data: Observations, work: Path) -> dict[str, Any]:
    """Both usages at the middle size: recommended share and neighbours trained, and the best share found by running."""
    plan = sweep.record.plan
    size = sweep.record.rung(plan.sizes[len(plan.sizes) // 2].name)
    tokens = float(data.tokens.max())
    first, reference = best_ratio_under_limit(law, size.parameters, tokens, LIMIT)
    limit = float(reference.loss[0]) * (1 + LIMIT)
    one = _run_around(sweep, domain, size.name, first.r.value, lambda r: tokens, law, work / f"use1-{domain}")
    known = _known(data, size.parameters, tokens)
    second = best_ratio_for_domain_tokens(law, size.parameters, DOMAIN_TOKENS)
    two = _run_around(
        sweep, domain, size.name, second.r.value, lambda r: DOMAIN_TOKENS / r, law, work / f"use2-{domain}"
    )
    crossing = _crossing([(p["r"], p["general_nll"]) for p in one] + known, limit)
    lowest = min(two, key=lambda point: point["domain_nll"])["r"]
    return {
        "size": size.name, "N": size.parameters,
        "usage 1": {
            "tokens": tokens, "limit_nats": limit, "reference": reference.origin, "recommended": first.r.model_dump(),
            "status": first.status.value, "runs": one, "found_by_running": crossing,
            "distance": None if crossing is None else abs(first.r.value - crossing),
        },
        "usage 2": {
            "domain_tokens": DOMAIN_TOKENS, "recommended": second.r.model_dump(), "status": second.status.value,
            "runs": two, "found_by_running": lowest, "distance": abs(second.r.value - lowest),
        },
    }  # fmt: skip


def _run_around(
    sweep: SweepFolder, domain: str, size: str, ratio: float, tokens: Any, law: LawFit, folder: Path
) -> list[dict[str, Any]]:
    parameters = sweep.record.rung(size).parameters
    points: list[dict[str, Any]] = []
    for step in (-STEP, 0.0, STEP):
        r = round(min(1.0, max(0.0, ratio + step)), 4)
        if step != 0 and abs(r - ratio) < 0.02:
            continue
        record, _ = train_point(sweep, RunChoice(size, domain, r, tokens(r)), folder, f"r{r:g}")
        predicted = predict_law(law, parameters, record.tokens, r)
        points.append(
            {
                "r": r, "tokens": record.tokens, "recommended": step == 0,
                **{
                    f"{name}_nll": record.losses[GENERAL if name == "general" else domain].value
                    for name in ("general", "domain")
                },
                **{
                    f"{name} predicted": p.model_dump() for name, p in predicted.items() if p is not None
                },
            }
        )  # fmt: skip
        print(f"{domain} {size} r = {r}: {points[-1]}", flush=True)
    return points


def _known(data: Observations, size: float, tokens: float) -> list[tuple[float, float]]:
    """(share, general loss) of the sweep's own runs of that size and length."""
    assert data.ratio is not None
    rows = (data.size == size) & (data.tokens == tokens)
    return list(zip(data.ratio[rows].tolist(), data.losses["general_nll"][rows].tolist(), strict=True))


def _crossing(points: list[tuple[float, float]], limit: float) -> float | None:
    """Largest share up to which the general losses that were run stay within the limit, by straight lines."""
    ordered = sorted(dict(points).items())
    for (r0, l0), (r1, l1) in pairwise(ordered):
        if l0 <= limit < l1:
            return r0 + (r1 - r0) * (limit - l0) / (l1 - l0)
    return ordered[-1][0] if ordered[-1][1] <= limit else None


def draw(found: dict[str, Any], data: dict[str, Observations], path: Path) -> None:
    """Predicted against measured on left-out shares, dcpt; one panel a domain and loss."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(data), figsize=(5 * len(data), 8), squeeze=False)
    for column, (domain, rows) in enumerate(data.items()):
        for row, loss in enumerate(("domain_nll", "general_nll")):
            axis = axes[row][column]
            predicted = held_out_predictions(rows, FORMS["dcpt"], loss, make_folds(rows, "r"), OPTIONS)
            shown = np.isfinite(predicted)
            for size in np.unique(rows.size):
                chosen = (rows.size == size) & shown
                axis.scatter(rows.losses[loss][chosen], predicted[chosen], s=14, label=f"{size / 1e6:.1f} M")
            ends = [float(rows.losses[loss][shown].min()), float(rows.losses[loss][shown].max())]
            axis.plot(ends, ends, color="grey", linewidth=0.8)
            r2 = found[domain]["fits"]["dcpt"][loss]["held out r"]["r2"]
            axis.set_title(f"{domain}, {loss}: left-out shares, R² {r2:.4f}")
            axis.set_xlabel("measured, nats per token")
            axis.set_ylabel("predicted")
            axis.legend(title="N")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/dcpt_sweep"))
    parser.add_argument("--parts", default="fits,uses")
    choices = parser.parse_args()
    sweep = SweepFolder(choices.sweep, SweepRecord.load(choices.sweep / "sweep.json"))
    data = {domain: read_observations(sweep.runs_csv(domain)) for domain in sweep.record.plan.domains}
    found: dict[str, Any] = {}
    for domain, rows in data.items():
        entry: dict[str, Any] = {"rows": len(rows), "runs": int(rows.run.max()) + 1}
        if "fits" in choices.parts:
            entry["fits"] = fits(rows)
        if "uses" in choices.parts:
            entry["uses"] = uses(sweep, domain, fit_law(rows, FORMS["dcpt"], OPTIONS), rows, choices.work)
        found[domain] = entry
    if "fits" in choices.parts:
        draw(found, data, REPOSITORY / "docs/dcpt-own-runs.png")
    plan = sweep.record.plan
    task_seconds = [task.wall_seconds for task in sweep.record.tasks if task.wall_seconds is not None]
    content = {
        "machine": describe_machine(),
        "sweep": {
            "sizes": {rung.name: rung.parameters for rung in sweep.record.rungs}, "ratios": plan.ratios,
            "tokens": plan.tokens, "seeds": plan.seeds, "flops": sweep.record.flops,
            "task_wall_seconds": math.fsum(task_seconds),
        },
        "domains": found,
    }  # fmt: skip
    print(write_results("dcpt_on_own_runs", content))


if __name__ == "__main__":
    main()
