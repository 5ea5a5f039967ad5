"""Laws in the terminal."""

from collections.abc import Mapping, Sequence

from cptquant.core.laws import Interval, LawFit, LossFit, Optimum
from cptquant.reports.law import LOSS_NAMES, spell_interval, spell_range
from cptquant.reports.quantities import spell_number
from cptquant.reports.tables import TextTable, render_text

Row = Mapping[str, str | int | float]


def law_table(law: LawFit) -> str:
    """Parameters with intervals, statuses and requirement checks of every loss."""
    tables = [_parameters(name, fit) for name, fit in law.fits.items()]
    if law.notes:
        tables.append(TextTable("", (), [], lines=law.notes))
    return render_text(*tables)


def _parameters(name: str, fit: LossFit) -> TextTable:
    rows = [
        [
            parameter.name,
            spell_number(parameter.value, 4),
            "held" if parameter.fixed else f"{spell_number(parameter.low)} to {spell_number(parameter.high)}",
            "on its bound" if parameter.at_bound else "" if parameter.identified else "not identified",
        ]
        for parameter in fit.parameters
    ]
    lines = [f"{fit.rows} rows of {fit.runs} runs; R2 of the fit {fit.r2:.5f}, mean residual {fit.mae_nats:.4f} nats"]
    lines += [f"{status.value}: {status.sentence}" for status in fit.statuses]
    lines += [
        f"“{check.name}” is violated on {100 * check.violated_share:.0f} % of the data's range"
        for check in fit.requirements
        if check.violated_share > 0
    ]
    title = f"{LOSS_NAMES[name]}: {fit.equation} (N, D in billions)"
    columns = ("Parameter", "Value", "90% interval over runs", "")
    return TextTable(title, columns, rows, left=(0, 3), lines=tuple(lines))


def prediction_table(losses: Mapping[str, Interval | None]) -> str:
    """Losses with the interval in which a new run will come out."""
    rows = [[LOSS_NAMES[name], spell_interval(found)] for name, found in losses.items()]
    return render_text(TextTable("Prediction, nats per token", ("Loss", "Value (90% interval of a new run)"), rows))


def optimum_table(optimum: Optimum) -> str:
    """An optimum with its intervals."""
    rows = [
        ["N", spell_range(optimum.N)],
        ["D", spell_range(optimum.D)],
        ["r", spell_interval(optimum.r)],
        ["general loss", spell_interval(optimum.general_nll)],
        ["domain loss", spell_interval(optimum.domain_nll)],
        ["status", optimum.status.value.replace("_", " ")],
    ]
    return render_text(TextTable("Optimum", ("", "Value (90% interval)"), rows))


def transfer_table(rows: Sequence[tuple[str, Interval, Interval | None]]) -> str:
    """Domain coefficient and predicted loss by domain."""
    cells = [[domain, spell_interval(k), spell_interval(loss)] for domain, k, loss in rows]
    return render_text(TextTable("Transfer", ("Domain", "K", "Domain loss, nats per token"), cells))


def comparison_table(rows: Sequence[Row]) -> str:
    """Held-out errors by form, best first within a loss."""
    cells = [
        [
            LOSS_NAMES[str(row["target"])],
            str(row["form"]),
            f"{row['r2']:.4f}",
            f"{row['mae_nats']:.4f} ± {row['mae_stderr']:.4f}",
            f"{row['mae_of_differences']:.4f}",
            f"{row['worst_nats']:.3f}",
            f"{row['rows']} of {row['runs']}",
        ]
        for row in sorted(rows, key=lambda row: (str(row["target"]), float(row["mae_nats"])))
    ]
    columns = ("Loss", "Form", "R2", "Error, nats", "Of differences", "Worst", "Rows of runs")
    lines = ("Error: mean absolute, ± standard error over runs. Of differences: each size's mean error taken off.",)
    return render_text(TextTable("Errors on what was held out", columns, cells, left=(0, 1), lines=lines))


def ptq_law_table(
    form: str, rows: int, families: Sequence[str], held_out: Mapping[str, Mapping[str, float | int | None]]
) -> str:
    """How well each form of the PTQ law predicts model families that it was not fitted on.

    Args:
        form: the one that predictions use. rows, families: of the table it was fitted on.
        held_out: form -> its scores, named as in `HeldOutScores`.
    """
    names = ("r2_log_kl", "median_kl_factor", "median_error_3bit_nats", "coverage_rise")
    lines = [
        [
            name + (" (used)" if name == form else ""),
            *("" if s[n] is None else spell_number(s[n] or 0.0) for n in names),
        ]
        for name, s in held_out.items()
    ]
    columns = ("Form", "R2 of ln KL", "KL off by a factor of", "Rise at 3+ bits off by, nats", "Rise in 90% interval")
    title = f"PTQ law from {rows} rows of {len(families)} families; scores on families left out"
    return render_text(TextTable(title, columns, lines, left=(0,)))
