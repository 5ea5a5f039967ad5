"""A matrix with groups of two widths (SliM-LLM's `slim3-g64-halves`) as two of ONNX Runtime's own low-bit products.

    x W' + b  =  x[columns of 2 bits] W2' + b  +  x[columns of 4 bits] W4'

Each half is a MatMulNBits of its own on columns taken by a gather. Which columns they are is stored as the numbers of
the groups (of the columns, where those are sorted) in 16 bits and spread when the engine loads the file.
"""

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.packing.segments import SegmentedWeight, group_columns, group_size


def half_formats(fmt: QuantFormat) -> tuple[QuantFormat, QuantFormat]:
    """The formats of the narrow and of the wide half."""
    narrow, wide = (QuantFormat(code_bits=fmt.code_bits + step, granularity=fmt.granularity) for step in (-1, 1))
    return narrow, wide


def half_name(site: str, bits: int) -> str:
    """What a half of a site is called in the file."""
    return f"{site}.{bits}bit"


def split_halves(weight: SegmentedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    """The narrow and the wide half, each an ordinary matrix (out_features, in_features / 2)."""
    halves: list[QuantizedWeight] = []
    for fmt in half_formats(weight.format):
        groups = torch.nonzero(weight.widths == fmt.code_bits).flatten()
        codes = weight.codes[:, group_columns(groups, weight.format)].contiguous()
        halves.append(QuantizedWeight(fmt, codes, weight.scales[:, groups].contiguous()))
    return halves[0], halves[1]


def join_halves(
    narrow: QuantizedWeight,
    wide: QuantizedWeight,
    numbers: Tensor,  # uint16, as `stored_numbers` returns it
    fmt: QuantFormat,
) -> SegmentedWeight:
    """Inverse of `split_halves`.

    Raises:
        ValueError: numbers that are no order of the groups or columns.
    """
    places = numbers.to(torch.int64)
    if not torch.equal(places.sort().values, torch.arange(len(places))):
        raise ValueError(f"its {len(places)} numbers are not each of 0 to {len(places) - 1} once")
    half = narrow.scales.shape[1]
    if fmt.sorted_columns:
        widths = torch.tensor([narrow.format.code_bits] * half + [wide.format.code_bits] * half, dtype=torch.uint8)
        return SegmentedWeight(
            fmt,
            widths,
            torch.cat([narrow.codes, wide.codes], 1),
            torch.cat([narrow.scales, wide.scales], 1),
            order=places,
        )
    widths = torch.empty(2 * half, dtype=torch.uint8)
    widths[places[:half]], widths[places[half:]] = narrow.format.code_bits, wide.format.code_bits
    codes = torch.empty(narrow.codes.shape[0], 2 * narrow.codes.shape[1], dtype=torch.int8)
    scales = torch.empty(narrow.codes.shape[0], 2 * half, dtype=narrow.scales.dtype)
    for part, groups in ((narrow, places[:half]), (wide, places[half:])):
        codes[:, group_columns(groups, fmt)] = part.codes
        scales[:, groups] = part.scales
    return SegmentedWeight(fmt, widths, codes, scales)


def stored_numbers(weight: SegmentedWeight) -> Tensor:
    """uint16, narrow half first: original numbers of the groups (groups,), or of sorted columns (in_features,)."""
    if weight.order is not None:
        return weight.stored_order().to(torch.uint16)
    return torch.argsort(weight.widths, stable=True).to(torch.uint16)


def numbers_count(weight: SegmentedWeight) -> int:
    """Length of `stored_numbers`."""
    return len(weight.widths) if weight.order is None else weight.shape[1]


def segment_product(graph: GraphBuilder, x: str, name: str, weight: SegmentedWeight, bias: str = "") -> str:
    """x (batch, tokens, in_features) times the transpose of a matrix in two halves."""
    numbers = graph.node("Cast", graph.store(f"{name}.numbers", stored_numbers(weight)), to=TensorProto.INT64)
    lengths = graph.constant(np.array([numbers_count(weight) // 2] * 2, np.int64))
    indices = graph.nodes("Split", [numbers, lengths], 2, axis=0)
    if weight.order is None:  # whole groups are copied, which is faster than column by column (docs/segments.md)
        shape = [0, 0, len(weight.widths), group_size(weight.format)]
        x = graph.node("Reshape", x, graph.constant(np.array(shape, np.int64)))
    products: list[str] = []
    for half, index in zip(split_halves(weight), indices, strict=True):
        taken = graph.node("Gather", x, index, axis=2)
        if weight.order is None:
            taken = graph.node("Reshape", taken, graph.constant(np.array([0, 0, half.codes.shape[1]], np.int64)))
        label = half_name(name, half.format.code_bits)
        products.append(graph.block_product(taken, label, half, "" if products else bias))
    return graph.node("Add", *products)
