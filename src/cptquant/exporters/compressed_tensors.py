"""Write a checkpoint that stock transformers (and other readers of compressed-tensors) load.

Layout of the folder: the original's config.json with a `quantization_config` of mixed groups (one per format, targets
are module names), `model*.safetensors`, and the original's tokenizer and auxiliary JSON files unchanged. Everything is
written beside its final name and renamed at the end, so a half checkpoint never looks like a whole one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cptquant.core.artifact import read_json
from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.exporters.written import WrittenCheckpoint, check_size, written_whole
from cptquant.models.gpt2 import attention_row_order, rewrite_config, rewrite_dense, rewrite_quantized
from cptquant.models.load import LoadedModel
from cptquant.packing.quantized_weight import encode
from cptquant.packing.shards import ShardFolder

_MAX_FILE_BYTES = 1 << 29
"""Weights are split into files of this size: serializing one file holds it in memory once more."""
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_NOT_COPIED = ("config.json", "generation_config.json")


def write_checkpoint(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path) -> WrittenCheckpoint:
    """Assemble checkpoint/ from the quantized pieces and the original's kept tensors.

    Returns:
        Sizes; `tensor_bytes` equals `plan.size_bytes`, which is checked.

    Raises:
        OutputError: disk full or not writable; nothing appears under the final name.
        CptquantError: the bytes written differ from the plan's (a fault of ours).
    """
    with written_whole(folder) as partial:
        copy_companions(model.path, partial)
        _write_config(model, plan, partial)
        files = write_weights(model.layout, _all_tensors(model, plan, shards), partial)
        tensor_bytes, header_bytes = measure_files(files)
        check_size(tensor_bytes, plan.size_bytes, "the checkpoint")
    return WrittenCheckpoint(folder, tensor_bytes, header_bytes, tuple(folder / file.name for file in files))


def measure_files(files: list[Path]) -> tuple[int, int]:
    """Bytes of tensor data and of headers (length word included) of safetensors files."""
    headers = 0
    for path in files:
        with open(path, "rb") as file:
            headers += 8 + int.from_bytes(file.read(8), "little")
    return sum(os.path.getsize(path) for path in files) - headers, headers


def quantization_config(layout: ModelLayout, plan: Plan) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None if the plan keeps every site in 16 bits."""
    groups: dict[QuantFormat, list[str]] = {}
    for site in layout.sites:
        fmt = plan.quant_formats[site.name]
        if not fmt.is_float:
            groups.setdefault(fmt, []).append(site.name)
    if not groups:
        return None
    plain = any(fmt.storage == "plain" for fmt in groups)
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if plain else "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": _ignored(layout, plan),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": {
                "targets": names,
                "weights": _weight_arguments(fmt),
                "input_activations": None,
                "output_activations": None,
                "format": "int-quantized" if fmt.storage == "plain" else "pack-quantized",
            }
            for index, (fmt, names) in enumerate(groups.items())
        },
    }


def _ignored(layout: ModelLayout, plan: Plan) -> list[str]:
    """Linear layers in 16 bits: vLLM refuses a layer that no group and no entry of `ignore` names."""
    if plan.target != "vllm":
        return []
    return [site.name for site in layout.sites if site.kind == "linear" and plan.quant_formats[site.name].is_float]


def _weight_arguments(fmt: QuantFormat) -> dict[str, Any]:
    grouped = isinstance(fmt.granularity, int)
    return {
        "num_bits": fmt.code_bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "group" if grouped else fmt.granularity,
        "group_size": fmt.granularity if grouped else None,
        "dynamic": False,
    }


def _all_tensors(model: LoadedModel, plan: Plan, shards: ShardFolder) -> Iterator[tuple[str, Tensor]]:
    """Kept tensors and 16-bit sites from the original, quantized sites from their pieces."""
    layout = model.layout
    storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    state = {**model.module.state_dict(), **shards.kept()}
    names = [tensor.name for tensor in layout.kept]
    kept_sites = {site.name for site in layout.sites if plan.quant_formats[site.name].is_float}
    if layout.shared_head is not None and kept_sites.issuperset(layout.shared_head):
        kept_sites.discard(layout.shared_head[1])  # one tensor, stored once under the embedding's name
    names += [f"{name}.weight" for name in sorted(kept_sites)]
    rewrite = _Gpt2Rewrite(model) if layout.model_type == "gpt2" else None
    for name in names:
        tensor = state[name] if rewrite is None else rewrite.dense(name, state[name])
        yield name, tensor.to(storage) if tensor.is_floating_point() else tensor
    yield from shards.tensors() if rewrite is None else rewrite.quantized(shards, layout)


class _Gpt2Rewrite:
    """GPT-2's Conv1D cannot be packed; the checkpoint is the equal GPT-BigCode model (decision 0003)."""

    def __init__(self, model: LoadedModel) -> None:
        config: Any = model.module.config
        self._order = attention_row_order(config.n_embd, config.n_head)

    def dense(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor kept in 16 bits."""
        return rewrite_dense(name, tensor, self._order)

    def quantized(self, shards: ShardFolder, layout: ModelLayout) -> Iterator[tuple[str, Tensor]]:
        """The quantized sites' tensors."""
        for site in layout.sites:
            weight = shards.quantized(site.name)
            if weight is not None:
                for name, tensor in encode(rewrite_quantized(site.name, weight, self._order)).items():
                    yield f"{site.name}.{name}", tensor


def check_exportable(model: LoadedModel) -> None:
    """Refuse, before anything is quantized, a model whose checkpoint could not be written.

    Raises:
        ModelError: a GPT-2 that has no equal GPT-BigCode model, or another architecture built from Conv1D.
    """
    if model.layout.model_type == "gpt2":
        rewrite_config(read_json(model.path / "config.json", made_by="the model's authors"))
    elif any(site.transposed for site in model.layout.sites):
        raise ModelError(
            f"{model.layout.architecture} is built from Conv1D layers, which compressed-tensors cannot hold; of those "
            "only GPT-2 can be written, as the equal GPT-BigCode"
        )


def write_weights(layout: ModelLayout, tensors: Iterator[tuple[str, Tensor]], folder: Path) -> list[Path]:
    """Safetensors files of bounded size, with an index where there are several."""
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        path = folder / f"piece-{len(files)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, len(files)))
        files.append(path)
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > _MAX_FILE_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes, total_bytes = pending_bytes + size, total_bytes + size
    flush()
    if len(files) == 1:
        return [files[0].rename(folder / "model.safetensors")]
    named = [
        path.rename(folder / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors")
        for index, path in enumerate(files)
    ]
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: named[piece].name for name, piece in weight_map.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return named


def _write_config(model: LoadedModel, plan: Plan, folder: Path) -> None:
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    if model.layout.model_type == "gpt2":
        config = rewrite_config(config)
    config["dtype"] = model.layout.storage_dtype
    quantization = quantization_config(model.layout, plan)
    if quantization is not None:
        config["quantization_config"] = quantization
    shared = model.layout.shared_head
    if shared is not None and not all(plan.quant_formats[site].is_float for site in shared):
        # The two halves of a shared tensor are stored by themselves, each in its own format.
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings and the JSON beside them; never weights, never code."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if len(inside.parts) > 2 or any(part.startswith(".") for part in inside.parts):
            continue
        skipped = str(inside) == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not skipped:
            (folder / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / inside)
