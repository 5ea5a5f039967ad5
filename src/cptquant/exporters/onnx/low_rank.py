"""A matrix with a product of low rank (`int2-g64-r4`) in ONNX Runtime: the codes' product, and two thin float ones.

    x W' + b  =  x W_codes' + b  +  (x B') A'

The factors are stored in 8 bits and made float32 when the engine loads the file.
"""

import numpy as np
import torch
from onnx import TensorProto

from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.packing.low_rank import RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import QuantizedWeight


def factor_names(site: str) -> tuple[str, str, str]:
    """What the two factors and the scales of a site's product of low rank are called in the file."""
    return f"{site}.left", f"{site}.right", f"{site}.low_rank.scales"


def low_rank_product(
    graph: GraphBuilder, x: str, name: str, base: QuantizedWeight, correction: LowRankCorrection, bias: str = ""
) -> str:
    """x times the transpose of codes with a product of low rank."""
    left_name, right_name, scales_name = factor_names(name)
    right = graph.node("Cast", graph.store(right_name, correction.right.t()), to=TensorProto.FLOAT)
    left = graph.node("Cast", graph.store(left_name, correction.left.t()), to=TensorProto.FLOAT)
    scales = graph.node("Cast", graph.store(scales_name, correction.scales), to=TensorProto.FLOAT)
    parts = graph.node("Div", scales, graph.constant(np.array(RIGHT_UNIT, np.float32)))
    column = graph.node("Unsqueeze", parts, graph.constant(np.array([1], np.int64)))
    inner = graph.node("MatMul", x, right)
    product = graph.block_product(x, name, base, bias)
    return graph.node("Add", product, graph.node("MatMul", inner, graph.node("Mul", left, column)))


def stored_low_rank(
    left: torch.Tensor,  # int8 (rank, out_features), as `low_rank_product` stores it
    right: torch.Tensor,  # int8 (in_features, rank)
    scales: torch.Tensor,  # 16-bit float (rank,)
) -> LowRankCorrection:
    """The product that was stored."""
    return LowRankCorrection(left.t().contiguous(), right.t().contiguous(), scales)
