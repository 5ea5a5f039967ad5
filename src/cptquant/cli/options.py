"""The flags that several subcommands share, spelled once."""

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Local folder, hub id, embedded:opt-mini or embedded:bert-mini.", show_default=False
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of an earlier stage.", show_default=False)]
PlanPath = Annotated[
    Path,
    typer.Argument(metavar="PLAN", help="Run folder, or a plan file in one (plan.json, frontier/plan-*.json).",
                   show_default=False),
]  # fmt: skip
ModelOrRun = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RUN",
        help="Local model folder, hub id, embedded:NAME, or a run folder to go on from.",
        show_default=False,
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; made if missing.", show_default=False)]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="4bpw (whole file), 3.25bpw@sites (blocks' linear layers, scales included), 25% of the original, 12MB, "
        "1.2GiB.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Limit on the engine's peak memory instead of --budget, for --target gguf and onnx: weights, keys and "
        "values of --context tokens, and the engine must fit, e.g. 2GB.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        help="Tokens the engine's cache must hold: counted by --memory, written into the files of --target onnx.  "
        "[default: the model's, at most 4096]",
        show_default=False,
    ),
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        "--sensitivity",
        help="cmpq, pmpq, tdmpq, path, sketch or ablation.  [default: tdmpq]",
        show_default=False,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        "--allocator",
        help="knapsack, kmeans, uniform, first_last or random.  [default: knapsack]",
        show_default=False,
    ),
]
_QUANTIZER_HELP = (
    "gptq, rtn, or learned after GPTQ: signround, block-ap, kl-rounding.  [default: block-ap for causal language "
    "models below 50M parameters, else gptq]"
)
Quantizer = Annotated[str | None, typer.Option("--quantizer", help=_QUANTIZER_HELP, show_default=False)]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Engine the plan must be legal in (cptquant targets lists them).  [default: transformers]",
        show_default=False,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats",
        help="Candidate formats, comma-separated.  [default: the target's, see cptquant targets]",
        show_default=False,
    ),
]
RefineSwaps = Annotated[
    int | None,
    typer.Option(
        "--refine-swaps",
        min=0,
        max=1000,
        help="After allocation, up to N rounds of swaps between sites at no more bytes, each judged by the KL of the "
        "whole quantized model on calibration text; the guard compares with the plan before.  [default: 0]",
        show_default=False,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Calibration text: .txt, .jsonl or a saved `datasets` folder.  [default: embedded text]",
        show_default=False,
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(
        "--eval-text",
        help="Held-out text: .txt, .jsonl or a saved `datasets` folder.  [default: embedded text]",
        show_default=False,
    ),
]
CalibrationSequences = Annotated[
    int | None,
    typer.Option("--calibration-sequences", min=2, help="Calibration sequences.  [default: 128]", show_default=False),
]
OwnText = Annotated[
    int | None,
    typer.Option(
        "--own-text",
        help="Sequences that the model writes itself, added to the calibration text when quantizing; 0 for none.  "
        "[default: gptq and block-ap 256 below 50M parameters; kl-rounding 768; else 0]",
        show_default=False,
    ),
]
EvalSequences = Annotated[
    int | None,
    typer.Option("--eval-sequences", min=2, help="Evaluation sequences.  [default: 64]", show_default=False),
]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", min=8, help="Tokens a sequence.  [default: 256]", show_default=False),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of every random choice.  [default: 0]", show_default=False)
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that comes with the model folder.", show_default=False),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the engine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]


def given(**flags: Any) -> dict[str, Any]:
    """The flags a person really gave; `formats` split at commas."""
    chosen = {name: value for name, value in flags.items() if value is not None}
    if "formats" in chosen:
        chosen["formats"] = tuple(name.strip() for name in chosen["formats"].split(",") if name.strip())
    return chosen
