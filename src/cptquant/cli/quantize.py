"""`cptquant quantize`: the whole chain, or the rest of it from a run folder with a plan."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print sizes, expected time and memory; spend neither, write nothing.")
]
FAST: dict[str, object] = {
    "calibration_sequences": 64,
    "eval_sequences": 32,
    "baselines": ("uniform",),
    "predict": False,
}
"""What `--fast` stands for, with GPTQ, and `own_text` 0 unless learning needs it; flags that are given go before it."""
_Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="GPTQ on half the text, none of the model's own, no forecast, no random baseline: --quantizer gptq "
        "--calibration-sequences 64 --eval-sequences 32 --own-text 0 (but for block-ap and kl-rounding) --baselines "
        "uniform --no-predict, each unless given.",
    ),
]
_Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        help="Also quantize and evaluate at no more bytes: uniform, random, and under --target gguf preset (types of "
        "llama.cpp's presets). The guard needs uniform and preset.  [default: all but random; for gptq and rtn "
        "below 50M parameters random too]",
        show_default=False,
    ),
]

_Predict = Annotated[
    bool | None,
    typer.Option("--predict/--no-predict", help="Predict the losses of a causal language model before quantizing it.  "
                 "[default: predict below 50M parameters]", show_default=False),
]  # fmt: skip
_Record = Annotated[
    Path | None,
    typer.Option("--record", help="Append features and losses of this run to a local table of observations, from which "
                 "the PTQ law can be fitted anew. A model's family, which is held out together, is its folder's name; "
                 "rows that are there already are not added again.", show_default=False),
]  # fmt: skip
_TokensSeen = Annotated[
    float | None,
    typer.Option(
        "--tokens-seen", min=1, max=1e17, help="Training tokens of MODEL, for --record; the form error needs them.",
        show_default=False,
    ),
]  # fmt: skip


def quantize(
    model: options.ModelOrRun,
    budget: options.BudgetText = None,
    memory: options.Memory = None,
    context: options.Context = None,
    output: options.Output = None,
    sensitivity: options.Sensitivity = None,
    allocator: options.Allocator = None,
    refine_swaps: options.RefineSwaps = None,
    quantizer: options.Quantizer = None,
    target: options.TargetName = None,
    formats: options.Formats = None,
    calibration: options.Calibration = None,
    eval_text: options.EvalText = None,
    calibration_sequences: options.CalibrationSequences = None,
    own_text: options.OwnText = None,
    eval_sequences: options.EvalSequences = None,
    sequence_length: options.SequenceLength = None,
    baselines: _Baselines = None,
    predict: _Predict = None,
    record: _Record = None,
    tokens_seen: _TokensSeen = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = None,
    fast: _Fast = False,
    dry_run: _DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize MODEL under a budget: measure, allocate, quantize, evaluate, guard, report.

    With a RUN folder instead of a model, goes on from its plan.json (which may have been edited).
    """
    changes = options.given(
        budget=budget,
        memory=memory,
        context=context,
        sensitivity=sensitivity,
        allocator=allocator,
        refine_swaps=refine_swaps,
        quantizer=quantizer,
        target=target,
        formats=formats,
        calibration=calibration,
        eval_text=eval_text,
        calibration_sequences=calibration_sequences,
        own_text=own_text,
        eval_sequences=eval_sequences,
        sequence_length=sequence_length,
        baselines=_split(baselines),
        predict=_wants_forecast(predict, record, tokens_seen),
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    if fast:
        changes = fast_changes(model, changes) | changes
    if dry_run:
        _print_estimate(model, changes, as_json)
        return
    from cptquant.cli.terminal import print_json, print_text, warn, warn_of_memory, watch
    from cptquant.pipeline import quantize_model, quantize_run
    from cptquant.reports.forecast_tables import beside_rows
    from cptquant.reports.tables import render_text, result_table
    from cptquant.stages.predict import check_record, record_run

    if record is not None:
        check_record(record, output)
    with watch(quiet=as_json) as progress:
        if _is_run(model):
            result = quantize_run(Path(model), progress, **changes)
        else:
            result = quantize_model(model, *_required(changes, output), progress, **changes)
    if record is not None:
        added = record_run(result.folder, record, tokens_seen=tokens_seen)
        warn(f"{record}: {added} rows added" + ("" if added else "; this run's rows are there already"))
    warn_of_memory(result.exported)
    if as_json:
        print_json(result.evaluation)
    else:
        print_text(result_table(result.layout, result.plan, result.evaluation))
        if result.forecast is not None:
            print_text(render_text(beside_rows(result.forecast, result.evaluation)))
        print(f"checkpoint {result.folder / 'checkpoint'}\nreport     {result.folder / 'report.html'}")


def fast_changes(model: str, changes: dict[str, object]) -> dict[str, object]:
    """Learning keeps its own text, without which it learns the given text by heart."""
    from cptquant.core.settings import RunSettings

    before = RunSettings.load(Path(model) / "settings.json") if _is_run(model) else RunSettings(model=model)
    quantizer = changes.get("quantizer", before.quantizer) or "gptq"
    learned = quantizer in ("block-ap", "kl-rounding")
    return FAST | {"quantizer": quantizer} | ({} if learned else {"own_text": 0})


def _wants_forecast(predict: bool | None, record: Path | None, tokens_seen: float | None) -> bool | None:
    """A record needs a forecast, whatever the size of the model."""
    from cptquant.core.errors import UserError

    if record is None and tokens_seen is not None:
        raise UserError(f"--tokens-seen {tokens_seen:g} goes with --record; add --record FILE, or leave it out")
    if record is None:
        return predict
    if predict is False:
        raise UserError(f"--record {record} writes what was predicted beside what was measured; leave out --no-predict")
    return True


def _split(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _required(changes: dict[str, object], output: Path | None) -> tuple[str | None, Path]:
    from cptquant.core.errors import UserError

    budget = changes.pop("budget", None)
    if budget is None and changes.get("memory") is None:
        raise UserError("no budget was given; add --budget, e.g. --budget 4bpw, 25%, 12MB")
    if output is None:
        raise UserError("no output folder was given; add --output, e.g. --output runs/first")
    return None if budget is None else str(budget), output


def _is_run(name: str) -> bool:
    return (Path(name) / "settings.json").is_file()


def _print_estimate(model: str, changes: dict[str, object], as_json: bool) -> None:
    from cptquant.cli.terminal import print_json, print_text
    from cptquant.core.settings import RunSettings
    from cptquant.reports.tables import estimate_table
    from cptquant.stages.estimate import estimate_run
    from cptquant.stages.own_text_choice import carry_own_text

    if _is_run(model):
        settings = carry_own_text(Path(model), RunSettings.load(Path(model) / "settings.json"))
        settings = settings.model_copy(update=changes)
    else:
        settings = RunSettings.model_validate({"model": model, **changes})
    estimate = estimate_run(settings)
    if as_json:
        print_json(estimate)
    else:
        print_text(estimate_table(estimate))
