"""checkpoint/ or export/TARGET/ and what became of it in its engine: export.json."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cptquant.core.engine_export import EngineComparison, ExportRecord, MemoryUse, SiteRoundTrip
from cptquant.core.engine_memory import ENGINE_MEMORY, find_context, parse_memory, predict_memory
from cptquant.core.errors import ArtifactError, EngineError
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target, list_refusals
from cptquant.core.written_files import digest_folder, list_damage, size_folder
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.evaluation.engine import EngineOutputs, compare_engine, comparison_sequences
from cptquant.evaluation.scored_text import prepare_text
from cptquant.exporters.export import find_exporter, round_trip_error
from cptquant.exporters.gguf.read_back import check_tensors
from cptquant.exporters.llamacpp.check import BOUND_NATS, check_token_ids, compare_in_engine
from cptquant.exporters.llamacpp.engine import INSTALL, find_llamacpp
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
    context = find_context(layout, run.settings.context)
    folder = run.folder / "checkpoint" if own else home / "files"
    inputs = {
        "plan": plan.digest(), "pieces": variant.shards.folder.name, "context": str(context),
        "tokens": run.test.digest,
    }  # fmt: skip

    def make() -> ExportRecord:
        if own:
            write_stage(run, variant)
        else:
            exporter.check(run.model, context)
            exporter.write(run.model, plan, variant.shards, folder, context)
        run.progress("write", 1, 1)
        check = _check_gguf if target == "gguf" else _check_in_engine
        checked = check(run, plan, variant, folder / exporter.entry)
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
            comparisons=tuple(checked.comparisons),
            engine=checked.engine,
            memory=_measure_memory(run, layout, plan, folder / exporter.entry, ran=bool(checked.comparisons)),
        )

    return run.stage(
        f"export/{target}/export.json", ExportRecord, inputs, make,
        damage=lambda found: list_damage(folder, found.files, found.file_sizes),
    )  # fmt: skip


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


@dataclass(frozen=True)
class _Checked:
    """What the files were found to be; `comparisons` empty where the engine is not installed, as `engine` says."""

    round_trip: list[SiteRoundTrip]
    comparisons: list[EngineComparison]
    engine: str
    tokens_equal: bool | None = None


def _check_in_engine(run: Run, plan: Plan, variant: Variant, entry: Path) -> _Checked:
    """Read every quantized matrix back, then the engine's outputs beside ours."""
    round_trip: list[SiteRoundTrip] = []
    folder = entry if entry.is_dir() else entry.parent
    for name, found in find_exporter(plan.target).read_back(folder, run.model, plan):
        ours = variant.shards.weight(name)
        assert ours is not None
        error = round_trip_error(found, ours)
        round_trip.append(SiteRoundTrip(site=name, format=plan.formats[name], largest_error=error))
    comparisons, engine = _compare(run, variant, plan.target, entry)
    _enforce(comparisons, round_trip, entry)
    return _Checked(round_trip, comparisons, engine)


def _compare(run: Run, variant: Variant, target: str, entry: Path) -> tuple[list[EngineComparison], str]:
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
        return compare_engine(model, variant.shards, text, ways), version


def _read(folder: Path, index: int) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{index}.npy"))


def _files_to_check(target: str, entry: Path) -> list[tuple[str, bool, Path]]:
    """(arithmetic, whether the bound holds, file) of each way to run the engine."""
    if target == "onnx":
        from cptquant.exporters.onnx.export import write_float_twin

        return [(FLOAT, True, write_float_twin(entry)), (INT8, False, entry)]
    return [(FLOAT, True, entry)]


def _check_gguf(run: Run, plan: Plan, variant: Variant, entry: Path) -> _Checked:
    """llama.cpp: our dequantized weights in a float32 file within the bound, then the file and its tokenizer."""
    tensors = check_tensors(entry, run.model, plan, variant.shards)
    round_trip = [
        SiteRoundTrip(site=found.site, format=plan.formats[found.site], largest_error=found.largest_difference)
        for found in tensors
        if not plan.quant_formats[found.site].is_float
    ]
    engine = find_llamacpp()
    if engine is None:
        return _Checked(round_trip, [], f"not run: llama-cpp-python is not installed; {INSTALL}")
    ways = {"dequantized": (FLOAT, BOUND_NATS), "file": (INT8, None)}
    found = compare_in_engine(engine, entry, run.model, plan, variant.shards, run.test)
    encoder = run.model.layout.task == "encoder"
    comparisons = [
        EngineComparison(
            arithmetic=ways[way.weights][0], bound=ways[way.weights][1], n=way.n, stderr=way.kl_stderr,
            kl_nats=None if encoder else way.kl_nats_per_token, top1_agreement=way.top1_agreement,
            cosine=1 - way.kl_nats_per_token if encoder else None,
        )
        for way in found
    ]  # fmt: skip
    equal = check_token_ids(engine, entry, run.model)
    return _Checked(round_trip, comparisons, f"llama-cpp-python {engine.version}", equal)


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
    context = find_context(layout, run.settings.context)
    limit = None if run.settings.memory is None else parse_memory(run.settings.memory)
    predicted = predict_memory(layout, plan.target, plan.quant_formats, context, limit)
    if not ran:
        return predicted
    answer = run_engine(TARGET_ENGINES[plan.target], entry, "fill", threads=torch.get_num_threads(), context=context)
    return predicted.model_copy(update={"measured_bytes": int(answer["peak_bytes"])})
