"""plan.json -> quantized weights, block by block -> checkpoint/."""

from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import digest_file, digest_json
from cptquant.core.export import ExportReport
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import CheckpointRecord, Manifest
from cptquant.core.plan import Plan
from cptquant.exporters.compressed_tensors import check_exportable, write_checkpoint
from cptquant.exporters.gguf.read_back import check_tensors
from cptquant.exporters.gguf.write import FILE_NAME, check_gguf_exportable, write_gguf
from cptquant.exporters.llamacpp.check import BOUND_NATS, check_token_ids, compare_in_engine
from cptquant.exporters.llamacpp.engine import INSTALL, LlamaCpp, find_llamacpp
from cptquant.models.load import LoadedModel
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.stages.allocate import check_plan
from cptquant.stages.run import Run


@dataclass(frozen=True)
class Variant:
    """One way of spending the bytes: its plan and its quantized weights."""

    plan: Plan
    shards: ShardFolder


def quantize_stage(run: Run, layout: ModelLayout, plan: Plan, name: str = "quantized") -> ShardFolder:
    """plan.json -> quantized pieces under work/ (one file a block, with records) and manifest.json.

    Resumes after a kill from the last finished block, with the same bits out. Pieces live under a digest of everything
    they depend on, so equal plans share them.
    """
    check_plan(plan, layout)
    check_model(run.model, plan.target)
    quantizer = find_quantizer(run.settings.quantizer)
    inputs = {
        "plan": digest_json(plan.formats),
        "tokens": run.calibration.digest,
        "quantizer": repr(quantizer),
        "layout": layout.digest(),
    }
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    shards = ShardFolder(run.folder / "work" / digest_json(inputs)[:16], plan.quant_formats, shapes)

    labels = [block_label(index) for index in range(layout.block_count)]

    def make() -> Manifest:
        quantize_sites(
            run.model, plan, quantizer, run.calibration,
            lambda index, weights, records: shards.save(block_label(index), weights, records),
            resume={index: shards.piece(label) for index, label in enumerate(labels) if label in shards.labels},
            progress=lambda done, total: run.progress(f"quantize ({name})", done, total),
        )  # fmt: skip
        records = {record.site: record for record in shards.records()}
        return Manifest(
            quantizer=run.settings.quantizer,
            settings={"options": repr(quantizer), "calibration": run.calibration.description},
            sites=tuple(records[site.name] for site in layout.sites if site.name in records),
            tensor_bytes=plan.size_bytes,
            plan_digest=plan.digest(),
            parameters=layout.parameters,
        )

    file_name = "manifest.json" if name == "quantized" else f"manifest-{name}.json"
    if not shards.labels.issuperset([*labels, block_label(None)]):  # pieces were removed after the manifest was made
        (run.folder / file_name).unlink(missing_ok=True)
    run.stage(file_name, Manifest, inputs, make)
    return shards


def write_stage(run: Run, variant: Variant) -> Path:
    """checkpoint/: the chosen weights in a folder stock transformers loads; skipped if it already holds them."""
    folder, stamp = run.folder / "checkpoint", run.folder / "checkpoint.json"
    inputs = {"plan": variant.plan.digest(), "pieces": variant.shards.folder.name}
    if not folder.is_dir():
        stamp.unlink(missing_ok=True)

    def make() -> CheckpointRecord:
        write = write_gguf if variant.plan.target == "gguf" else write_checkpoint
        written = write(run.model, variant.plan, variant.shards, folder)
        return CheckpointRecord(
            tensor_bytes=written.tensor_bytes,
            header_bytes=written.header_bytes,
            files={file.name: digest_file(file) for file in written.files},
        )

    run.stage(stamp.name, CheckpointRecord, inputs, make)
    return folder


def export_stage(run: Run, variant: Variant) -> ExportReport | None:
    """export.json: the written file against our own weights, and in its engine; None for targets without a check."""
    if variant.plan.target != "gguf":
        return None
    engine = find_llamacpp()
    inputs = {
        "plan": variant.plan.digest(),
        "pieces": variant.shards.folder.name,
        "tokens": run.validation.digest,
        "engine": engine.version if engine else "none",
    }
    return run.stage("export.json", ExportReport, inputs, lambda: _check_export(run, variant, engine))


def _check_export(run: Run, variant: Variant, engine: LlamaCpp | None) -> ExportReport:
    path = run.folder / "checkpoint" / FILE_NAME
    run.progress("check export", 0, 1)
    report = ExportReport(
        target=variant.plan.target,
        file=str(path.relative_to(run.folder)),
        file_bytes=path.stat().st_size,
        tensor_bytes=variant.plan.size_bytes,
        tensors=check_tensors(path, run.model, variant.plan, variant.shards),
        bound_nats=BOUND_NATS,
        note=f"not run in llama.cpp: it is not installed; {INSTALL}" if engine is None else "",
    )
    if engine is not None:
        same = check_token_ids(engine, path, run.model)
        report = report.model_copy(
            update={
                "engine": f"llama-cpp-python {engine.version}",
                "tokens_equal": same,
                "comparisons": compare_in_engine(engine, path, run.model, variant.plan, variant.shards, run.validation),
                "note": "" if same else "the engine's token ids of mixed scripts differ from Hugging Face's",
            }
        )
    run.progress("check export", 1, 1)
    return report


def check_model(model: LoadedModel, target: str) -> None:
    """Refuse a model that could not be written for a target, before anything is quantized.

    Raises:
        ModelError: with the reason.
    """
    if target == "gguf":
        check_gguf_exportable(model)
    else:
        check_exportable(model)


def block_label(block_index: int | None) -> str:
    """Name of the piece that holds a block, or the sites outside all blocks."""
    return "outer" if block_index is None else f"block-{block_index:04d}"
