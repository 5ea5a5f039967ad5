"""`cptquant frontier`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Budgets = Annotated[
    str | None,
    typer.Option(
        "--budgets",
        help="Budgets whose plans are wanted, comma-separated: 2.5bpw@sites,3bpw@sites or 8MB,25%.  "
        "[default: --points spread ones]",
        show_default=False,
    ),
]
_Points = Annotated[
    int | None,
    typer.Option(
        "--points", help="So many budgets, spread evenly in the logarithm of damage.  [default: 5]", show_default=False
    ),
]
_Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        help="What spread budgets count: file, or sites (linear layers of the blocks).  [default: file]",
        show_default=False,
    ),
]
_Measure = Annotated[
    int | None,
    typer.Option(
        "--measure",
        help="How many of the points are really quantized and measured on held-out text.  [default: 5 at most]",
        show_default=False,
    ),
]


def frontier(
    model: options.ModelOrRun,
    output: options.Output = None,
    budgets: _Budgets = None,
    points: _Points = None,
    scope: _Scope = None,
    measure: _Measure = None,
    sensitivity: options.Sensitivity = None,
    quantizer: options.Quantizer = None,
    target: options.TargetName = None,
    formats: options.Formats = None,
    calibration: options.Calibration = None,
    eval_text: options.EvalText = None,
    calibration_sequences: options.CalibrationSequences = None,
    own_text: options.OwnText = None,
    eval_sequences: options.EvalSequences = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = None,
    as_json: options.AsJson = False,
) -> None:
    """Trace size against loss for every budget from one measurement; quantize and measure some points.

    Writes frontier.json, frontier.html and the plan of each point. With a RUN folder, its sensitivity table is used.
    """
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.errors import UserError
    from cptquant.reports.frontier import frontier_table
    from cptquant.stages.frontier import FrontierRequest, frontier_model

    choices = options.given(
        sensitivity=sensitivity,
        quantizer=quantizer,
        target=target,
        formats=formats,
        calibration=calibration,
        eval_text=eval_text,
        calibration_sequences=calibration_sequences,
        own_text=own_text,
        eval_sequences=eval_sequences,
        sequence_length=sequence_length,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    wanted = () if budgets is None else tuple(part.strip() for part in budgets.split(",") if part.strip())
    if budgets is not None and not wanted:
        raise UserError(f"--budgets {budgets!r} names no budget; give e.g. 3bpw,4bpw, or leave it out")
    request = FrontierRequest(budgets=wanted, points=points, measure=measure, scope=scope)  # type: ignore[arg-type]
    with watch(quiet=as_json) as progress:
        found = frontier_model(model, output, request, progress, **choices)
    if as_json:
        print_json(found)
    else:
        print_text(frontier_table(found))
        print(f"frontier {(output or Path(model)) / 'frontier.html'}")
