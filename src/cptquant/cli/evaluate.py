"""`cptquant evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Original = Annotated[
    str | None,
    typer.Option(
        "--original", help="Model to compare a folder with (KL, agreement); a run knows its own.", show_default=False
    ),
]


def evaluate(
    model: options.ModelOrRun,
    original: _Original = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write evaluation.json of a folder.")
    ] = None,
    eval_text: options.EvalText = None,
    eval_sequences: options.EvalSequences = None,
    sequence_length: options.SequenceLength = None,
    trust_remote_code: options.TrustRemoteCode = None,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a run, or any Hugging Face folder (another tool's output too) by the same ruler."""
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.pipeline import evaluate_folder, evaluate_run
    from cptquant.reports.tables import evaluation_table

    changes = options.given(
        eval_text=eval_text,
        eval_sequences=eval_sequences,
        sequence_length=sequence_length,
        trust_remote_code=trust_remote_code,
    )
    with watch(quiet=as_json) as progress:
        if (Path(model) / "settings.json").is_file():
            report = evaluate_run(Path(model), progress, **changes)
        else:
            report = evaluate_folder(model, original, progress, **changes)
            if output is not None:
                report.save(output)
    if as_json:
        print_json(report)
    else:
        print_text(evaluation_table(report))
