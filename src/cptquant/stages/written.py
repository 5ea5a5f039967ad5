"""What of a run folder stands written for an engine, and whether it still is what the run's weights are."""

from pathlib import Path

from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import ArtifactError
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import CheckpointRecord
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target, list_refusals
from cptquant.core.written_files import list_damage
from cptquant.stages.run import Run

_QUANTIZE = "cptquant quantize MODEL --budget BUDGET --output RUN"


def check_run(folder: Path) -> None:
    """Refuse a folder that holds no run whose weights were quantized.

    Raises:
        ArtifactError: with the command that makes one.
    """
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; make a run with: {_QUANTIZE}")
    if not (folder / "settings.json").is_file():
        raise ArtifactError(f"{folder} holds no cptquant run; make one with: {_QUANTIZE}")
    if not (folder / "layout.json").is_file() or not (folder / "checkpoint.json").is_file():
        raise ArtifactError(
            f"{folder} holds a run without a finished checkpoint (no checkpoint.json); "
            f"finish it with: cptquant quantize {folder}"
        )


def written_plan(folder: Path) -> tuple[str, Plan]:
    """(name, plan) of the weights that were written: "quantized", or what the guard preferred.

    Raises:
        ArtifactError: the run was not evaluated, so nothing was chosen yet.
    """
    name = EvaluationReport.load(folder / "evaluation.json").written or "quantized"
    return name, Plan.load(folder / ("plan.json" if name == "quantized" else f"plan-{name}.json"))


def engine_record(folder: Path, target: str, engine: str) -> ExportRecord:
    """The record of a target's files, which are whole and hold the weights that the run has now.

    Raises:
        ArtifactError: never exported, exported before the run was quantized anew, or damaged; with the command that
        writes them, or why there is none.
    """
    path = folder / "export" / target / "export.json"
    remedy = f"write them with: cptquant export {folder} --target {target}"
    if not path.is_file():
        _, plan = written_plan(folder)
        refusals = list_refusals(ModelLayout.load(folder / "layout.json"), find_target(target), plan.quant_formats)
        if refusals:
            remedy = (
                f"its plan was made for --target {plan.target} and is illegal under --target {target} ({refusals[0]}); "
                f"make a run for it with: cptquant quantize MODEL --target {target}"
            )
        raise ArtifactError(f"{folder} holds no files for {engine}; {remedy}")
    record, current = ExportRecord.load(path), CheckpointRecord.load(folder / "checkpoint.json")
    if record.inputs.get("pieces") != current.inputs.get("pieces"):
        raise ArtifactError(
            f"{path} describes files of other weights than the run has now (it was quantized anew); {remedy}"
        )
    entry = folder / record.entry
    if not record.files or not entry.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path} names no files of this run (entry {record.entry!r}); {remedy}")
    home = entry if entry.is_dir() else entry.parent
    damage = list_damage(home, record.files, record.file_sizes)
    if damage:
        raise ArtifactError(f"{damage[0]}; write it again with: cptquant export {folder} --target {target}")
    return record


def checkpoint_folder(folder: Path) -> Path:
    """checkpoint/ of a target whose files transformers loads, whole.

    Raises:
        ArtifactError: it was written for another engine, or is damaged.
    """
    record = CheckpointRecord.load(folder / "checkpoint.json")
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in record.files):
        _, plan = written_plan(folder)
        raise ArtifactError(
            f"{folder}/checkpoint was written for --target {plan.target} and holds no checkpoint of transformers; use "
            "the engine it was written for, or make a run with: cptquant quantize MODEL --target transformers"
        )
    damage = list_damage(folder / "checkpoint", record.files, record.file_sizes)
    if damage:
        raise ArtifactError(f"{damage[0]}; write it again with: cptquant quantize {folder}")
    return folder / "checkpoint"


def drop_other_exports(run: Run, pieces: str) -> None:
    """Remove the records of exports whose weights the run no longer has; files under export/TARGET/files stay.

    Args:
        pieces: digest of what the run's weights are made of now.
    """
    for path in sorted(run.folder.glob("export/*/export.json")):
        try:
            found = ExportRecord.load(path).inputs.get("pieces")
        except ArtifactError:
            found = None  # damaged, or of another version: it describes nothing
        if found != pieces:
            path.unlink()
            run.progress(f"dropped {path.relative_to(run.folder)}: it described other weights", 1, 1)
