"""A matrix with corrected columns (`int2-g64-c2`) in ONNX Runtime: the codes' product, and a float one beside it.

    x W' + b  =  x W_codes' + b  +  x[corrected columns] O'

The correction is stored in 8 bits and made float32 when the engine loads the file. A MatMulNBits of 8 bits in its
place would round the activations of these very columns, the largest there are, to 8 bits (docs/columns.md).
"""

import numpy as np
import torch
from onnx import TensorProto

from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.quantized_weight import QuantizedWeight


def correction_names(site: str) -> tuple[str, str, str]:
    """What the codes, the scales and the numbers of the columns of a site's correction are called in the file."""
    return f"{site}.correction", f"{site}.correction.scales", f"{site}.correction.columns"


def columns_product(
    graph: GraphBuilder, x: str, name: str, base: QuantizedWeight, correction: ColumnCorrection, bias: str = ""
) -> str:
    """x times the transpose of codes with corrected columns."""
    codes_name, scales_name, columns_name = correction_names(name)
    codes = graph.node("Cast", graph.store(codes_name, correction.codes.t()), to=TensorProto.FLOAT)
    scales = graph.node("Cast", graph.store(scales_name, correction.scales), to=TensorProto.FLOAT)
    column = graph.node("Unsqueeze", scales, graph.constant(np.array([1], np.int64)))
    matrix = graph.node("Mul", codes, column)
    numbers = graph.store(columns_name, correction.columns.to(torch.uint16))
    chosen = graph.node("Gather", x, graph.node("Cast", numbers, to=TensorProto.INT64), axis=-1)
    product = graph.block_product(x, name, base, bias)
    return graph.node("Add", product, graph.node("MatMul", chosen, matrix))


def stored_correction(
    codes: torch.Tensor,  # int8 (count, out_features), as `columns_product` stores it
    scales: torch.Tensor,  # 16-bit float (count,)
    columns: torch.Tensor,  # uint16 (count,)
) -> ColumnCorrection:
    """The correction that was stored."""
    return ColumnCorrection(columns.to(torch.int64), codes.t().contiguous(), scales)
