"""`cptquant recover`: train a quantized run further on the grid of its plan."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="qat (latent weights, steps, norms), scales or multipliers (steps alone), pv (codes a few at a time), "
        "blockwise (block by block), clipping, norms.",
    ),
]
_Rounding = Annotated[str, typer.Option("--rounding", help="Slope of rounding in qat: ste or sigmoid.")]
_Sharpness = Annotated[float, typer.Option("--sharpness", help="T of --rounding sigmoid.")]
_Clamp = Annotated[str, typer.Option("--clamp", help="Slope of clamping in qat: hard or soft.")]
_Gate = Annotated[str, typer.Option("--gate", help="Gate of --clamp soft: sigmoid or phi.")]
_GateBeta = Annotated[float, typer.Option("--gate-beta", help="Steepness of --gate sigmoid.")]
_SoftForward = Annotated[
    bool, typer.Option("--soft-forward", help="The soft clamp in the forward pass of training too.")
]
_Loss = Annotated[
    str,
    typer.Option("--loss", help="kl (to the teacher), ce (the text's own tokens; adapts to the text) or both."),
]
_States = Annotated[
    float | None,
    typer.Option("--states", min=0, help="Weight of the distance of hidden states to the teacher's.  [default: by "
                 "method]", show_default=False),
]  # fmt: skip
_Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", help="Model whose predictions are followed.  [default: the original]", show_default=False
    ),
]
_Freeze = Annotated[
    str | None,
    typer.Option("--freeze", help="Layers that keep codes and steps, comma-separated: v_proj,o_proj or a pattern of "
                 "whole names.", show_default=False),
]  # fmt: skip
_Norms = Annotated[
    bool | None,
    typer.Option("--train-norms/--no-train-norms", help="Train norms and biases too.  [default: by method]",
                 show_default=False),
]  # fmt: skip
_Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, max=10_000_000, help="Optimizer steps.  [default: by method]", show_default=False),
]
_Epochs = Annotated[
    float | None,
    typer.Option("--epochs", min=0.01, max=1000, help="Passes over the text, of block-wise methods.  [default: by "
                 "method]", show_default=False),
]  # fmt: skip
_Time = Annotated[
    str | None,
    typer.Option(
        "--time", help="Instead of --steps: train for about so long, e.g. 90s, 20min, 2h.", show_default=False
    ),
]
_Data = Annotated[
    str | None,
    typer.Option("--data", help="Training text: .txt, .jsonl or a saved `datasets` folder.  [default: the run's "
                 "calibration text]", show_default=False),
]  # fmt: skip
_Sequences = Annotated[
    int | None,
    typer.Option("--sequences", min=3, help="Windows of it, at most.  [default: 512]", show_default=False),
]
_OwnText = Annotated[
    int | None,
    typer.Option("--own-text", min=0, max=65_536, help="Windows that the model writes itself beside it.  [default: "
                 "512 for --loss kl on the calibration text; none with --data and for block-wise methods]",
                 show_default=False),
]  # fmt: skip
_Batch = Annotated[
    int | None, typer.Option("--batch-sequences", min=1, help="Windows a step.  [default: 8]", show_default=False)
]
_Activations = Annotated[
    int | None,
    typer.Option("--activation-bits", min=2, max=16, help="Train with inputs of quantized layers in so many bits, a "
                 "step a token.", show_default=False),
]  # fmt: skip


_GradientCheckpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Run blocks again on the way back instead of keeping their "
                 "activations: less memory, more time."),
]  # fmt: skip


def _rate(flag: str, text: str) -> object:
    return typer.Option(flag, min=0, help=f"{text}  [default: by method]", show_default=False)


def recover(
    run: options.RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="New run folder; made if missing.")],
    method: _Method = "qat",
    rounding: _Rounding = "ste",
    sharpness: _Sharpness = 4.0,
    clamp: _Clamp = "hard",
    gate: _Gate = "sigmoid",
    gate_beta: _GateBeta = 4.0,
    soft_forward: _SoftForward = False,
    loss: _Loss = "kl",
    states: _States = None,
    teacher: _Teacher = None,
    freeze: _Freeze = None,
    train_norms: _Norms = None,
    steps: _Steps = None,
    epochs: _Epochs = None,
    time: _Time = None,
    data: _Data = None,
    sequences: _Sequences = None,
    own_text: _OwnText = None,
    batch_sequences: _Batch = None,
    latent_rate: Annotated[
        float | None, _rate("--latent-rate", "Adam's rate of latent weights, in steps of the grid.")
    ] = None,
    step_rate: Annotated[float | None, _rate("--step-rate", "Rate of the grid's steps, relative.")] = None,
    norm_rate: Annotated[float | None, _rate("--norm-rate", "Rate of norms and biases.")] = None,
    activation_bits: _Activations = None,
    gradient_checkpointing: _GradientCheckpointing = False,
    eval_text: options.EvalText = None,
    eval_sequences: options.EvalSequences = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = None,
    as_json: options.AsJson = False,
) -> None:
    """Train the weights of a finished RUN on the grid of its plan, to win back what rounding lost.

    Writes a run of its own: the same bytes, plan and target, evaluated beside its parent; where training did not help
    on validation text, the parent's weights are written and the report says so. Start it with torchrun or accelerate
    launch (-m cptquant recover ...) to train on several processes.
    """
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.recovery import RecoveryRequest
    from cptquant.pipeline import recover_run
    from cptquant.reports.tables import result_table

    request = RecoveryRequest.model_validate(
        {
            "method": method,
            "rounding": rounding,
            "sharpness": sharpness,
            "clamp": clamp,
            "gate": gate,
            "gate_beta": gate_beta,
            "soft_forward": soft_forward,
            "loss": loss,
            "states": states,
            "teacher": teacher,
            "freeze": tuple(name.strip() for name in (freeze or "").split(",") if name.strip()),
            "norms": train_norms,
            "steps": steps,
            "epochs": epochs,
            "seconds": None if time is None else parse_seconds(time),
            "data": data,
            "sequences": sequences,
            "own_text": own_text,
            "batch_sequences": batch_sequences,
            "latent_rate": latent_rate,
            "step_rate": step_rate,
            "norm_rate": norm_rate,
            "activation_bits": activation_bits,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed or 0,
        }
    )
    changes = options.given(eval_text=eval_text, eval_sequences=eval_sequences, trust_remote_code=trust_remote_code)
    with watch(quiet=as_json) as progress:
        result = recover_run(run, request, output, progress, **changes)
    if result is None:
        return  # another process than the first
    if as_json:
        print_json(result.evaluation)
    else:
        print_text(result_table(result.layout, result.plan, result.evaluation))
        print(f"checkpoint {result.folder / 'checkpoint'}\nreport     {result.folder / 'report.html'}")


def parse_seconds(text: str) -> float:
    """A duration such as 90s, 20min or 2h.

    Raises:
        UserError: anything else, or none.
    """
    from cptquant.core.errors import UserError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*", text)
    seconds = 0.0 if found is None else float(found[1]) * {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}[found[2]]
    if not 1 <= seconds <= 3.2e7:
        raise UserError(f"--time {text!r} is no duration from a second to a year; give e.g. 90s, 20min, 2h")
    return seconds
