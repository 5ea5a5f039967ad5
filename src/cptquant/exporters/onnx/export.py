"""Write a model.onnx with its tensors that ONNX Runtime loads, holding our integers and scales as they are."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cptquant.core.artifact import output_error
from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.exporters.onnx.decoders import DECODERS
from cptquant.exporters.onnx.encoders import build_bert
from cptquant.exporters.onnx.graph import GraphBuilder, with_float_activations
from cptquant.exporters.onnx.parts import Parts
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
DEFAULT_CONTEXT = 4096
FAMILIES = (*DECODERS, "bert")
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class WrittenOnnx:
    """What was written: the two files' folder, bytes of the tensors and of the model file, longest context."""

    folder: Path
    tensor_bytes: int
    model_bytes: int
    context: int

    @property
    def file_bytes(self) -> int:
        """Bytes of both files."""
        return self.model_bytes + (self.folder / DATA_NAME).stat().st_size

    @property
    def model_file(self) -> Path:
        """The file an engine is given."""
        return self.folder / MODEL_NAME


def check_family(model_type: str, architecture: str) -> None:
    """Refuse an architecture that has no graph here.

    Raises:
        ModelError: with the ones that have.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"--target onnx does not know {architecture}; it writes graphs of {', '.join(FAMILIES)}; use --target "
            "transformers"
        )


def export_onnx(
    model: LoadedModel,
    formats: Mapping[str, QuantFormat],  # site name -> format; 16 bits where not named
    source: QuantizedSource,
    folder: Path,
    *,
    context: int | None = None,
) -> WrittenOnnx:
    """Write `model.onnx`, `model.onnx.data`, the config and the tokenizer into a new folder.

    Args:
        context: longest sequence, a decoder's cache included; by default the model's, at most `DEFAULT_CONTEXT`.

    Raises:
        ModelError: an architecture, activation or context that cannot be written.
        FormatError: a format that the engine does not hold.
        OutputError: disk full or not writable; nothing appears under the final name.
    """
    import onnx

    layout = model.layout
    check_family(layout.model_type, layout.architecture)
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
    return WrittenOnnx(folder, graph.tensor_bytes, (folder / MODEL_NAME).stat().st_size, context)


def write_float_twin(model_file: Path) -> Path:
    """A second model file on the same tensors that computes with float activations: slow, for checking."""
    import onnx

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
        if layout.task != "causal_lm":
            raise ModelError(f"--target onnx writes causal language models of this family, not {layout.architecture}")
        cache = DECODERS[layout.model_type](parts, context).cache
        facts |= {"layers": cache.layers, "kv_heads": cache.kv_heads, "head_size": cache.head_size}
    return {f"cptquant.{name}": str(value) for name, value in facts.items()}


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
