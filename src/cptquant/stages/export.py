"""checkpoint/ or export/TARGET/ and what became of it in its engine: export.json."""

import importlib.metadata
from pathlib import Path

import torch

from cptquant.core.engine_export import ExportRecord, MemoryUse
from cptquant.core.engine_memory import ENGINE_MEMORY, find_context, parse_memory, predict_memory
from cptquant.core.errors import ArtifactError, MissingEngineError
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target, list_refusals
from cptquant.core.written_files import digest_folder, list_damage, size_folder
from cptquant.engines.llamacpp_python import find_llamacpp
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.exporters.export import find_exporter
from cptquant.exporters.gguf.metadata import context_length
from cptquant.stages.engine_check import Written, check_files
from cptquant.stages.quantize import Variant, write_stage
from cptquant.stages.run import Run

ENGINE_TARGETS = ("gguf", "onnx", "torch")
"""Targets whose files stock transformers cannot read: checked in their engine as soon as they are written."""


def export_stage(run: Run, layout: ModelLayout, variant: Variant, target: str) -> ExportRecord:
    """Write a variant's weights for a target, read them back, and compare them in the target's engine.

    The plan's own target is what stands in checkpoint/; another's files go into export/TARGET/. The record is
    export/TARGET/export.json. A missing engine is stated in it; one that differs from our model is an error, and the
    files stay for a look.

    Raises:
        ArtifactError: the plan is illegal under the target: every reason, with the nearest legal format.
        EngineError: the engine's outputs are further from ours than the bound, with the tensors that differ; or its
        tokenizer cuts text otherwise.
    """
    plan = retarget(variant.plan, layout, target)
    exporter = find_exporter(target)
    home = run.folder / "export" / target
    home.mkdir(parents=True, exist_ok=True)
    own = target == variant.plan.target
    context = find_context(layout, run.settings.context)
    folder = run.folder / "checkpoint" if own else home / "files"
    inputs = {
        "plan": plan.digest(), "pieces": variant.shards.folder.name, "context": str(context),
        "tokens": run.test.digest,
    }  # fmt: skip
    if target in ("gguf", "onnx"):
        inputs["engine"] = _engine_version(target)

    def make() -> ExportRecord:
        if own:
            write_stage(run, variant)
        else:
            exporter.check(run.model, context)
            exporter.write(run.model, plan, variant.shards, folder, context)
        run.progress("write", 1, 1)
        longest = context if exporter.fixes_context else None
        checked = check_files(Written(run.model, plan, variant.shards, folder / exporter.entry, longest), run.test)
        run.progress("check in the engine", 1, 1)
        files = [
            path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".onnx", ".data", ".gguf")
        ]
        return ExportRecord(
            target=target,
            entry=str((folder / exporter.entry).relative_to(run.folder)),
            files=digest_folder(folder),
            file_sizes=size_folder(folder),
            tensor_bytes=plan.size_bytes,
            file_bytes=sum(path.stat().st_size for path in files),
            context=context if exporter.fixes_context else layout.max_positions,
            round_trip=tuple(checked.round_trip),
            tokens_equal=checked.tokens_equal,
            tokens_note=checked.tokens_note,
            comparisons=tuple(checked.comparisons),
            engine=checked.engine,
            memory=_measure_memory(run, layout, plan, folder / exporter.entry, ran=bool(checked.comparisons)),
        )

    return run.stage(
        f"export/{target}/export.json", ExportRecord, inputs, make,
        damage=lambda found: list_damage(folder, found.files, found.file_sizes),
    )  # fmt: skip


def _engine_version(target: str) -> str:
    """So that a file written without the engine is checked once there is one, and again by a newer one."""
    try:
        return find_llamacpp().version if target == "gguf" else importlib.metadata.version("onnxruntime")
    except (MissingEngineError, importlib.metadata.PackageNotFoundError):
        return "none"


def retarget(plan: Plan, layout: ModelLayout, target_name: str) -> Plan:
    """The plan under another target, its size counted by that target's rules.

    Raises:
        ArtifactError: not legal there.
    """
    target = find_target(target_name)
    refusals = list_refusals(layout, target, plan.quant_formats)
    if refusals:
        shown = "\n  ".join(refusals[:20]) + (f"\n  and {len(refusals) - 20} more" if len(refusals) > 20 else "")
        raise ArtifactError(
            f"the plan was made for --target {plan.target} and is illegal under --target {target_name}:\n  {shown}\n"
            f"allocate anew with: cptquant quantize MODEL --target {target_name}, or edit plan.json"
        )
    size_bytes = target.plan_bytes(layout, plan.quant_formats)
    return plan.model_copy(update={"target": target_name, "size_bytes": size_bytes})


def _measure_memory(run: Run, layout: ModelLayout, plan: Plan, entry: Path, *, ran: bool) -> MemoryUse | None:
    if plan.target not in ENGINE_MEMORY:
        return None
    context = find_context(layout, run.settings.context)
    if plan.target == "gguf":
        context = min(context, context_length(run.model))
    limit = None if run.settings.memory is None else parse_memory(run.settings.memory)
    predicted = predict_memory(layout, plan.target, plan.quant_formats, context, limit)
    if not ran:
        return predicted
    answer = run_engine(TARGET_ENGINES[plan.target], entry, "fill", threads=torch.get_num_threads(), context=context)
    return predicted.model_copy(update={"measured_bytes": int(answer["peak_bytes"])})
