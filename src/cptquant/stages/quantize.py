"""plan.json -> quantized weights, block by block -> checkpoint/."""

from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import digest_json
from cptquant.core.engine_memory import find_context
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import CheckpointRecord, Manifest, SiteRecord
from cptquant.core.plan import Plan
from cptquant.core.written_files import digest_folder, list_damage, size_folder
from cptquant.exporters.export import find_exporter
from cptquant.models.arithmetic import describe_arithmetic
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.goes_on import GoesOn
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks, learn_blocks
from cptquant.quantizers.methods import (
    Quantizer,
    find_quantizer,
    first_pass,
    spelling_of,
    start_of,
    start_text,
)
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.refine import DIVERGENCE, refine_sites
from cptquant.stages.allocate import check_plan
from cptquant.stages.run import Run


@dataclass(frozen=True)
class Variant:
    """One way of spending the bytes: its plan and its quantized weights.

    Attributes:
        note: what was done otherwise than for the plan, for the report; empty where nothing was.
    """

    plan: Plan
    shards: ShardFolder
    note: str = ""


@dataclass(frozen=True)
class Work:
    """A quantizer and the text it reads."""

    quantizer: Quantizer
    text: TokenSet

    @classmethod
    def of_start(cls, run: Run, quantizer: Quantizer, text: TokenSet) -> "Work":
        """What learning starts from; where that reads what was given alone, the run's own text with its description."""
        return cls(quantizer, run.calibration if text.digest == run.calibration.digest else text)


def quantize_stage(
    run: Run,
    layout: ModelLayout,
    plan: Plan,
    name: str = "quantized",
    *,
    manifest: str | None = None,
    work: Work | None = None,
) -> ShardFolder:
    """plan.json -> quantized pieces under work/ (one file a block, with records) and manifest.json.

    Resumes after a kill from the last finished block, with the same bits out. Pieces live under a digest of everything
    they depend on, so equal plans share them.

    Args:
        name: for progress, and of the manifest. manifest: its file where the name does not say it.
        work: the run's own where None.
    """
    check_plan(plan, layout)
    find_exporter(plan.target).check(run.model, find_context(layout, run.settings.context))
    work = work or Work(find_quantizer(run.settings.quantizer_for(layout)), run.quantizer_text)
    quantizer, label = work.quantizer, spelling_of(work.quantizer)
    if work.text.sequence_count > run.calibration.sequence_count:
        label = run.settings.carried_out_with(layout, label)
    file_name = manifest or manifest_name(name)
    inputs, shards = _open_pieces(run, layout, plan, work)
    labels = [block_label(index) for index in range(layout.block_count)]

    def make() -> Manifest:
        _make_pieces(run, layout, plan, work, shards, name)
        records = {record.site: record for record in shards.records()}
        return Manifest(
            quantizer=label,
            settings={
                "options": repr(quantizer),
                "calibration": work.text.description,
                **({"own_text": f"none: {note}"} if (note := run.settings.own_text_note(layout)) else {}),
                "arithmetic": inputs["arithmetic"],
                **_describe_learning(quantizer, list(records.values())),
            },
            sites=tuple(records[site.name] for site in layout.sites if site.name in records),
            tensor_bytes=plan.size_bytes,
            plan_digest=plan.digest(),
            parameters=layout.parameters,
        )

    if not shards.labels.issuperset([*labels, block_label(None)]):  # pieces were removed after the manifest was made
        (run.folder / file_name).unlink(missing_ok=True)
    run.stage(file_name, Manifest, inputs, make)
    return shards


def first_pass_stage(run: Run, layout: ModelLayout, plan: Plan, name: str) -> ShardFolder:
    """As `quantize_stage`, up to what learning starts from: GPTQ."""
    manifest = "work/manifest-start.json" if name == "quantized" else manifest_name(name)
    work = Work.of_start(run, *first_pass(find_quantizer(run.settings.quantizer_for(layout)), run.quantizer_text))
    return quantize_stage(run, layout, plan, name, manifest=manifest, work=work)


def manifest_name(name: str) -> str:
    """Of a variant's manifest in the run folder."""
    return "manifest.json" if name == "quantized" else f"manifest-{name}.json"


def _open_pieces(run: Run, layout: ModelLayout, plan: Plan, work: Work) -> tuple[dict[str, str], ShardFolder]:
    """What the pieces depend on, and the folder named after it."""
    inputs = {
        "plan": digest_json(plan.formats),
        "tokens": work.text.digest,
        "quantizer": repr(work.quantizer),
        "arithmetic": describe_arithmetic(getattr(work.quantizer, "coarse_products", False)),
        "layout": layout.digest(),
    }
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    shards = ShardFolder(run.folder / "work" / digest_json(inputs)[:16], plan.quant_formats, shapes)
    for sentence in shards.damaged:
        run.progress(f"made anew: {sentence}", 1, 1)
    return inputs, shards


