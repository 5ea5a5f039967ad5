"""plan.json -> why each site has its bits. Loads no framework."""

from pathlib import Path

from cptquant.allocation.price import explain_plan
from cptquant.core.errors import UserError
from cptquant.core.explanation import PlanExplanation
from cptquant.core.targets import find_target
from cptquant.stages.calibration import run_calibration
from cptquant.stages.plan_source import find_plan

_LISTED = 5


def explain(path: Path, site: str | None = None) -> PlanExplanation:
    """Explain a plan from the layout and the sensitivity table beside it.

    Args:
        path: run folder, or a plan file in one. site: only the group of this site.

    Raises:
        ArtifactError: no plan, layout or table, or files of different models. UserError: the plan has no such site.
    """
    source = find_plan(path)
    layout, table = source.layout(), source.table()
    found = explain_plan(layout, table, find_target(source.plan.target), source.plan, source.formats(table))
    calibration = run_calibration(source.folder, layout, table, source.plan, source.quantizer)
    found = found.model_copy(
        update={
            "predicted": None if calibration is None else calibration.predict(found.damage),
            "notes": (*source.stale(table), *found.notes),
        }
    )
    if site is None:
        return found
    groups = tuple(group for group in found.groups if site in group.sites)
    if not groups:
        names = [name for group in found.groups for name in group.sites]
        near = [name for name in names if site in name][:_LISTED] or names[:_LISTED]
        raise UserError(f"--site {site!r} is none of the plan's {len(names)} sites; for example: {', '.join(near)}")
    return found.model_copy(update={"groups": groups})
