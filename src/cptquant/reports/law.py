"""The page of a fitted law and the page of an optimum: offline HTML from law.json and the curves it is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cptquant.core.artifact import write_whole
from cptquant.core.laws import CurveSet, Interval, LawFit, LossFit, Optimum
from cptquant.reports.figures.law import Mark, draw_curves, draw_violations, spell_large
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import spell_number, spell_seconds

if TYPE_CHECKING:
    pass

LOSS_NAMES = {"general_nll": "General loss", "domain_nll": "Domain loss", "nll": "Loss"}
_AXES = {"N": "Over size", "D": "Over tokens", "r": "Over the domain's share"}


def write_law_report(path: Path, law: LawFit, curves: Mapping[str, Sequence[CurveSet]]) -> None:
    """Write the page of a law.

    Args:
        curves: loss column -> curves, from `cptquant.laws.curves`.

    Raises:
        OutputError: the folder cannot be written.
    """
    losses = [_loss_section(fit, curves.get(name, ())) for name, fit in law.fits.items()]
    context = {
        "law": law,
        "title": f"Law {law.kind}",
        "losses": losses,
        "settings": [(key.replace("_", " "), value) for key, value in law.settings.items() if value not in ("", None)],
        "wall": spell_seconds(law.provenance.wall_seconds or 0.0),
        "versions": sorted(law.provenance.versions.items()),
    }
    write_whole(path, load_template("law.html.jinja").render(context).encode())


def _loss_section(fit: LossFit, curves: Sequence[CurveSet]) -> dict[str, object]:
    drawings = [
        (f"{_AXES[each.quantity]}, {each.held}", draw_curves(each, f"{LOSS_NAMES[fit.target]} {each.held}"))
        for each in curves
    ]
    maps = [(check, draw_violations(check, check.name)) for check in fit.requirements if check.violated_share > 0]
    return {
        "fit": fit,
        "name": LOSS_NAMES[fit.target],
        "statuses": [(status.value.replace("_", " "), status.sentence) for status in fit.statuses],
        "drawings": drawings,
        "parameters": [
            (
                parameter.name,
                spell_number(parameter.value, 4),
                "held" if parameter.fixed else f"{spell_number(parameter.low)} to {spell_number(parameter.high)}",
                _profile(parameter.profile_low, parameter.profile_high, fixed=parameter.fixed),
                ("on its bound" if parameter.at_bound else "" if parameter.identified else "not identified"),
                parameter.meaning,
            )
            for parameter in fit.parameters
        ],
        "requirements": [
            (
                check.name,
                "met" if check.violated_share == 0 else f"violated on {100 * check.violated_share:.0f} % of the range",
                "" if check.violated_share == 0 or check.first_tokens is None else
                f"met from {spell_large(check.first_tokens)} tokens on",
            )
            for check in fit.requirements
        ],
        "maps": [(check.name, drawing) for check, drawing in maps if drawing],
        "ranges": [
            (letter, f"{spell_large(found.low) if letter != 'r' else spell_number(found.low)} to "
             f"{spell_large(found.high) if letter != 'r' else spell_number(found.high)}, {found.distinct} values")
            for letter, found in fit.ranges.items()
        ],
        "r2": f"{fit.r2:.5f}",
        "mae": spell_number(fit.mae_nats),
    }  # fmt: skip


def _profile(low: float | None, high: float | None, *, fixed: bool) -> str:
    if fixed:
        return ""
    return f"{'open' if low is None else spell_number(low)} to {'open' if high is None else spell_number(high)}"


@dataclass(frozen=True)
class OptimumPicture:
    """What the page of an optimum shows.

    Attributes:
        question: the problem in words. sentences: explanations. curves: by loss column. mark_at: the quantity of the
            curves' axis at the optimum. limit: of the general loss.
    """

    question: str
    sentences: tuple[str, ...]
    curves: Mapping[str, CurveSet]
    mark_at: Interval
    limit: float | None = None


def write_optimum_report(path: Path, optimum: Optimum, picture: OptimumPicture) -> None:
    """Write the page of an optimum.

    Raises:
        OutputError: the folder cannot be written.
    """
    found = {"general_nll": optimum.general_nll, "domain_nll": optimum.domain_nll, "nll": optimum.domain_nll}
    drawings: list[tuple[str, str]] = []
    for name, curves in picture.curves.items():
        loss = found[name]
        at = picture.mark_at
        mark = Mark(at.value, at.low, at.high, loss.value, spell_interval(loss)) if loss is not None else None
        limit = picture.limit if name == "general_nll" else None
        drawings.append((f"{LOSS_NAMES[name]}, {curves.held}", draw_curves(curves, name, mark=mark, limit=limit)))
    rows = [
        ("Model size N", spell_range(optimum.N)), ("Tokens D", spell_range(optimum.D)),
        ("Domain share r", spell_interval(optimum.r)), ("General loss", spell_interval(optimum.general_nll)),
        ("Domain loss", spell_interval(optimum.domain_nll)),
    ]  # fmt: skip
    context = {"title": picture.question, "picture": picture, "rows": rows, "drawings": drawings,
               "status": (optimum.status.value.replace("_", " "), optimum.status.sentence)}  # fmt: skip
    write_whole(path, load_template("optimum.html.jinja").render(context).encode())


def spell_interval(interval: Interval | None, digits: int = 4) -> str:
    """`2.345 (2.33 to 2.36)`."""
    if interval is None:
        return "–"
    if interval.low == interval.high:
        return spell_number(interval.value, digits)
    return (
        f"{spell_number(interval.value, digits)} "
        f"({spell_number(interval.low, digits)} to {spell_number(interval.high, digits)})"
    )


def spell_range(interval: Interval) -> str:
    """The same for parameters and tokens: `1.8B (1.6B to 2B)`."""
    if interval.low == interval.high:
        return spell_large(interval.value)
    return f"{spell_large(interval.value)} ({spell_large(interval.low)} to {spell_large(interval.high)})"
