"""Read the quantized matrices of a model.onnx back: what the engine will compute with."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.exporters.onnx.columns import correction_names, stored_correction
from cptquant.exporters.onnx.decoders import gpt_neox_row_order
from cptquant.exporters.onnx.low_rank import factor_names, stored_low_rank
from cptquant.exporters.onnx.segments import half_formats, half_name, join_halves
from cptquant.packing.nbits import NBitsWeight, block_size_of, unpack_nbits
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight

_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT16: torch.uint16,
}


_REMEDY = "write it again with: cptquant export RUN --target onnx"


def load_graph(model_file: Path) -> onnx.ModelProto:
    """The graph without its tensors' contents.

    Raises:
        ArtifactError: missing, cut short, or no ONNX file.
    """
    try:
        model = onnx.load_model(model_file, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(f"{model_file} is missing, cut short or no ONNX file ({reason}); {_REMEDY}") from None
    if not model.graph.node:
        raise ArtifactError(f"{model_file} holds no graph: it is cut short or no ONNX file; {_REMEDY}")
    return model


def read_sites(
    model_file: Path, layout: ModelLayout, formats: Mapping[str, QuantFormat]
) -> Iterator[tuple[str, Tensor]]:
    """(site, dequantized float32 (out_features, in_features)) of every quantized site, a matrix at a time.

    Raises:
        ArtifactError: a site's tensors are missing, or the data file is too short.
    """
    file = _TensorFile(model_file)
    for site in layout.sites:
        fmt = formats[site.name]
        if fmt.is_float:
            continue
        try:
            dequantized = _dequantized(file, site, fmt, layout)
        except (ValueError, IndexError, RuntimeError) as error:  # numbers of groups or columns that are none
            raise ArtifactError(f"{file.path} is damaged at {site.name} ({error}); {_REMEDY}") from None
        if layout.model_type == "gpt_neox" and site.role == "qkv":
            restored = torch.empty_like(dequantized)
            restored[gpt_neox_row_order(layout.hidden_size, _heads(file))] = dequantized
            dequantized = restored
        yield site.name, dequantized


def _dequantized(file: "_TensorFile", site: Site, fmt: QuantFormat, layout: ModelLayout) -> Tensor:
    """A site's rows as they stand in the file, float32 (out_features, in_features)."""
    if fmt.storage == "segments":
        holder, rows = _locate(file, site, layout, ".numbers")
        narrow, wide = (
            _weight(file, half_name(holder, half.code_bits), half, site.in_features // 2) for half in half_formats(fmt)
        )
        return join_halves(narrow, wide, file.read(f"{holder}.numbers"), fmt).dequantize()[rows]
    if fmt.storage == "low-rank":
        holder = _own_holder(file, site, "codes")
        base = _weight(file, holder, fmt.base, site.in_features)
        product = stored_low_rank(*(file.read(name) for name in factor_names(holder)))
        return CorrectedWeight(fmt, base, product).dequantize()
    if fmt.storage == "columns":
        holder = _own_holder(file, site, "codes")
        codes, scales, columns = (file.read(name) for name in correction_names(holder))
        base = _weight(file, holder, fmt.base, site.in_features)
        return CorrectedWeight(fmt, base, stored_correction(codes, scales, columns)).dequantize()
    holder, rows = _locate(file, site, layout)
    return _weight(file, holder, fmt, site.in_features).dequantize()[rows]


def _own_holder(file: "_TensorFile", site: Site, part: str) -> str:
    """Name under which the tensors of a site with a matrix of its own are stored."""
    reordered = f"{site.name}.reordered"
    return reordered if f"{reordered}.{part}" in file.tensors else site.name


def _locate(file: "_TensorFile", site: Site, layout: ModelLayout, part: str = ".codes") -> tuple[str, slice]:
    """Name under which a site's tensors are stored, and its rows there (several sites may be one matrix)."""
    if layout.shared_head is not None and site.name == layout.shared_head[1]:
        site = layout.site_by_name[layout.shared_head[0]]
    if f"{site.name}{part}" in file.tensors:
        return site.name, slice(None)
    for name in file.tensors:
        holder = name.removesuffix(part)
        if holder == name:
            continue
        members = holder.split("+")
        if site.name in members:
            before = sum(layout.site_by_name[member].out_features for member in members[: members.index(site.name)])
            return holder, slice(before, before + site.out_features)
    raise ArtifactError(f"{file.path} holds no codes of {site.name}; {_REMEDY}")


def _weight(file: "_TensorFile", holder: str, fmt: QuantFormat, in_features: int) -> QuantizedWeight:
    codes, scales = file.read(f"{holder}.codes"), file.read(f"{holder}.scales")
    if codes.dtype is torch.int8:  # one scale a row: a product's matrix is turned, an embedding's is not
        turned = codes if codes.shape[1] == in_features and scales.dim() == 2 else codes.t()
        return QuantizedWeight(fmt, turned.contiguous(), scales.reshape(-1, 1))
    rows = codes.shape[0]
    block = block_size_of(fmt, in_features)
    zeros = file.read(f"{holder}.zeros").numpy() if f"{holder}.zeros" in file.tensors else None
    shaped = codes.numpy().reshape(rows, in_features // block, -1)
    return unpack_nbits(NBitsWeight(fmt.code_bits, block, shaped, scales, zeros), fmt)


def _heads(file: "_TensorFile") -> int:
    for node in file.nodes:
        if node.op_type == "GroupQueryAttention":
            return next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    raise ArtifactError(f"{file.path} has no attention; {_REMEDY}")


class _TensorFile:
    def __init__(self, model_file: Path) -> None:
        self.path = model_file
        graph = load_graph(model_file).graph
        self.nodes = graph.node
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}

    def read(self, name: str) -> Tensor:
        """One tensor from the data file."""
        proto = self.tensors.get(name)
        if proto is None:
            raise ArtifactError(f"{self.path} holds no tensor {name}; {_REMEDY}")
        where = {entry.key: entry.value for entry in proto.external_data}
        path = self.path.with_name(where["location"])
        try:
            content = np.fromfile(path, np.uint8, int(where["length"]), offset=int(where["offset"]))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror or error}); {_REMEDY}") from None
        if content.nbytes != int(where["length"]):
            raise ArtifactError(f"{path} is cut short: {name} needs {where['length']} bytes; {_REMEDY}")
        return torch.from_numpy(content).view(_DTYPES[proto.data_type]).reshape(tuple(proto.dims))
