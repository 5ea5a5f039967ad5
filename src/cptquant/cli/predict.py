"""`cptquant predict`."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Formats = Annotated[
    str, typer.Option("--formats", help="Widths, each taken with every --group, or whole names such as int4-channel.")
]
_Group = Annotated[str, typer.Option("--group", help="Columns that share a scale, comma-separated, or channel.")]
_Quantizer = Annotated[
    str | None,
    typer.Option(
        "--quantizer",
        help="rtn, gptq, block-ap, or several, as quantize would do each (see --own-text).  [default: rtn, gptq and "
        "what quantize does by default]",
        show_default=False,
    ),
]
_OwnText = Annotated[
    int | None,
    typer.Option(
        "--own-text",
        help="As of quantize: sequences that the model writes itself; 0, or 256 and more for a law whose "
        "table has that, as `gptq + own text`.  [default: that of quantize]",
        show_default=False,
    ),
]
_Law = Annotated[
    Path | None,
    typer.Option(
        "--law", help="A fitted law: folder or law.json of `law fit ptq`.  [default: the one in the package]",
        show_default=False,
    ),
]  # fmt: skip
_Form = Annotated[
    str | None,
    typer.Option(
        "--form", help="Form of the law: error, curvature, taylor, landscape or full.  [default: the law's own]",
        show_default=False,
    ),
]  # fmt: skip
_TokensSeen = Annotated[
    float | None,
    typer.Option(
        "--tokens-seen", min=1, max=1e17, help="Training tokens of MODEL; the form error needs them.",
        show_default=False,
    ),
]  # fmt: skip


def predict(
    model: options.Model,
    formats: _Formats = "int2,int3,int4",
    group: _Group = "64",
    budget: options.BudgetText = None,
    quantizer: _Quantizer = None,
    own_text: _OwnText = None,
    law: _Law = None,
    form: _Form = None,
    tokens_seen: _TokensSeen = None,
    target: options.TargetName = None,
    calibration: options.Calibration = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write forecast.json.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict what quantization will cost MODEL, with 90 % intervals, from features of the original alone."""
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.artifact import check_writable
    from cptquant.reports.forecast_tables import forecast_table
    from cptquant.stages.predict import ForecastRequest, predict_model

    chosen = options.given(
        quantizers=None if quantizer is None else _split(quantizer),
        budget=budget,
        own_text=own_text,
        law=law,
        form=form,
        tokens_seen=tokens_seen,
        target=target,
        calibration=calibration,
        sequence_length=sequence_length,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    request = ForecastRequest(model=model, formats=_split(formats), groups=_split(group), **chosen)  # type: ignore[arg-type]
    if output is not None:
        check_writable(output)
    with watch(quiet=as_json) as progress:
        forecast = predict_model(request, progress)
    if output is not None:
        forecast.save(output)
    if as_json:
        print_json(forecast)
    else:
        print_text(forecast_table(forecast))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