def _make_pieces(run: Run, layout: ModelLayout, plan: Plan, work: Work, shards: ShardFolder, name: str) -> None:
    """Fill the folder, from where an earlier call was killed.

    What learning goes on from has pieces of its own: GPTQ on the given text, shared with `--quantizer gptq --own-text
    0`, and Block-AP, shared with `--quantizer block-ap` on the same text. Block-AP goes on after the last finished
    block; a run killed in KL rounding learns again from there, with the same result.
    """
    quantizer, text = work.quantizer, work.text

    def keep(index: int | None, weights: dict[str, StoredWeight], records: list[SiteRecord]) -> None:
        shards.save(block_label(index), weights, records)

    labels = [block_label(index) for index in range(layout.block_count)]
    finished = {index: shards.piece(label) for index, label in enumerate(labels) if label in shards.labels}
    if isinstance(quantizer, LearnedBlocks | KlRounding):
        start = Work.of_start(run, start_of(quantizer), start_text(quantizer, text))
        _, first = _open_pieces(run, layout, plan, start)
        if not first.labels.issuperset([*labels, block_label(None)]):
            _make_pieces(run, layout, plan, start, first, name)
        told = f"{'train blocks' if isinstance(quantizer, LearnedBlocks) else 'learn rounding'} ({name})"

        def progress(done: int, total: int) -> None:
            run.progress(told, done, total)

        if isinstance(quantizer, LearnedBlocks):
            learn_blocks(run.model, quantizer, text, first, keep, resume=finished, progress=progress)
        else:
            refine_sites(run.model, quantizer, text, first, keep, progress)
        return
    quantize_sites(
        run.model, plan, quantizer, text, keep, resume=finished,
        progress=lambda done, total: run.progress(f"quantize ({name})", done, total),
    )  # fmt: skip


def _describe_learning(quantizer: Quantizer, records: list[SiteRecord]) -> dict[str, str]:
    """What learned rounding brought, for the manifest's settings; nothing of other quantizers.

    The held-out value is the best of a few looks, which also chose: slightly optimistic, as it says.
    """
    if not isinstance(quantizer, GoesOn):
        return {}
    found = [record.learning for record in records if record.learning is not None]
    if not found:
        return {"learning": "no site could be learned: all have 16 bits or groups of mixed width"}
    # KL rounding leaves groups of mixed width as its start trained them, with that start's objective.
    objectives = {entry.objective for entry in found}
    last = DIVERGENCE if DIVERGENCE in objectives else found[0].objective
    learned = [entry for entry in found if entry.objective == last]
    before = sum(entry.held_out_before for entry in learned) / len(learned)
    after = sum(entry.held_out_after for entry in learned) / len(learned)
    kept = sum(entry.held_out_after >= entry.held_out_before for entry in learned)
    changed = sum(entry.codes_changed for entry in learned) / len(learned)
    text = (
        f"{learned[0].objective} on calibration text held out of learning, the best of a few looks: {before:.4g} -> "
        f"{after:.4g}, {changed:.1%} of the codes changed (means over {len(learned)} sites); first solution kept at "
        f"{kept}"
    )
    mixed = [record for record in records if QuantFormat.parse(record.format).storage == "segments"]
    left = sum(record.learning is None or record.learning.objective != last for record in mixed)
    if left:
        text += f"; {left} sites with groups of mixed width cannot be learned so and stay as the pass before left them"
    if early := [entry.stopped for entry in found if entry.stopped]:
        text += f"; {early[0]} (at {len(early)} sites)"
    return {"learning": text}


def write_stage(run: Run, variant: Variant) -> Path:
    """checkpoint/: the chosen weights as the target's engine loads them; skipped if it already holds them, whole.

    Every file that was written is compared by size and sha256 (about 1 GB/s); where one is missing, cut short or
    altered, the folder is written again from the pieces.
    """
    folder, exporter = run.folder / "checkpoint", find_exporter(variant.plan.target)
    inputs = {"plan": variant.plan.digest(), "pieces": variant.shards.folder.name}
    context = find_context(run.model.layout, run.settings.context)
    if exporter.fixes_context:
        inputs["context"] = str(context)

    def make() -> CheckpointRecord:
        written = exporter.write(run.model, variant.plan, variant.shards, folder, context)
        return CheckpointRecord(
            tensor_bytes=written.tensor_bytes,
            header_bytes=written.header_bytes,
            files=digest_folder(folder),
            file_sizes=size_folder(folder),
        )

    run.stage(
        "checkpoint.json", CheckpointRecord, inputs, make,
        damage=lambda found: list_damage(folder, found.files, found.file_sizes),
    )  # fmt: skip
    return folder


def block_label(block_index: int | None) -> str:
    """Name of the piece that holds a block, or the sites outside all blocks."""
    return "outer" if block_index is None else f"block-{block_index:04d}"
