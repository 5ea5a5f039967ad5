"""report.html: one self-contained page that opens offline, in light and dark, on screen and on paper.

No plotting library and no network: charts are inline SVG coloured by CSS classes, so the page follows the reader's
mode and an 80-block model still fits in a megabyte. Numbers come from the artifacts as they are; nothing is computed
here beyond sums of bytes and shares of them.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cptquant.core.artifact import write_whole
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.manifest import CheckpointRecord
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.reports import forecast_tables, headline, provenance_rows, sections
from cptquant.reports.engine_section import engine_sections
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import TASK_NAMES, spell_bytes, spell_count, spell_exact_bytes, spell_name
from cptquant.reports.recovery_section import recovery_section
from cptquant.reports.run_folder import RunRecord, read_run

if TYPE_CHECKING:
    pass

REPORT_NAME = "report.html"


def render_report(
    run: Path,  # folder with layout.json and whatever other stages have left there
) -> Path:
    """Write report.html into a run folder from the files that stand there; loads no model.

    Only layout.json is needed; every stage that is missing is named with the command that makes it.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: layout.json is missing, or a file is damaged, of another version or of another model.
        OutputError: the folder cannot be written.
    """
    path = run / REPORT_NAME
    write_whole(path, render(read_run(run)).encode())
    return path


def render(record: RunRecord) -> str:
    """The report as HTML text."""
    layout, evaluation = record.layout, record.evaluation
    context: dict[str, object] = {
        "record": record,
        "layout": layout,
        "parameter_count": spell_count(layout.parameters),
        "source_size": spell_bytes(layout.source_bytes),
        "task": TASK_NAMES.get(layout.task, layout.task),
        "missing": missing_stages(record),
        "update_command": f"cptquant quantize {shlex.quote(str(record.folder))}",
        "cards": headline.headline_cards(layout, record.written_plan, evaluation),
        "change": headline.spell_change(layout, record.written_plan, record.plan) if record.written_plan else "",
        "columns": [spell_name(name) for name in headline.comparison_columns(evaluation)] if evaluation else [],
        "variants": headline.comparison_rows(evaluation, record.written) if evaluation else [],
        "baseline_sentence": headline.spell_baselines(evaluation, record.plan) if evaluation else "",
        "sensitivities": sections.sensitivity_sections(record),
        "plans": sections.plan_sections(record),
        "beside": [[(cell, "") for cell in row] for row in _beside(record)],
        "beside_columns": forecast_tables.BESIDE_COLUMNS,
        "comparison": sections.comparison_section(record),
        "engines": engine_sections(record),
        "recovery": recovery_section(record),
        "errors": sections.error_section(record),
        "measurements": sections.measurement_rows(evaluation) if evaluation else [],
        "plan_rows": sections.plan_rows(record),
        "stages": provenance_rows.stage_rows(record),
        "commands": provenance_rows.commands(record),
        "checkpoint_size": _checkpoint_size(record),
        "versions": provenance_rows.version_rows(record),
        "digests": provenance_rows.digest_rows(record),
    }
    return load_template("report.html.jinja").render(context)


def _beside(record: RunRecord) -> list[list[str]]:
    if record.forecast is None or record.evaluation is None:
        return []
    return forecast_tables.beside_measured(record.forecast, record.evaluation)


def _checkpoint_size(record: RunRecord) -> str:
    if record.checkpoint is None:
        return ""
    return (
        f"checkpoint/ holds {spell_exact_bytes(record.checkpoint.tensor_bytes)} of tensors and "
        f"{spell_exact_bytes(record.checkpoint.header_bytes)} of safetensors headers."
    )


def missing_stages(record: RunRecord) -> dict[str, str]:
    """Section -> one sentence with the command that fills it, for every stage that has not run."""
    missing: dict[str, str] = {}
    if not record.tables:
        missing["sensitivity"] = f"Sensitivity was not measured. Measure it with: {record.command(SensitivityTable)}"
    if record.plan is None:
        missing["plan"] = f"No plan was made. Make one with: {record.command(Plan)}"
    if record.written_manifest is None:
        missing["errors"] = f"Nothing was quantized. Quantize with: {record.command(CheckpointRecord)}"
    if record.evaluation is None:
        missing["evaluation"] = f"Nothing was evaluated. Evaluate with: {record.command(EvaluationReport)}"
    return missing
