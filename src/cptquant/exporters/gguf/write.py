"""Write checkpoint/model.gguf: the `gguf` package writes the container, we hand it packed rows."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cptquant.core.errors import CptquantError, ModelError
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.exporters.gguf.metadata import architecture, check_config, write_metadata
from cptquant.exporters.gguf.tensors import GgufTensor, list_tensors
from cptquant.exporters.gguf.tokenizer import read_vocabulary
from cptquant.exporters.written import WrittenCheckpoint, written_whole
from cptquant.models.load import LoadedModel
from cptquant.packing.shards import ShardFolder

FILE_NAME = "model.gguf"


def check_gguf_exportable(model: LoadedModel) -> None:
    """Refuse, before anything is quantized, a model that cannot be written as GGUF.

    Raises:
        ModelError: architecture, task, variant or tokenizer that llama.cpp does not have.
    """
    refusal = find_target("gguf").refuse_model(model.layout)
    if refusal is not None:
        raise ModelError(refusal)
    check_config(model)
    read_vocabulary(model)


def write_gguf(model: LoadedModel, plan: Plan, shards: ShardFolder, folder: Path) -> WrittenCheckpoint:
    """Write the file and read every tensor back.

    Returns:
        Sizes; `tensor_bytes` equals `plan.size_bytes`, which is checked. The "header" is all the rest of the file:
        metadata, tokenizer and padding.

    Raises:
        ModelError: as `check_gguf_exportable`. OutputError: disk full or not writable; nothing appears under the final
        name. CptquantError: what is in the file differs from the plan or from our weights (a fault of ours).
    """
    check_gguf_exportable(model)
    tensors = list_tensors(model, plan, shards)
    with written_whole(folder) as partial:
        path = partial / FILE_NAME
        write_file(path, model, tensors)
        check_file(path, tensors, plan.size_bytes)
    written = folder / FILE_NAME
    tensor_bytes = sum(tensor.size_bytes for tensor in tensors)
    return WrittenCheckpoint(folder, tensor_bytes, written.stat().st_size - tensor_bytes, (written,))


def write_file(path: Path, model: LoadedModel, tensors: list[GgufTensor]) -> None:
    """Metadata, then every tensor, made and written one after the other."""
    writer = gguf.GGUFWriter(path, architecture(model))
    try:
        write_metadata(writer, model)
        read_vocabulary(model).write(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
    finally:
        writer.close()


def check_file(path: Path, tensors: list[GgufTensor], size_bytes: int) -> None:
    """Read the file with the `gguf` package: names, shapes, types, and every byte.

    Raises:
        CptquantError: naming the first tensor that differs.
    """
    found: dict[str, Any] = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    total = sum(int(tensor.n_bytes) for tensor in found.values())
    if total != size_bytes:
        raise CptquantError(f"{path.name} holds {total} bytes of tensors, the plan says {size_bytes}")
    for tensor in tensors:
        read = found.get(tensor.name)
        if read is None:
            raise CptquantError(f"{path.name} lacks the tensor {tensor.name}")
        shape = tuple(int(size) for size in reversed(read.shape))
        if shape != tensor.shape or read.tensor_type.value != tensor.type_id:
            raise CptquantError(
                f"{path.name}: {tensor.name} is {shape} {read.tensor_type.name}, should be {tensor.shape} of type "
                f"{tensor.type_id}"
            )
        if read.data.tobytes() != np.ascontiguousarray(tensor.make()).tobytes():
            raise CptquantError(f"{path.name}: the bytes of {tensor.name} (from {tensor.sites[0]}) are not ours")
