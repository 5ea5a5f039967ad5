"""`cptquant explain`."""

from typing import Annotated

import typer

from cptquant.cli import options


def explain(
    plan: options.PlanPath,
    site: Annotated[
        str | None, typer.Option("--site", help="Only this site, with every format it could have.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say why each site got its bits: scores and bytes of its formats against the price of a byte. Loads no model."""
    from cptquant.cli.terminal import print_text, print_values
    from cptquant.reports.plan_tables import explanation_table
    from cptquant.stages.explain import explain as explain_plan

    found = explain_plan(plan, site)
    if as_json:
        print_values(found)
    else:
        print_text(explanation_table(found, offers=site is not None))
