"""`cptquant diff`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Other = Annotated[Path, typer.Argument(metavar="OTHER", help="Run folder or plan file to compare with.")]


def diff(plan: options.PlanPath, other: _Other, as_json: options.AsJson = False) -> None:
    """Compare two plans of one model: sites that differ, bytes, predicted and measured loss. Loads no model."""
    from cptquant.cli.terminal import print_text, print_values
    from cptquant.reports.plan_tables import comparison_table
    from cptquant.stages.compare import diff_plans

    comparison = diff_plans(plan, other)
    if as_json:
        print_values(comparison)
    else:
        print_text(comparison_table(comparison))
