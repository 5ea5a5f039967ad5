"""Write quantized weights for a target's engine, and read them back: one entry per target, found by `--target`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from cptquant.core.errors import UserError
from cptquant.core.plan import Plan
from cptquant.exporters.compressed_tensors import check_exportable, write_checkpoint
from cptquant.exporters.gguf.read_back import GgufWeights
from cptquant.exporters.gguf.write import FILE_NAME, check_gguf_exportable, write_gguf
from cptquant.exporters.segments import check_segments_exportable, read_segments, write_segments
from cptquant.exporters.written import WrittenCheckpoint
from cptquant.models.checkpoint_weights import CheckpointWeights
from cptquant.models.load import LoadedModel
from cptquant.packing.shards import ShardFolder

ReadBack = Iterator[tuple[str, Tensor]]
"""(site, dequantized float32 (out_features, in_features)) of at least every quantized site, from the files."""


@dataclass(frozen=True)
class Exporter:
    """How a target's files are made.

    Attributes:
        entry: the file in the folder that an engine is given; "" for the folder itself.
        check: refuses a model and a context before anything is quantized.
        write: makes the folder for a context; bytes equal the plan's.
        read_back: the quantized matrices as the files hold them.
        fixes_context: the files hold at most the context they were written for; others take any that the model has.
        package: what an extra of cptquant of the same name installs; "" if nothing is needed.
    """

    entry: str
    check: Callable[[LoadedModel, int], None]
    write: Callable[[LoadedModel, Plan, ShardFolder, Path, int], WrittenCheckpoint]
    read_back: Callable[[Path, LoadedModel, Plan], ReadBack]
    fixes_context: bool = False
    package: str = ""


def _check_compressed_tensors(model: LoadedModel, context: int) -> None:
    check_exportable(model)


def _write_compressed_tensors(
    model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path, context: int
) -> WrittenCheckpoint:
    return write_checkpoint(model, plan, shards, folder)


def _check_gguf(model: LoadedModel, context: int) -> None:
    check_gguf_exportable(model)


def _write_gguf(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path, context: int) -> WrittenCheckpoint:
    return write_gguf(model, plan, shards, folder)


def _check_segments(model: LoadedModel, context: int) -> None:
    check_segments_exportable(model)


def _write_segments(
    model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path, context: int
) -> WrittenCheckpoint:
    return write_segments(model, plan, shards, folder)


def _read_segments(folder: Path, model: LoadedModel, plan: Plan) -> ReadBack:
    return read_segments(folder, model)


def _check_onnx(model: LoadedModel, context: int) -> None:
    from cptquant.exporters.onnx.export import check_onnx_exportable

    check_onnx_exportable(model, context)


def _write_onnx(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path, context: int) -> WrittenCheckpoint:
    from cptquant.exporters.onnx.export import write_onnx

    return write_onnx(model, plan, shards, folder, context)


def _read_onnx(folder: Path, model: LoadedModel, plan: Plan) -> ReadBack:
    from cptquant.exporters.onnx.export import MODEL_NAME
    from cptquant.exporters.onnx.read_back import read_sites

    return read_sites(folder / MODEL_NAME, model.layout, plan.quant_formats)


def _read_checkpoint(folder: Path, model: LoadedModel, plan: Plan) -> ReadBack:
    if model.layout.model_type == "gpt2":
        return  # written as another architecture with other row order (decision 0003); its packing is tested
    weights = CheckpointWeights(folder, model.layout, plan.quant_formats)
    for name, fmt in plan.quant_formats.items():
        if not fmt.is_float:
            weight = weights.weight(name)
            assert weight is not None
            yield name, weight


def _read_gguf(folder: Path, model: LoadedModel, plan: Plan) -> ReadBack:
    weights = GgufWeights(folder / FILE_NAME, model)
    for name in plan.quant_formats:  # those in 16 bits too: their rows move and scale as the others'
        found = weights.weight(name)
        if found is not None:
            yield name, found


_COMPRESSED_TENSORS = Exporter("", _check_compressed_tensors, _write_compressed_tensors, _read_checkpoint)

EXPORTERS: dict[str, Exporter] = {
    "transformers": _COMPRESSED_TENSORS,
    "transformers-fused": _COMPRESSED_TENSORS,
    "vllm": _COMPRESSED_TENSORS,
    "gguf": Exporter(FILE_NAME, _check_gguf, _write_gguf, _read_gguf),
    "torch": Exporter("", _check_segments, _write_segments, _read_segments),
    "onnx": Exporter("model.onnx", _check_onnx, _write_onnx, _read_onnx, fixes_context=True, package="onnx"),
}


def find_exporter(target: str) -> Exporter:
    """The exporter of a target.

    Raises:
        UserError: a package is missing that it needs, with the extra to install.
    """
    exporter = EXPORTERS[target]
    if exporter.package and find_spec(exporter.package) is None:
        raise UserError(
            f"--target {target} needs the package {exporter.package}, which is not installed; install it with: pip "
            f"install 'cptquant[{exporter.package}]'"
        )
    return exporter


def round_trip_error(found: Tensor, ours: Tensor) -> float:
    """max |found - ours|; infinite where shapes differ or an entry is not finite."""
    if found.shape != ours.shape or not torch.isfinite(found).all():
        return float("inf")
    return (found - ours).abs().max().item()
