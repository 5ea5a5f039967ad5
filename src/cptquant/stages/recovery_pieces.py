"""What a recovered run folder holds and shares with its parent: weights before and after, as pieces under work/."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import digest_json, output_error
from cptquant.core.errors import ArtifactError
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.manifest import LearningRecord, Manifest, SiteRecord
from cptquant.core.plan import Plan
from cptquant.core.recovery import RecoveryRecord
from cptquant.models.stream import read_weight
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.results import relative_error
from cptquant.stages.quantize import Variant, block_label, quantize_stage
from cptquant.stages.run import Run
from cptquant.stages.written import written_plan

PARENT = "parent"
RECORD = "recovery.json"


@dataclass(frozen=True)
class Parent:
    """The run that is trained on.

    Attributes:
        run: looked at, never changed. plan, name: of the weights that it wrote. shards: these weights.
        manifest: how each site was quantized.
    """

    run: Run
    layout: ModelLayout
    plan: Plan
    name: str
    shards: ShardFolder
    manifest: Manifest


@dataclass(frozen=True)
class Learned:
    """Held-out loss before and after, and what it is."""

    objective: str
    before: float
    after: float


def run_parent(folder: Path) -> str:
    """Where a recovered run came from, as it was given."""
    return RecoveryRecord.load(folder / RECORD).parent


def open_parent(run: Run) -> Parent:
    """What a finished run wrote.

    Raises:
        ArtifactError: it is not finished, or its pieces are gone and cannot be made anew.
    """
    name, plan = written_plan(run.folder)
    layout = run.load("layout.json", ModelLayout)
    if is_recovered(run.folder):
        variant = recovered_variants(run, layout)[name]
        manifest = run.load("manifest.json", Manifest)
        return Parent(run, layout, plan, name, variant.shards, manifest)
    shards = quantize_stage(run, layout, plan, name)
    file_name = "manifest.json" if name == "quantized" else f"manifest-{name}.json"
    return Parent(run, layout, plan, name, shards, run.load(file_name, Manifest))


def is_recovered(folder: Path) -> bool:
    """Whether a run folder was made by `cptquant recover`."""
    return (folder / RECORD).is_file()


def recovered_variants(run: Run, layout: ModelLayout) -> dict[str, Variant]:
    """The trained weights, and those that training started from, from the pieces that stand in the run folder.

    Raises:
        ArtifactError: pieces are missing or damaged, or plan.json was changed since.
    """
    record, plan = run.load(RECORD, RecoveryRecord), run.load("plan.json", Plan)
    remedy = f"make it anew with: cptquant recover {record.parent} --output {run.folder}"
    if record.inputs.get("plan") != digest_json(plan.formats):
        raise ArtifactError(f"{run.folder}/plan.json was changed after its weights were trained; {remedy}")
    wanted = {*(block_label(index) for index in range(layout.block_count)), block_label(None)}
    found: dict[str, Variant] = {}
    for name, pieces, norms in (
        ("quantized", record.pieces, record.norms),
        (PARENT, record.parent_pieces, record.parent_norms),
    ):
        shards = pieces_of(run, layout, plan, pieces)
        if not shards.labels.issuperset({*wanted, *norms}):
            damage = shards.damaged[0] if shards.damaged else f"{shards.folder} lacks pieces"
            raise ArtifactError(f"{damage}; {remedy}")
        found[name] = Variant(plan, shards)
    return found


def pieces_of(run: Run, layout: ModelLayout, plan: Plan, name: str) -> ShardFolder:
    """The folder work/NAME of a run, opened."""
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    return ShardFolder(run.folder / "work" / name, plan.quant_formats, shapes)


def adopt_parent(run: Run, parent: Parent) -> dict[str, Variant]:
    """Copy what the new run shares with its parent: layout, plan, and the weights that training starts from."""
    parent.layout.save(run.folder / "layout.json")
    for name in ("plan.json", "plan-parent.json"):
        parent.plan.save(run.folder / name)
    target = run.folder / "work" / parent.shards.folder.name
    try:
        for table in parent.run.folder.glob("sensitivity*.json"):  # for the report and explain
            shutil.copyfile(table, run.folder / table.name)
        if (
            not target.exists()
            or pieces_of(run, parent.layout, parent.plan, target.name).labels != parent.shards.labels
        ):
            shutil.rmtree(target, ignore_errors=True)
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(parent.shards.folder, partial)
            partial.replace(target)
    except OSError as error:
        raise output_error(target, error) from None
    return {PARENT: Variant(parent.plan, pieces_of(run, parent.layout, parent.plan, target.name))}


def block_records(
    run: Run, parent: Parent, index: int | None, weights: Mapping[str, StoredWeight], learned: Learned
) -> list[SiteRecord]:
    """The parent's records of a block, with what training did to each site; output errors are not known any more."""
    before = {record.site: record for record in parent.manifest.sites}
    found: list[SiteRecord] = []
    for site in parent.layout.sites:
        if site.block_index == index and site.name in before:
            record, stored = before[site.name], weights.get(site.name)
            found.append(record if stored is None else _trained_record(run, parent, site, record, stored, learned))
    return found


def _trained_record(
    run: Run, parent: Parent, site: Site, before: SiteRecord, stored: StoredWeight, learned: Learned
) -> SiteRecord:
    original = read_weight(run.model.module.get_submodule(site.name), site).detach()
    start = parent.shards.quantized(site.name)
    assert start is not None
    learning = LearningRecord(
        objective=learned.objective,
        held_out_before=learned.before,
        held_out_after=learned.after,
        codes_changed=float((stored.codes != start.codes).float().mean()),
    )
    error = relative_error(original, stored)
    return before.model_copy(
        update={"relative_weight_error": error, "relative_output_error": None, "learning": learning}
    )


def lost_norms(shards: ShardFolder, record: RecoveryRecord) -> list[str]:
    """One sentence where pieces with norms and biases are gone: weights without them would be another model."""
    lost = set(record.norms) - shards.labels
    return [f"{shards.folder} lacks pieces with norms and biases"] if lost else []


def changed_share(parent: Parent, shards: ShardFolder) -> float:
    """Share of all codes of the blocks that differ from the parent's."""
    changed = count = 0
    for site in parent.layout.block_sites:
        before, after = parent.shards.quantized(site.name), shards.quantized(site.name)
        if before is not None and after is not None:
            changed += int((after.codes != before.codes).sum())
            count += before.codes.numel()
    return changed / max(1, count)


def write_manifest(run: Run, parent: Parent, shards: ShardFolder, record: RecoveryRecord) -> None:
    """manifest.json of the trained weights."""
    records = {found.site: found for found in shards.records()}
    start = {name: value for name, value in parent.manifest.settings.items() if name not in ("written", "guard")}
    Manifest(
        quantizer=f"{parent.manifest.quantizer} + {record.request.method}",
        settings={**start, **{f"recovery: {name}": text for name, text in record.options.items()}},
        sites=tuple(records[site.name] for site in parent.layout.sites if site.name in records),
        tensor_bytes=parent.plan.size_bytes,
        plan_digest=parent.plan.digest(),
        parameters=parent.layout.parameters,
        inputs={"recovery": record.digest()},
    ).save(run.folder / "manifest.json")
