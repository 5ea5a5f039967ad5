"""`cptquant bench`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Run = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Run folder with exported files.", show_default=False)
]
_Engines = Annotated[str, typer.Option("--engines", help="Comma-separated: transformers, onnx, llamacpp.")]
_Synthetic = Annotated[
    str | None,
    typer.Option(
        "--synthetic", help="A shape with random weights instead of a run: llama-0.3b, opt-125m or bert-base.",
        show_default=False,
    ),
]  # fmt: skip
_Seconds = Annotated[float, typer.Option("--seconds", min=0.01, help="Time given to each speed in a round.")]
_Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Times every engine is measured, interleaved.")]


def bench(
    run_folder: _Run = None,
    engines: _Engines = "transformers,onnx",
    synthetic: _Synthetic = None,
    budget: options.BudgetText = None,
    formats: options.Formats = None,
    threads: options.Threads = 1,
    rounds: _Rounds = 5,
    seconds: _Seconds = 1.0,
    output: options.Output = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure engines on a run's files: speed, load time, peak memory, size; bench.json, bench.html.

    An engine that cannot run keeps its line, with the reason, and the exit code is 2.
    """
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.errors import EngineError, UserError
    from cptquant.reports.bench_table import bench_table
    from cptquant.stages.bench import BenchMethod
    from cptquant.stages.bench_run import SyntheticPlan, bench_folder, bench_synthetic

    if (run_folder is None) == (synthetic is None):
        raise UserError("give either a RUN folder or --synthetic with one of llama-0.3b, opt-125m, bert-base")
    how = BenchMethod(threads=threads, rounds=rounds, seconds=seconds)
    names = tuple(name.strip() for name in engines.split(",") if name.strip())
    with watch(quiet=as_json) as progress:
        if synthetic is not None:
            if output is None:
                raise UserError("--synthetic needs a folder for its results; add --output, e.g. --output runs/bench")
            plan = SyntheticPlan(**options.given(budget=budget, formats=formats))
            record = bench_synthetic(synthetic, output, names, how=how, progress=progress, plan=plan)
            folder = output
        else:
            assert run_folder is not None
            record = bench_folder(run_folder, names, how=how, progress=progress)
            folder = run_folder
    if as_json:
        print_json(record)
    else:
        print_text(bench_table(record))
        print(f"page       {folder / 'bench.html'}")
    failed = [f"{variant.name}: {variant.problem}" for variant in record.variants if variant.problem]
    if failed:
        raise EngineError(f"{len(failed)} of {len(record.variants)} could not be measured; {'; '.join(failed)}")
