"""Write a checkpoint with groups of mixed width or corrected columns for --target torch, and read it back.

Schema: docs/segments.md, docs/columns.md. Everything is as in the compressed-tensors checkpoint but for the tensors of
sites with groups of mixed width, those of corrections, the rows of layers into which an order of inputs was folded,
`quantization_config`, and the names of the files.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.core.plan import Plan
from cptquant.core.targets.torch_segments import METHOD
from cptquant.exporters.compressed_tensors import (
    copy_companions,
    measure_files,
    write_weights,
)
from cptquant.exporters.written import WrittenCheckpoint, check_size, written_whole
from cptquant.models.folding import Folding, find_folding
from cptquant.models.load import LoadedModel
from cptquant.models.segmented import SCHEMA_VERSION, WEIGHTS_NAME, SegmentedFolder
from cptquant.packing.quantized_weight import decode, encode
from cptquant.packing.segments import SegmentedWeight
from cptquant.packing.shards import ShardFolder


def check_segments_exportable(model: LoadedModel) -> None:
    """Refuse, before anything is quantized, a model whose layers are stored as (in, out).

    Raises:
        ModelError: a model with Conv1D layers.
    """
    if any(site.transposed for site in model.layout.sites):
        raise ModelError(
            f"--target torch: {model.layout.architecture} is built from Conv1D layers, which it cannot replace; "
            "use --target transformers"
        )


def write_segments(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path) -> WrittenCheckpoint:
    """Assemble the folder from the quantized pieces and the original's kept tensors.

    Returns:
        Sizes; `tensor_bytes` equals `plan.size_bytes`, which is checked.

    Raises:
        OutputError: disk full or not writable; nothing appears under the final name.
        CptquantError: the bytes written differ from the plan's (a fault of ours).
    """
    folding = find_folding(model.layout, model.module.config, _stored_orders(plan, shards))
    with written_whole(folder) as partial:
        copy_companions(model.path, partial)
        _write_config(model, plan, folding, partial)
        files = [
            path.rename(path.with_name(path.name.replace("model", WEIGHTS_NAME, 1)))
            for path in write_weights(model.layout, _tensors(model, plan, shards, folding), partial)
        ]
        (partial / "model.safetensors.index.json").unlink(missing_ok=True)
        tensor_bytes, header_bytes = measure_files(files)
        check_size(tensor_bytes, plan.size_bytes, "the checkpoint")
    return WrittenCheckpoint(folder, tensor_bytes, header_bytes, tuple(folder / file.name for file in files))


def read_segments(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """(site, dequantized float32 (out_features, in_features)) of every quantized site, in the original's order."""
    source = SegmentedFolder(folder)
    orders: dict[str, Tensor] = {}
    for name, fmt in source.formats.items():
        if name in source.folded:
            site = model.layout.site_by_name[name]
            weight = decode(source.stored(name), fmt, (site.out_features, site.in_features))
            if isinstance(weight, SegmentedWeight):
                orders[name] = weight.stored_order()
    rows = find_folding(model.layout, model.module.config, orders).rows
    for name, fmt in source.formats.items():
        site = model.layout.site_by_name[name]
        values = decode(source.stored(name), fmt, (site.out_features, site.in_features)).dequantize()
        if name in rows:
            original = torch.empty_like(values)
            original[rows[name]] = values
            values = original
        yield name, values


def _stored_orders(plan: Plan, shards: ShardFolder) -> dict[str, Tensor]:
    """Orders of the inputs, of sites whose inputs do not keep theirs."""
    orders: dict[str, Tensor] = {}
    for name, fmt in plan.quant_formats.items():
        if fmt.storage == "segments":
            weight = shards.quantized(name)
            if isinstance(weight, SegmentedWeight):
                order = weight.stored_order()
                if not torch.equal(order, torch.arange(len(order))):
                    orders[name] = order
    return orders


def _tensors(model: LoadedModel, plan: Plan, shards: ShardFolder, folding: Folding) -> Iterator[tuple[str, Tensor]]:
    """Kept tensors and 16-bit sites from the original, quantized sites from their pieces, rows as folded."""
    layout = model.layout
    storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    state: Mapping[str, Tensor] = {**model.module.state_dict(), **shards.kept()}
    kept_sites = {site.name for site in layout.sites if plan.quant_formats[site.name].is_float}
    if layout.shared_head is not None and kept_sites.issuperset(layout.shared_head):
        kept_sites.discard(layout.shared_head[1])  # one tensor, stored once under the embedding's name
    for name in [*(tensor.name for tensor in layout.kept), *(f"{name}.weight" for name in sorted(kept_sites))]:
        site, _, part = name.rpartition(".")
        tensor = state[name]
        if site in folding.rows and part in ("weight", "bias"):
            tensor = tensor[folding.rows[site]]
        yield name, tensor.to(storage) if tensor.is_floating_point() else tensor
    for site in layout.sites:
        weight = None if plan.quant_formats[site.name].is_float else shards.quantized(site.name)
        if weight is not None:
            if site.name in folding.rows:
                weight = weight.rows(folding.rows[site.name])
            for part, tensor in encode(weight).items():
                yield f"{site.name}.{part}", tensor


def _write_config(model: LoadedModel, plan: Plan, folding: Folding, folder: Path) -> None:
    config: dict[str, Any] = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = model.layout.storage_dtype
    formats = {name: fmt.name for name, fmt in plan.quant_formats.items() if not fmt.is_float}
    config["quantization_config"] = {
        "quant_method": METHOD,
        "schema_version": SCHEMA_VERSION,
        "formats": formats,
        "folded": sorted(folding.folded),
    }
    shared = model.layout.shared_head
    if shared is not None and not all(plan.quant_formats[site].is_float for site in shared):
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
