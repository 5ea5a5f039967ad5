"""`cptquant export`."""

from typing import Annotated

import typer

from cptquant.cli import options

_Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="transformers, transformers-fused, vllm, gguf, onnx or torch.  [default: the plan's]",
        show_default=False,
    ),
]


def export(
    run_folder: options.RunFolder,
    target: _Target = None,
    context: options.Context = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a quantized run for an engine, and compare the engine's outputs there with our own model's."""
    from cptquant.cli.terminal import print_json, print_text, warn_of_memory, watch
    from cptquant.core.targets import find_target
    from cptquant.pipeline import export_run
    from cptquant.reports.export_table import export_table

    if target is not None:
        find_target(target)
    with watch(quiet=as_json) as progress:
        record = export_run(run_folder, target, progress, **options.given(context=context))
    warn_of_memory(record)
    if as_json:
        print_json(record)
    else:
        print_text(export_table(record))
        print(f"file       {run_folder / record.entry}")
