"""checkpoint/ or export/TARGET/ and what became of it in its engine: export.json."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from cptquant.core.artifact import digest_file
from cptquant.core.errors import ArtifactError, EngineError
from cptquant.core.engine_export import EngineComparison, ExportRecord, MemoryUse, SiteRoundTrip
from cptquant.core.layout import ModelLayout
from cptquant.core.memory import ENGINE_MEMORY, predict_memory
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target, list_refusals
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.evaluation.engine import EngineOutputs, compare_engine, comparison_sequences
from cptquant.evaluation.scored_text import prepare_text
from cptquant.exporters.export import find_exporter, round_trip_error
from cptquant.stages.quantize import Variant, write_stage
from cptquant.stages.run import Run

ENGINE_TARGETS = ("gguf", "onnx")
"""Targets whose files stock transformers cannot read: checked in their engine as soon as they are written."""
FLOAT, INT8 = "float activations", "int8 activations"


def export_stage(run: Run, layout: ModelLayout, variant: Variant, target: str) -> ExportRecord:
    """Write a variant's weights for a target, read them back, and compare them in the target's engine.

    The plan's own target is what stands in checkpoint/; another's files go into export/TARGET/. The record is
    export/TARGET/export.json. A missing engine is stated in it; one that differs from our model is an error, and the
    files stay for a look.

    Raises:
        ArtifactError: the plan is illegal under the target: every reason, with the nearest legal format.
        EngineError: the engine's outputs are further from ours than the bound, with the tensors that differ.
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
        round_trip = _round_trip(run, plan, variant, folder)
        comparisons, engine = _compare(run, variant, target, folder / exporter.entry, round_trip)
        run.progress("check in the engine", 1, 1)
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".onnx", ".data", ".gguf")]
        return ExportRecord(
            target=target,
            entry=str((folder / exporter.entry).relative_to(run.folder)),
            files={path.name: digest_file(path) for path in files},
            tensor_bytes=plan.size_bytes,
            file_bytes=sum(path.stat().st_size for path in files),
            context=run.settings.context,
            round_trip=tuple(round_trip),
            comparisons=tuple(comparisons),
            engine=engine,
            memory=_measure_memory(run, layout, plan, folder / exporter.entry, ran=bool(comparisons)),
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


def _round_trip(run: Run, plan: Plan, variant: Variant, folder: Path) -> list[SiteRoundTrip]:
    exporter = find_exporter(plan.target)
    if exporter.read_back is None:  # every byte was compared when the file was written
        names = [name for name, fmt in plan.quant_formats.items() if not fmt.is_float]
        return [SiteRoundTrip(site=name, format=plan.formats[name], largest_error=0.0) for name in names]
    records: list[SiteRoundTrip] = []
    for name, found in exporter.read_back(folder, run.model, plan):
        ours = variant.shards.weight(name)
        assert ours is not None
        error = round_trip_error(found, ours)
        records.append(SiteRoundTrip(site=name, format=plan.formats[name], largest_error=error))
    return records


def _compare(
    run: Run, variant: Variant, target: str, entry: Path, round_trip: list[SiteRoundTrip]
) -> tuple[list[EngineComparison], str]:
    """The engine's outputs beside ours; no comparison, and the reason, where the engine is not installed."""
    engine = TARGET_ENGINES[target]
    model = run.model
    count = comparison_sequences(model.layout, run.test.sequence_count, run.test.input_ids.shape[1])
    text = prepare_text(model, run.test.subset(slice(0, count)))
    with tempfile.TemporaryDirectory() as work:
        np.save(Path(work) / "ids.npy", text.tokens.input_ids.numpy())
        np.save(Path(work) / "mask.npy", text.tokens.attention_mask.numpy())
        ways: list[EngineOutputs] = []
        version = ""
        for arithmetic, bounded, file in _files_to_check(target, entry):
            outputs = Path(work) / arithmetic.replace(" ", "-")
            outputs.mkdir()
            try:
                answer = run_engine(
                    engine, file, "outputs", threads=torch.get_num_threads(), ids=f"{work}/ids.npy",
                    mask=f"{work}/mask.npy", outputs=str(outputs),
                )  # fmt: skip
            except EngineError as error:
                if "is not installed" in str(error):
                    return [], f"not run: {error}"
                raise
            finally:
                if file != entry:
                    file.unlink()
            version = str(answer["version"])
            ways.append(EngineOutputs(arithmetic, bounded, lambda index, at=outputs: _read(at, index)))
        compared = compare_engine(model, variant.shards, text, ways)
    _enforce(compared, round_trip, entry)
    return compared, version


def _read(folder: Path, index: int) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{index}.npy"))


def _files_to_check(target: str, entry: Path) -> list[tuple[str, bool, Path]]:
    """(arithmetic, whether the bound holds, file) of each way to run the engine."""
    if target == "onnx":
        from cptquant.exporters.onnx.export import write_float_twin

        return [(FLOAT, True, write_float_twin(entry)), (INT8, False, entry)]
    if target == "gguf":  # llama.cpp always rounds the activations of quantized products
        return [(INT8, False, entry)]
    return [(FLOAT, True, entry)]


def _enforce(compared: list[EngineComparison], round_trip: list[SiteRoundTrip], entry: Path) -> None:
    differing = [record for record in round_trip if record.largest_error > 0]
    over = [found for found in compared if found.bound is not None and not found.distance <= found.bound]
    if not over and not differing:
        return
    named = ", ".join(f"{record.site} (by up to {record.largest_error:.3g})" for record in differing[:5])
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    tensors = (
        f"tensors that differ from ours: {named}{more}"
        if differing
        else "every quantized tensor reads back exactly, so the engine computes something else"
    )
    found = "; ".join(f"{way.arithmetic}: {way.distance:.3g}, allowed {way.bound:g}" for way in over)
    raise EngineError(
        f"{entry} is not our model in the engine ({found or 'read back from the file'}); {tensors}; the files are kept "
        "for a look, do not use them"
    )


def _measure_memory(run: Run, layout: ModelLayout, plan: Plan, entry: Path, *, ran: bool) -> MemoryUse | None:
    if plan.target not in ENGINE_MEMORY:
        return None
    context = run.settings.context or min(layout.max_positions or 4096, 4096)
    predicted = predict_memory(layout, plan.target, plan.quant_formats, context)
    if not ran:
        return predicted
    answer = run_engine(TARGET_ENGINES[plan.target], entry, "fill", threads=torch.get_num_threads(), context=context)
    return predicted.model_copy(update={"measured_bytes": int(answer["peak_bytes"])})
