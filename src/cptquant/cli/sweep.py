"""`cptquant sweep`: a grid of short runs over sizes, tokens and mixture shares, for a law to be fitted to."""

import os
from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Plan = Annotated[
    Path, typer.Argument(metavar="PLAN", help="YAML file that says which runs (docs/sweep.md).", show_default=False)
]
_Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        max=4096,
        help="Runs at a time on this machine, each a worker of Ray; 0: one after another in this process.  [default: "
        "cores / threads of the plan; 0 without Ray]",
        show_default=False,
    ),
]
_Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster instead of workers here: host:port, ray://host:port or auto. Its machines must see --output "
        "and the texts under the same paths.",
        show_default=False,
    ),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what it would cost; run and write nothing.")
]


def sweep(
    plan: _Plan,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the sweep; made if missing.")],
    workers: _Workers = None,
    address: _Address = None,
    dry_run: _DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a grid of sizes, tokens and domain shares, and write the losses that laws are fitted to (runs.csv).

    Every run continues a base model at a constant rate and leaves it for a short anneal at each evaluation. A killed
    sweep goes on with the same command; a run that fails is named, and the others finish.
    """
    from cptquant.cli.terminal import print_json, print_text, print_values, warn, watch
    from cptquant.core.errors import UserError
    from cptquant.core.sweep_file import read_plan
    from cptquant.reports.sweep_tables import estimate_table, sweep_table
    from cptquant.stages.sweep import estimate, open_sweep, sweep_stage
    from cptquant.stages.task_pool import Workers, import_ray, ray_is_installed

    if workers is not None and address is not None:
        raise UserError("--workers and --address were both given; --address takes the cluster's own")
    wanted = read_plan(plan)
    if workers is None and address is None:
        installed = ray_is_installed()
        workers = max(1, (os.cpu_count() or 1) // wanted.threads) if installed else 0
        if not installed:
            warn('Ray is not installed: runs go one after another in this process; pip install "cptquant[sweep]"')
    chosen = Workers(workers or 0, address, wanted.threads, wanted.gpus, wanted.attempts)
    if workers or address is not None:
        import_ray(chosen)  # refused before time is spent on texts
    setup = open_sweep(wanted, output)
    expected = estimate(setup, workers or 1)
    if dry_run:
        if as_json:
            print_values(expected)
        else:
            print_text(estimate_table(expected))
        return
    if not as_json:
        print_text(estimate_table(expected))
    with watch(quiet=as_json) as progress:
        record = sweep_stage(setup, output, chosen, progress)
    if as_json:
        print_json(record)
    else:
        print_text(sweep_table(record))
        several = len(wanted.domains) > 1
        print(
            f"runs       {output / ('runs-DOMAIN.csv' if several else 'runs.csv')}\nreport     {output / 'report.html'}"
        )
