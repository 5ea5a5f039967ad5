"""Write a model.onnx with its tensors that ONNX Runtime loads, holding our integers and scales as they are."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from cptquant.core.engine_memory import find_context
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.exporters.onnx.check import check_onnx_exportable
from cptquant.exporters.onnx.decoders import DECODERS
from cptquant.exporters.onnx.encoders import build_bert
from cptquant.exporters.onnx.graph import GraphBuilder, with_float_activations
from cptquant.exporters.onnx.parts import Parts
from cptquant.exporters.onnx.read_back import load_graph
from cptquant.exporters.written import WrittenCheckpoint, check_size, written_whole
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource, kept_of
from cptquant.packing.shards import ShardFolder

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def write_onnx(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path, context: int) -> WrittenCheckpoint:
    """Write `model.onnx`, `model.onnx.data`, the config and the tokenizer.

    Args:
        context: longest sequence, a decoder's cache included.

    Returns:
        Sizes; `tensor_bytes` equals `plan.size_bytes`, which is checked. The "header" is model.onnx and padding.

    Raises:
        ModelError: as `check_onnx_exportable`. OutputError: disk full or not writable. CptquantError: other bytes than
        the plan's (a fault of ours). In all cases what stood under the final name stays.
    """
    return export_onnx(model, plan.quant_formats, shards, folder, context=context, tensor_bytes=plan.size_bytes)


def export_onnx(
    model: LoadedModel,
    formats: Mapping[str, QuantFormat],  # site name -> format; 16 bits where not named
    source: QuantizedSource,
    folder: Path,
    *,
    context: int | None = None,
    tensor_bytes: int | None = None,
) -> WrittenCheckpoint:
    """As `write_onnx`, from any source of codes.

    Args:
        context: by default the model's positions, at most 4,096. tensor_bytes: what the tensors must take, if known.

    Raises:
        ModelError, BudgetError: also a context longer than the model's. FormatError: a format that the engine does not
        hold.
    """
    context = find_context(model.layout, context)
    check_onnx_exportable(model, context)
    with written_whole(folder) as partial:
        _copy_companions(model.path, partial)
        written_bytes = _write_model(model, formats, source, partial, context)
        if tensor_bytes is not None:
            check_size(written_bytes, tensor_bytes, MODEL_NAME)
    files = (folder / MODEL_NAME, folder / DATA_NAME)
    total = sum(file.stat().st_size for file in files)
    return WrittenCheckpoint(folder, written_bytes, total - written_bytes, files)


def _write_model(
    model: LoadedModel, formats: Mapping[str, QuantFormat], source: QuantizedSource, folder: Path, context: int
) -> int:
    """The graph and its tensors; returns the tensors' bytes."""
    layout = model.layout
    with open(folder / DATA_NAME, "wb") as data:
        storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
        graph = GraphBuilder(data, DATA_NAME, storage)
        state = {**model.module.state_dict(), **kept_of(source)}
        parts = Parts(graph, model.module.config, layout, state, dict(formats), source)
        metadata = _build(parts, context)
    onnx.save_model(graph.model(metadata), folder / MODEL_NAME)
    return graph.tensor_bytes


def write_float_twin(model_file: Path) -> Path:
    """A second model file on the same tensors that computes with float activations: slow, for checking.

    Raises:
        ArtifactError: the model file is cut short or no ONNX file.
    """
    twin = model_file.with_name("check-float.onnx")
    onnx.save_model(with_float_activations(load_graph(model_file)), twin)
    return twin


def _build(parts: Parts, context: int) -> dict[str, str]:
    layout = parts.layout
    facts: dict[str, Any] = {
        "task": layout.task,
        "model_type": layout.model_type,
        "context": context,
        "vocabulary_size": layout.vocabulary_size,
    }
    if layout.model_type == "bert":
        build_bert(parts)
    else:
        cache = DECODERS[layout.model_type](parts, context).cache
        facts |= {"layers": cache.layers, "kv_heads": cache.kv_heads, "head_size": cache.head_size}
    return {f"cptquant.{name}": str(value) for name, value in facts.items()}


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
