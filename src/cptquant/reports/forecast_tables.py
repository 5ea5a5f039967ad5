"""Forecasts as tables: what is expected, and beside it what was measured."""

from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import Interval, PtqForecast
from cptquant.reports.quantities import spell_bytes, spell_number
from cptquant.reports.tables import TextTable, render_text

METHOD_LABELS = {
    "rtn": "round to nearest",
    "gptq": "GPTQ",
    "gptq + own text": "GPTQ, own text",
    "block-ap + own text": "Block-AP, own text",
}


def spell_interval(interval: Interval) -> str:
    """`0.0531 (0.0441 to 0.0639)`."""
    return f"{spell_number(interval.value)} ({spell_number(interval.low)} to {spell_number(interval.high)})"


def forecast_rows(forecast: PtqForecast) -> TextTable:
    """`predict`: a row per plan and method."""
    rows = [
        [
            row.plan,
            METHOD_LABELS.get(row.method, row.method),
            spell_bytes(row.size_bytes),
            f"{row.bits_per_weight:.3f}",
            spell_interval(row.prediction.rise_nats),
            spell_number(row.prediction.nll_nats.value, 4),
            spell_number(row.prediction.perplexity.value),
            spell_interval(row.prediction.kl_nats),
        ]
        for row in forecast.rows
    ]
    lines = [
        f"Original: {forecast.original_nll_nats:.4f} nats per token on a part of {forecast.text}.",
        "NLL and perplexity are the original's on that text with the rise added; on another text add the rise to the "
        "original's NLL there.",
        f"Intervals, of rise and KL, are made to hold 90 % of families of models left out of the law ({forecast.law}).",
    ]
    outside = sorted({name for row in forecast.rows for name in row.prediction.outside})
    if outside:
        lines.append(
            f"Outside the range the law was fitted on: {', '.join(outside)}. The intervals do not cover that; "
            "quantize and evaluate before you rely on it."
        )
    columns = ("Plan", "Method", "Size", "Bits/weight", "Rise of the NLL", "NLL", "Perplexity", "KL, nats/token")
    return TextTable(forecast.model, columns, rows, left=(0, 1), lines=tuple(lines))


def forecast_table(forecast: PtqForecast) -> str:
    """`forecast_rows` as text."""
    return render_text(forecast_rows(forecast))


_MEASURED = (
    ("KL, nats/token", "kl_nats", "kl_nats_per_token"),
    ("rise of the NLL, nats/token", "rise_nats", "nll_increase_nats_per_token"),
)


def beside_measured(forecast: PtqForecast, evaluation: EvaluationReport) -> list[list[str]]:
    """Variant, quantity, predicted with interval, measured with error, and whether the interval holds it."""
    rows: list[list[str]] = []
    for row in forecast.rows:
        if not evaluation.carried_out(row.plan):
            continue
        for label, field, name in _MEASURED:
            found = evaluation.find(name, row.plan)
            if found is None:
                continue
            interval: Interval = getattr(row.prediction, field)
            error = "" if found.stderr is None else f" ± {spell_number(found.stderr)}"
            inside = "yes" if interval.low <= found.value <= interval.high else "no"
            rows.append([row.plan, label, spell_interval(interval), spell_number(found.value) + error, inside])
    return rows


BESIDE_COLUMNS = ("Variant", "Quantity", "Predicted (90 % interval)", "Measured", "Inside")


def beside_rows(forecast: PtqForecast, evaluation: EvaluationReport) -> TextTable:
    """The end of `quantize`: what the law expected beside what came out."""
    return TextTable(
        "Predicted before quantizing, measured after",
        BESIDE_COLUMNS,
        beside_measured(forecast, evaluation),
        left=(0, 1, 2),
        lines=(f"Law: {forecast.law}; features from calibration text, measured on test text.",),
    )
