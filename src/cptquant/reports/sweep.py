"""The page of a sweep: what every run lost, over tokens and over the domain's share, and what quantizing cost."""

from collections.abc import Sequence
from pathlib import Path

from cptquant.core.artifact import write_whole
from cptquant.core.laws import Curve, CurveSet
from cptquant.core.sweep import GENERAL
from cptquant.core.sweep_record import PointRecord, SweepRecord
from cptquant.core.sweep_tables import SweepData
from cptquant.reports.figures.law import draw_curves, spell_large
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import spell_decimal_bytes, spell_measured, spell_number, spell_seconds

_STATUS = {"finished": "finished", "failed": "failed", "open": "not begun"}


def write_sweep_report(path: Path, record: SweepRecord, data: SweepData) -> None:
    """Write the page.

    Raises:
        OutputError: the folder cannot be written.
    """
    plan = record.plan
    finished = sum(task.status == "finished" for task in record.tasks)
    context = {
        "title": f"Sweep: {len(plan.sizes)} sizes, {len(plan.ratios)} shares, {', '.join(plan.domains)}",
        "record": record,
        "lead": f"{finished} of {len(record.tasks)} tasks finished, {record.where}; "
        f"{spell_number(record.flops)} training FLOPs (6 N D, anneals and base models included)",
        "domains": [(name, _domain_drawings(data, name)) for name in plan.domains],
        "sizes": [
            (rung.name, f"{rung.parameters:,}", f"{rung.block_parameters:,}", spell_seconds(rung.step_seconds))
            for rung in record.rungs
        ],
        "tasks": [
            (task.id, _STATUS[task.status], task.attempts, task.cause) for task in record.tasks
            if task.status != "finished" or task.cause
        ],
        "quantized": _quantized(data),
        "wall": spell_seconds(record.provenance.wall_seconds or 0.0),
        "versions": sorted(record.provenance.versions.items()),
    }  # fmt: skip
    write_whole(path, load_template("sweep.html.jinja").render(context).encode())


def _domain_drawings(data: SweepData, domain: str) -> list[tuple[str, str]]:
    """Both losses over tokens (one picture a size) and over the share (one line a size)."""
    drawings: list[tuple[str, str]] = []
    for loss, corpus in (("Domain loss", domain), ("General loss", GENERAL)):
        for size in data.rungs:
            curves = _over_tokens(data, domain, corpus, size)
            if curves:
                shown = CurveSet("D", f"size {size}", curves)
                drawings.append((f"{loss} over tokens, size {size}", draw_curves(shown, f"{domain} {loss} {size}")))
        shares = _over_shares(data, domain, corpus)
        if shares:
            shown = CurveSet("r", "at the last point", shares)
            drawings.append((f"{loss} over the share, last point", draw_curves(shown, f"{domain} {loss} over shares")))
    return drawings


def _over_tokens(data: SweepData, domain: str, corpus: str, size: str) -> tuple[Curve, ...]:
    curves: list[Curve] = []
    for run in data.runs:
        points = [point for point in data.points.get(run.id, ()) if point.annealed]
        if run.size == size and domain in run.judged and len(points) > 1:
            label = f"r = {run.ratio:g}" + (f", seed {run.seed}" if run.seed != data.runs[0].seed else "")
            curves.append(_curve(label, [(point.tokens, point) for point in points], corpus))
    return tuple(curves)


def _over_shares(data: SweepData, domain: str, corpus: str) -> tuple[Curve, ...]:
    curves: list[Curve] = []
    for size in data.rungs:
        seeds = dict.fromkeys(run.seed for run in data.runs)
        for seed in list(seeds)[:1]:
            found = sorted(
                (run.ratio, data.points[run.id][-1])
                for run in data.runs
                if (run.size, run.seed) == (size, seed) and domain in run.judged and data.points.get(run.id)
            )
            if len(found) > 1:
                curves.append(_curve(size, found, corpus))
    return tuple(curves)


def _curve(label: str, points: Sequence[tuple[float, PointRecord]], corpus: str) -> Curve:
    x = tuple(float(place) for place, _ in points)
    y = tuple(point.losses[corpus].value for _, point in points)
    return Curve(label, x, y, y, y, tuple(zip(x, y, strict=True)))


def _quantized(data: SweepData) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for run in data.runs:
        for point in data.points.get(run.id, ()):
            rows += [
                (
                    run.id, found.format, spell_decimal_bytes(found.size_bytes), spell_large(point.tokens), found.text,
                    spell_measured(found.kl_nats, found.kl_stderr_nats),
                    spell_measured(found.rise_nats, found.rise_stderr_nats),
                )
                for found in point.quantized
            ]  # fmt: skip
    return rows
