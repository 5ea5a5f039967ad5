"""Where every file of a run came from: command, seed, device, time, memory, versions, digests."""

from dataclasses import dataclass

from cptquant.core.artifact import Artifact
from cptquant.reports.quantities import spell_decimal_bytes, spell_seconds
from cptquant.reports.run_folder import RunRecord


@dataclass(frozen=True)
class StageRow:
    """One file: `share` is its part of the longest stage's wall time, for the bar beside the number."""

    name: str
    wall: str
    cpu: str
    memory: str
    device: str
    threads: str
    seed: str
    command: str
    share: float


def stage_files(record: RunRecord) -> dict[str, Artifact]:
    """Every artifact of the run by file name, in the order of the stages."""
    files: dict[str, Artifact | None] = {"layout.json": record.layout}
    for index, table in enumerate(record.tables):
        files["sensitivity.json" if index == 0 else f"sensitivity-{table.method}.json"] = table
    files["plan.json"] = record.plan
    files |= {f"plan-{name}.json": plan for name, plan in (record.baselines or {}).items()}
    files["forecast.json"] = record.forecast
    for name, manifest in (record.manifests or {}).items():
        files["manifest.json" if name == "quantized" else f"manifest-{name}.json"] = manifest
    files["recovery.json"] = record.recovery
    files["checkpoint.json"] = record.checkpoint
    files |= {f"export/{export.target}/export.json": export for export in record.exports}
    files["evaluation.json"] = record.evaluation
    return {name: artifact for name, artifact in files.items() if artifact is not None}


def stage_rows(record: RunRecord) -> list[StageRow]:
    """One row per file."""
    files = stage_files(record)
    longest = max((artifact.provenance.wall_seconds or 0 for artifact in files.values()), default=0)
    rows: list[StageRow] = []
    for name, artifact in files.items():
        origin = artifact.provenance
        rows.append(
            StageRow(
                name=name,
                wall="–" if origin.wall_seconds is None else spell_seconds(origin.wall_seconds),
                cpu="–" if origin.cpu_seconds is None else spell_seconds(origin.cpu_seconds),
                memory="–" if origin.peak_memory_bytes is None else spell_decimal_bytes(origin.peak_memory_bytes),
                device=origin.device,
                threads="–" if origin.threads is None else str(origin.threads),
                seed="–" if origin.seed is None else str(origin.seed),
                command=origin.command,
                share=(origin.wall_seconds or 0) / longest if longest else 0,
            )
        )
    return rows


def commands(record: RunRecord) -> list[str]:
    """The commands that made the files, each once, in order."""
    return list(dict.fromkeys(row.command for row in stage_rows(record) if row.command))


def version_rows(record: RunRecord) -> list[tuple[str, str]]:
    """(package, version); where stages ran with different versions, each with the files it made."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, artifact in stage_files(record).items():
        for package, version in artifact.provenance.versions.items():
            found.setdefault(package, {}).setdefault(version, []).append(name)
    rows: list[tuple[str, str]] = []
    for package, versions in found.items():
        if len(versions) == 1:
            rows.append((package, next(iter(versions))))
        else:
            rows.append((package, "; ".join(f"{version} ({', '.join(names)})" for version, names in versions.items())))
    return rows


def digest_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """(file, what, digest): the source, every file's own digest, and what it was made from."""
    rows = [("source model", "config and weights", record.layout.source_digest)]
    for name, artifact in stage_files(record).items():
        rows.append((name, "content", artifact.digest()))
        rows += [(name, f"made from: {key}", value) for key, value in artifact.inputs.items() if value]
    if record.checkpoint is not None:
        rows += [("checkpoint/", name, value) for name, value in record.checkpoint.files.items()]
    return rows
