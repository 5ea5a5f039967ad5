"""checkpoint/ or export/TARGET/ and what became of it in its engine: export.json."""

from pathlib import Path

import torch

from cptquant.core.artifact import digest_file
from cptquant.core.engine_export import ExportRecord, MemoryUse
from cptquant.core.engine_memory import ENGINE_MEMORY, default_context, predict_memory
from cptquant.core.errors import ArtifactError
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target, list_refusals
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.exporters.export import find_exporter
from cptquant.exporters.gguf.metadata import context_length
from cptquant.stages.engine_check import Written, check_files
from cptquant.stages.quantize import Variant, write_stage
from cptquant.stages.run import Run

ENGINE_TARGETS = ("gguf", "onnx")
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
    folder = run.folder / "checkpoint" if own else home / "files"
    inputs = {
        "plan": plan.digest(), "pieces": variant.shards.folder.name, "context": str(run.settings.context),
        "tokens": run.test.digest,
    }  # fmt: skip

    def make() -> ExportRecord:
        if own:
            write_stage(run, variant)
        else:
            exporter.check(run.model)
            exporter.write(run.model, plan, variant.shards, folder)
        run.progress("write", 1, 1)
        checked = check_files(Written(run.model, plan, variant.shards, folder / exporter.entry), run.test)
        run.progress("check in the engine", 1, 1)
        files = [
            path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".onnx", ".data", ".gguf")
        ]
        return ExportRecord(
            target=target,
            entry=str((folder / exporter.entry).relative_to(run.folder)),
            files={path.name: digest_file(path) for path in files},
            tensor_bytes=plan.size_bytes,
            file_bytes=sum(path.stat().st_size for path in files),
            context=run.settings.context,
            round_trip=tuple(checked.round_trip),
            tokens_equal=checked.tokens_equal,
            tokens_note=checked.tokens_note,
            comparisons=tuple(checked.comparisons),
            engine=checked.engine,
            memory=_measure_memory(run, layout, plan, folder / exporter.entry, ran=bool(checked.comparisons)),
        )

    if not (folder / exporter.entry).exists():
        (home / "export.json").unlink(missing_ok=True)
    return run.stage(f"export/{target}/export.json", ExportRecord, inputs, make)


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
    context = default_context(layout, run.settings.context)
    if plan.target == "gguf":
        context = min(context, context_length(run.model))
    predicted = predict_memory(layout, plan.target, plan.quant_formats, context)
    if not ran:
        return predicted
    answer = run_engine(TARGET_ENGINES[plan.target], entry, "fill", threads=torch.get_num_threads(), context=context)
    return predicted.model_copy(update={"measured_bytes": int(answer["peak_bytes"])})
