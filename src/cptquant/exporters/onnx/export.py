"""Write a model.onnx with its tensors that ONNX Runtime loads, holding our integers and scales as they are."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from cptquant.core.artifact import output_error
from cptquant.core.errors import CptquantError, ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.exporters.compressed_tensors import WrittenCheckpoint
from cptquant.exporters.onnx.decoders import DECODERS
from cptquant.exporters.onnx.encoders import build_bert
from cptquant.exporters.onnx.graph import GraphBuilder, with_float_activations
from cptquant.exporters.onnx.parts import Parts
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource
from cptquant.packing.shards import ShardFolder

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
DEFAULT_CONTEXT = 4096
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def check_onnx_exportable(model: LoadedModel) -> None:
    """Refuse, before anything is quantized, a model that has no graph here.

    Raises:
        ModelError: architecture or task, with the ones that are possible.
    """
    refusal = find_target("onnx").refuse_model(model.layout)
    if refusal is not None:
        raise ModelError(refusal)


def write_onnx(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path) -> WrittenCheckpoint:
    """Write `model.onnx`, `model.onnx.data`, the config and the tokenizer.

    Returns:
        Sizes; `tensor_bytes` equals `plan.size_bytes`, which is checked. The "header" is model.onnx and padding.

    Raises:
        ModelError: an architecture or activation that cannot be written. OutputError: disk full or not writable;
        nothing appears under the final name. CptquantError: other bytes than the plan's (a fault of ours).
    """
    written = export_onnx(model, plan.quant_formats, shards, folder)
    if written.tensor_bytes != plan.size_bytes:
        shutil.rmtree(folder, ignore_errors=True)
        raise CptquantError(
            f"{MODEL_NAME} has {written.tensor_bytes} bytes of tensors, the plan says {plan.size_bytes}"
        )
    return written


def export_onnx(
    model: LoadedModel,
    formats: Mapping[str, QuantFormat],  # site name -> format; 16 bits where not named
    source: QuantizedSource,
    folder: Path,
    *,
    context: int | None = None,
) -> WrittenCheckpoint:
    """As `write_onnx`, from any source of codes and with a longest sequence of one's own.

    Args:
        context: longest sequence, a decoder's cache included; by default the model's, at most `DEFAULT_CONTEXT`.

    Raises:
        ModelError: also a context longer than the model's. FormatError: a format that the engine does not hold.
    """
    check_onnx_exportable(model)
    layout = model.layout
    longest = layout.max_positions or DEFAULT_CONTEXT
    context = min(longest, DEFAULT_CONTEXT) if context is None else context
    if context > longest:
        raise ModelError(f"--context {context} is longer than the {longest} positions of {layout.source}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _copy_companions(model.path, partial)
        with open(partial / DATA_NAME, "wb") as data:
            storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
            graph = GraphBuilder(data, DATA_NAME, storage)
            parts = Parts(graph, model.module.config, layout, model.module.state_dict(), dict(formats), source)
            metadata = _build(parts, context)
        onnx.save_model(graph.model(metadata), partial / MODEL_NAME)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise output_error(folder, error) from None
    files = (folder / MODEL_NAME, folder / DATA_NAME)
    total = sum(file.stat().st_size for file in files)
    return WrittenCheckpoint(folder, graph.tensor_bytes, total - graph.tensor_bytes, files)


def write_float_twin(model_file: Path) -> Path:
    """A second model file on the same tensors that computes with float activations: slow, for checking."""
    twin = model_file.with_name("check-float.onnx")
    onnx.save_model(with_float_activations(onnx.load_model(model_file, load_external_data=False)), twin)
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
