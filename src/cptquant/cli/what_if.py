"""`cptquant what-if`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options


def what_if(
    plan: options.PlanPath,
    more: Annotated[
        str | None, typer.Option("--more", help="Raise the plan's limit by 20MB, 0.25bpw or 5%.", show_default=False)
    ] = None,
    less: Annotated[
        str | None, typer.Option("--less", help="Lower the plan's limit by 20MB, 0.25bpw or 5%.", show_default=False)
    ] = None,
    budget: options.BudgetText = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the new plan.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what another limit would change: the new plan, sites, bytes and loss. Writes nothing without --output."""
    from cptquant.cli.terminal import print_text, print_values
    from cptquant.core.artifact import check_writable
    from cptquant.reports.plan_tables import comparison_table
    from cptquant.stages.what_if import what_if as plan_under

    if output is not None:
        check_writable(output)
    after, comparison = plan_under(plan, more=more, less=less, budget=budget)
    if output is not None:
        after.save(output)
    if as_json:
        print_values(comparison)
    else:
        print_text(comparison_table(comparison))
