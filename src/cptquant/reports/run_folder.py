"""What stands in a run folder: every artifact that is there, and a sentence for each stage that is not."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cptquant.core.artifact import Artifact, digest_json
from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import ArtifactError
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import PtqForecast
from cptquant.core.frontier import Frontier
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import CheckpointRecord, Manifest
from cptquant.core.plan import Plan
from cptquant.core.recovery import RecoveryRecord
from cptquant.core.sensitivity import SensitivityTable

A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class FrontierPoint:
    """One vertex of frontier.json: bytes of all tensors, and the damage its table predicts."""

    size_bytes: float
    predicted_damage: float


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        tables: sensitivity tables, the one that the plan was made from first.
        plan: what the allocator proposed. baselines: plan-NAME.json by name.
        manifests: "quantized" and baselines by name. forecast: what was expected before quantizing.
        exports: export/TARGET/export.json of every target. recovery: of a run that was trained further.
        stale: one sentence for each file that was made from something other than what stands beside it.
    """

    folder: Path
    layout: ModelLayout
    tables: tuple[SensitivityTable, ...] = ()
    plan: Plan | None = None
    baselines: dict[str, Plan] | None = None
    manifests: dict[str, Manifest] | None = None
    checkpoint: CheckpointRecord | None = None
    evaluation: EvaluationReport | None = None
    forecast: PtqForecast | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    exports: tuple[ExportRecord, ...] = ()
    recovery: RecoveryRecord | None = None
    stale: tuple[str, ...] = ()

    @property
    def written(self) -> str:
        """Which variant's weights are in checkpoint/: "quantized", or a baseline where the guard chose it."""
        chosen = self.evaluation.written if self.evaluation else None
        return chosen if chosen is not None and chosen in (self.baselines or {}) else "quantized"

    @property
    def written_plan(self) -> Plan | None:
        """The plan of what was written."""
        return self.plan if self.written == "quantized" else (self.baselines or {})[self.written]

    @property
    def written_manifest(self) -> Manifest | None:
        """The site records of what was written."""
        return (self.manifests or {}).get(self.written)

    def command(self, kind: type[Artifact]) -> str:
        """The command that makes a file of this kind, with this run's folder filled in."""
        return kind.MADE_BY.replace("RUN", shlex.quote(str(self.folder)))


def read_run(folder: Path) -> RunRecord:
    """Read everything a report can show; only layout.json is needed.

    Raises:
        ArtifactError: layout.json is missing, a file is damaged or of another version, or a file names sites that the
            layout does not have.
    """
    layout = ModelLayout.load(folder / "layout.json")
    tables = _read_tables(folder)
    plan = _read(folder / "plan.json", Plan)
    baselines = {_suffix(path, "plan"): Plan.load(path) for path in sorted(folder.glob("plan-*.json"))}
    manifests = {_suffix(path, "manifest"): Manifest.load(path) for path in sorted(folder.glob("manifest-*.json"))}
    manifest = _read(folder / "manifest.json", Manifest)
    if manifest is not None:
        manifests = {"quantized": manifest, **manifests}
    for table in tables:
        _check_sites(layout, table, "sensitivity.json", list(table.damages))
    for name, found in (("plan", plan), *baselines.items()):
        if found is not None:
            _check_sites(layout, found, f"{name}.json" if found is plan else f"plan-{name}.json", list(found.formats))
    for name, found in manifests.items():
        file_name = "manifest.json" if name == "quantized" else f"manifest-{name}.json"
        _check_sites(layout, found, file_name, [record.site for record in found.sites])
    record = RunRecord(
        folder=folder,
        layout=layout,
        tables=tables,
        plan=plan,
        baselines=baselines,
        manifests=manifests,
        checkpoint=_read(folder / "checkpoint.json", CheckpointRecord),
        evaluation=_read(folder / "evaluation.json", EvaluationReport),
        forecast=_read(folder / "forecast.json", PtqForecast),
        frontier=_read_frontier(folder / "frontier.json"),
        exports=tuple(ExportRecord.load(path) for path in sorted(folder.glob("export/*/export.json"))),
        recovery=_read(folder / "recovery.json", RecoveryRecord),
    )
    return _with_stale(record)


def _read(path: Path, kind: type[A]) -> A | None:
    return kind.load(path) if path.exists() else None


def _suffix(path: Path, stem: str) -> str:
    return path.stem.removeprefix(f"{stem}-")


def _read_tables(folder: Path) -> tuple[SensitivityTable, ...]:
    """sensitivity.json first; a sensitivity-METHOD.json that repeats its content is not shown twice."""
    paths = [folder / "sensitivity.json", *sorted(folder.glob("sensitivity-*.json"))]
    tables: dict[str, SensitivityTable] = {}
    for path in paths:
        if path.exists():
            table = SensitivityTable.load(path)
            tables.setdefault(table.digest(), table)
    return tuple(tables.values())


def _check_sites(layout: ModelLayout, artifact: Artifact, file_name: str, names: list[str]) -> None:
    unknown = [name for name in names if name not in layout.site_by_name]
    if unknown:
        raise ArtifactError(
            f"{file_name} names {len(unknown)} sites that layout.json does not have (first: {unknown[0]!r}); "
            f"make it anew with: {artifact.MADE_BY}"
        )


def _read_frontier(path: Path) -> tuple[FrontierPoint, ...]:
    """The vertices that hurt; the last ones, at 16 bits, have no place on a logarithmic axis."""
    found = _read(path, Frontier)
    vertices = () if found is None else found.vertices
    return tuple(FrontierPoint(vertex.size_bytes, vertex.damage) for vertex in vertices if vertex.damage > 0)


def _with_stale(record: RunRecord) -> RunRecord:
    """A later `allocate` leaves an older manifest and evaluation in place; a report must not mix them silently."""
    sentences: list[str] = []
    manifests = record.manifests or {}
    plans = {"quantized": record.plan, **(record.baselines or {})}
    for name, manifest in manifests.items():
        plan = plans.get(name)
        if plan is not None and manifest.inputs.get("plan", "") not in ("", digest_json(dict(plan.formats))):
            what = "manifest.json" if name == "quantized" else f"manifest-{name}.json"
            sentences.append(f"{what} was made from another plan than the one beside it.")
    evaluation, written = record.evaluation, record.written_plan
    if evaluation is not None and written is not None:
        known = evaluation.inputs.get("plan quantized", "")
        if known not in ("", digest_json(dict(written.formats))):
            sentences.append("evaluation.json was made from another plan than the one beside it.")
    for export in record.exports:
        if written is None:
            break
        known = export.inputs.get("plan", "")
        there = written.model_copy(update={"target": export.target, "size_bytes": export.tensor_bytes})
        if known not in ("", there.digest()):  # as `export` makes the plan of another target
            sentences.append(f"export/{export.target}/export.json was made from another plan than the one beside it.")
    return replace(record, stale=tuple(sentences))
