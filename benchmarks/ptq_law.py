"""What the PTQ law's predictions are worth: published perplexities, and the table that comes with the package.

    python benchmarks/ptq_law.py

Every figure is on families of models left out of the fit. Writes results/ptq_law.json and docs/ptq-law-*.png; a few CPU
seconds. Published tables are expected in ../shared/data/laws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from machine import describe_machine
from results_file import REPOSITORY, SHARED, write_results

from cptquant.laws.ptq import fit_ptq_law, usable_observations
from cptquant.laws.ptq_forest import WITH_ROUNDING_LOSS, WITHOUT_ROUNDING_LOSS, forest_features, forest_left_out
from cptquant.laws.ptq_forms import FORMS, Design
from cptquant.laws.ptq_published import (
    PublishedForm,
    PublishedPoint,
    log_rises,
    point_features,
    predict_left_out,
    read_published,
    score_published,
    usable_points,
)
from cptquant.laws.ptq_scores import fit_bands, leave_one_family_out, r_squared
from cptquant.laws.ptq_table import SHIPPED, PtqObservation, read_observations

matplotlib.use("Agg")


def published(folder: Path) -> dict[str, Any]:
    """Ridge and forest, with the rounding loss and without, all together and by family."""
    points = read_published(folder)
    results: dict[str, Any] = {}
    forms: tuple[PublishedForm, ...] = ("rounding", "error")
    for form in forms:
        used = usable_points(points, "rounding")
        forest = np.exp(forest_left_out(point_features(used, form), log_rises(used), [p.family for p in used])) - 1e-3
        for name, predicted in ((f"{form}, ridge", predict_left_out(used, form)), (f"{form}, forest", forest)):
            results[name] = _by_family(used, predicted)
    every = usable_points(points, "error")
    results["error, ridge, all methods"] = _by_family(every, predict_left_out(every, "error"))
    used = usable_points(points, "rounding")
    draw([p.rise_nats for p in used], predict_left_out(used, "rounding"), [p.family for p in used],
         "rise of the NLL, nats per token", "published")  # fmt: skip
    calm = [p for p in used if p.model != "Qwen2-7B"]
    results["rounding, ridge, without Qwen2-7B"] = _by_family(calm, predict_left_out(calm, "rounding"))
    return results


def _by_family(points: list[PublishedPoint], predicted: np.ndarray) -> dict[str, Any]:
    scores = {"all": score_published(points, predicted).model_dump()}
    for family in dict.fromkeys(p.family for p in points):
        mine = [index for index, p in enumerate(points) if p.family == family]
        scores[family] = score_published([points[index] for index in mine], predicted[mine]).model_dump()
    return scores


def own_table() -> dict[str, Any]:
    """Every form and the forest on the shipped table."""
    fit = fit_ptq_law()
    rows = usable_observations(read_observations(SHIPPED))
    results: dict[str, Any] = {form: scores.model_dump() for form, scores in fit.held_out.items()}
    target = np.log([row.kl_nats for row in rows])
    for name, terms in (("forest", WITH_ROUNDING_LOSS), ("forest without the rounding loss", WITHOUT_ROUNDING_LOSS)):
        predicted = forest_left_out(forest_features(rows, terms), target, [row.family for row in rows])
        factor = float(np.exp(np.median(np.abs(predicted - target))))
        results[name] = {"r2_log_kl": r_squared(target, predicted), "median_kl_factor": factor}
    design = Design.build(rows, fit.form)
    results_by = {"by_width": by_width(rows, design), "by_family": by_family_left_out(design, list(fit.families))}
    draw(design.kl, leave_one_family_out(design).kl, [row.family for row in rows], "KL, nats per token", "own")
    law = fit.laws[fit.form].model_dump()
    return {"forms": list(FORMS), "form": fit.form, "rows": fit.rows, "families": fit.families, "law": law,
            "held_out": results, **results_by}  # fmt: skip


WIDTHS = ((2, 3), (3, 4), (4, 5), (5, 9))


def by_width(rows: list[PtqObservation], design: Design) -> dict[str, Any]:
    """Errors of the rise by mean code bits, beside those of no law: T (g for GPTQ in it) as the rise."""
    held_out = leave_one_family_out(design)
    bits = np.array([row.features.code_bits for row in rows])
    unfitted = np.array([row.features.taylor_kl_nats for row in rows])  # GPTQ's share is in it
    table: dict[str, Any] = {}
    for low, high in WIDTHS:
        mine = (bits >= low - 1e-9) & (bits < high - 1e-9)
        law, none = (np.abs(found - design.rise)[mine] for found in (held_out.rise, unfitted))
        ratios = (design.kl / unfitted)[mine]
        table[f"{low} to {high} bits"] = {
            "rows": int(mine.sum()), "median_abs_rise": float(np.median(np.abs(design.rise[mine]))),
            "law": {"median": float(np.median(law)), "largest": float(law.max())},
            "unfitted": {"median": float(np.median(none)), "largest": float(none.max())},
            "kl_over_unfitted": {"lowest": float(ratios.min()), "highest": float(ratios.max())},
            "largest_kl_difference": float(np.abs(design.kl - unfitted)[mine].max()),
        }  # fmt: skip
    return table


def by_family_left_out(design: Design, names: list[str]) -> dict[str, Any]:
    """Share inside the 90 % intervals and the error's median, for each family left out of law and widths."""
    held_out = leave_one_family_out(design)
    table: dict[str, Any] = {}
    for family, name in enumerate(names):
        bands = fit_bands(design, leave_one_family_out(design, without=family))
        mine = np.flatnonzero(design.family == family)
        inside = {"kl": [], "rise": []}
        for row in mine:
            kl, rise = float(held_out.kl[row]), float(held_out.rise[row])
            low, high = bands.kl_interval(kl)
            inside["kl"].append(low <= design.kl[row] <= high)
            low, high = bands.rise_interval(rise, kl)
            inside["rise"].append(low <= design.rise[row] <= high)
        table[name] = {
            "rows": len(mine), "in_kl_interval": float(np.mean(inside["kl"])),
            "in_rise_interval": float(np.mean(inside["rise"])),
            "median_kl_factor": float(np.exp(np.median(np.abs(np.log(design.kl[mine] / held_out.kl[mine]))))),
        }  # fmt: skip
    return table


def draw(measured: Any, predicted: Any, families: list[str], label: str, name: str) -> None:
    """Predicted against measured, one colour a family."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.6), layout="constrained")
    first, second = np.asarray(measured), np.asarray(predicted)
    shown = (first > 1e-6) & (second > 1e-6)
    for family in dict.fromkeys(families):
        mine = shown & (np.array(families) == family)
        axes.loglog(first[mine], second[mine], "o", markersize=4, alpha=0.6, label=family)
    ends = [first[shown].min(), first[shown].max()]
    axes.loglog(ends, ends, color="black", linewidth=0.8)
    axes.set_xlabel(f"measured {label}")
    axes.set_ylabel("predicted, family left out")
    axes.legend(fontsize=7)
    figure.savefig(REPOSITORY / f"docs/ptq-law-{name}.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Both parts, as far as their data are there."""
    results: dict[str, Any] = {"machine": describe_machine()}
    if (SHARED / "data" / "laws").is_dir():
        results["published"] = published(SHARED / "data" / "laws")
    if SHIPPED.exists():
        results["own_table"] = own_table()
    print(write_results("ptq_law", results))


if __name__ == "__main__":
    main()
