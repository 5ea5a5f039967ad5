"""`cptquant`: entry point, error reporting, exit codes.

Exit codes: 0 done; 2 something the person can change (including an interruption); 1 a fault of ours.
Subcommand bodies import what they need when they run, so `cptquant --help` answers at once.
"""

import os
import signal
import sys
from typing import Annotated

import typer

from cptquant.cli import (
    adapt,
    allocate,
    bench,
    diff,
    evaluate,
    explain,
    export,
    frontier,
    generate,
    inspect,
    law,
    measure,
    plan,
    predict,
    quantize,
    recover,
    report,
    sweep,
    targets,
    what_if,
)
from cptquant.core.errors import CptquantError

app = typer.Typer(
    name="cptquant",
    help="Measure which layers of a language model break when compressed, spend the bits where they matter, "
    "and write a checkpoint that runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"cptquant {version('cptquant')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


for command in (quantize.quantize, recover.recover, adapt.adapt, sweep.sweep, plan.plan, inspect.inspect,
                measure.measure, allocate.allocate, predict.predict, frontier.frontier, explain.explain,
                what_if.what_if, diff.diff,
                evaluate.evaluate, report.report, targets.targets, export.export, bench.bench,
                generate.generate):  # fmt: skip
    app.command()(command)
app.add_typer(law.app, name="law")


class _Interrupted(BaseException):
    """Raised by the signal handler; no library's `except Exception` may take it for a failure of its own."""


def _interrupt(_signal: int, _frame: object) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; never shows a traceback unless CPTQUANT_TRACEBACK is set."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except _Interrupted:
        _fail("interrupted; finished stages are kept: run the same command again to go on", 2)
    except CptquantError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except MemoryError:
        _fail("out of memory; use fewer or shorter sequences (--calibration-sequences, --sequence-length)", 2)
    except Exception as error:  # noqa: BLE001 - the last line of defence turns a fault of ours into one line
        _fail(
            f"a fault of cptquant, not of yours: {type(error).__name__}: {error}\n"
            "finished stages are kept; set CPTQUANT_TRACEBACK=1 to see where it happened and report it",
            1,
        )


def _fail(message: str, code: int) -> None:
    if os.environ.get("CPTQUANT_TRACEBACK"):
        import traceback

        traceback.print_exc()
    for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not turn this message into a traceback
        signal.signal(number, signal.SIG_IGN)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
