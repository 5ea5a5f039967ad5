"""Build an ONNX graph whose matrices hold our integers, and write its tensors beside it as they are made.

Tensors go into one external data file, one after another, so memory holds one matrix at a time. Everything that is a
16-bit float in the plan is a 16-bit float in the file; a Cast, folded when the engine loads it, makes it float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from cptquant.packing.nbits import pack_nbits
from cptquant.packing.quantized_weight import QuantizedWeight

CONTRIB = "com.microsoft"
_OPSET, _CONTRIB_OPSET, _IR_VERSION = 20, 1, 10
_ALIGNMENT = 64
_INT8_COMPUTE = 4
"""MatMulNBits' accuracy_level: activations rounded to 8 bits per block, products in integers. Float kernels for 2 and 8
bits are 30 to 60 times slower (measured)."""
_ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.uint16: TensorProto.UINT16,
}


@dataclass(frozen=True)
class _Split:
    """Activations with a few columns taken out: names of values.

    Attributes:
        others: (rows, features), zero in those columns. columns: (rows, count). indices: (count,), which they are.
        rows: shape of the activations without their last axis.
    """

    others: str
    columns: str
    indices: str
    rows: str


class GraphBuilder:
    """Nodes, inputs, outputs and tensors of one model.

    Args:
        data: open file that takes the tensors. data_name: its name as the model refers to it.
        storage: 16-bit float in which everything unquantized is stored.
    """

    def __init__(self, data: IO[bytes], data_name: str, storage: torch.dtype) -> None:
        self._data, self._data_name, self._storage = data, data_name, storage
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._floats: dict[str, str] = {}
        self._block_inputs: dict[str, tuple[str, str, str]] = {}
        self._splits: dict[str, _Split] = {}
        self._count = 0
        self.tensor_bytes = 0

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, value: str, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """Declare a graph output that is `value`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output.{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes(operator, inputs, 1, domain=domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: int | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; their names, made up unless given ("" leaves one out)."""
        self._count += 1
        label = f"{operator}_{self._count}"
        names = [f"{label}.{index}" for index in range(outputs)] if isinstance(outputs, int) else list(outputs)
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(operator, list(inputs), names, name=label, domain=domain, **attributes))
        return names

    def constant(self, values: NDArray[Any]) -> str:
        """A small constant kept inside the model file."""
        self._count += 1
        name = f"constant_{self._count}"
        self._tensors.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def float_tensor(self, name: str, value: Tensor, *, transpose: bool = False) -> str:
        """A tensor stored in 16 bits and used as float32; written once, whoever asks."""
        key = name + (".T" if transpose else "")
        if key not in self._floats:
            stored = self.stored_float(name, value)
            cast = self.node("Cast", stored, to=TensorProto.FLOAT)
            self._floats[key] = self.node("Transpose", cast, perm=[1, 0]) if transpose else cast
        return self._floats[key]

    def stored_float(self, name: str, value: Tensor) -> str:
        """A tensor stored in 16 bits and left so; written once, whoever asks."""
        if name not in {tensor.name for tensor in self._tensors}:
            self.store(name, value.detach().to(self._storage))
        return name

    def store(self, name: str, value: Tensor | NDArray[Any]) -> str:
        """Append a tensor to the data file as it is."""
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        tensor = tensor.contiguous().cpu()
        content = tensor.view(torch.uint8).numpy() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy()
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        content.tofile(self._data)
        proto = TensorProto(name=name, data_type=_ONNX_DTYPES[tensor.dtype], dims=list(tensor.shape))
        proto.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", self._data_name), ("offset", offset), ("length", content.nbytes)):
            proto.external_data.add(key=key, value=str(entry))
        self._tensors.append(proto)
        self.tensor_bytes += content.nbytes
        return name

    def block_product(self, x: str, name: str, weight: QuantizedWeight, bias: str = "") -> str:
        """x times the quantized matrix's transpose: MatMulNBits with our codes and scales."""
        packed = pack_nbits(weight)
        rows, columns = weight.codes.shape
        if f"{name}.codes" in self._block_inputs:  # an embedding's tensors, whose codes lie row by row
            flat, scales, zeros = self._block_inputs[f"{name}.codes"]
            codes = self.node("Reshape", flat, self.constant(np.array(packed.codes.shape, np.int64)))
        else:
            codes = self.store(f"{name}.codes", packed.codes)
            scales = self._block_scales(name, packed.scales, rows, packed.block_count)
            zeros = "" if packed.zeros is None else self.store(f"{name}.zeros", packed.zeros)
        inputs = [x, codes, scales, zeros, "", bias]
        while not inputs[-1]:
            inputs.pop()
        return self.nodes(
            "MatMulNBits", inputs, 1, domain=CONTRIB, K=columns, N=rows, bits=packed.bits,
            block_size=packed.block_size, accuracy_level=_INT8_COMPUTE,
        )[0]  # fmt: skip

    def row_product(self, x: str, name: str, weight: QuantizedWeight, bias: str = "", *, apart: int = 0) -> str:
        """x times an 8-bit matrix with one scale a row, in integers; activations are rounded with one scale a call.

        Args:
            x: (batch, tokens, in_features). apart: that many columns of x, the ones with the largest sum of squares in
                the call at hand, stay floats and are multiplied apart, so that they do not coarsen the others' scale.
        """
        codes = self.store(f"{name}.codes", weight.codes.t())
        scales = self.node("Cast", self.store(f"{name}.scales", weight.scales.reshape(-1)), to=TensorProto.FLOAT)
        height, width = weight.codes.shape
        others = x if not apart else self._set_apart(x, width, min(apart, width)).others
        inputs = [others, codes, scales, *(["", bias] if bias else [])]
        product = self.nodes("DynamicQuantizeMatMul", inputs, 1, domain=CONTRIB)[0]
        if not apart:
            return product
        split = self._splits[x]
        matrix = self.node("Cast", self.node("Gather", codes, split.indices, axis=0), to=TensorProto.FLOAT)
        total = self.node("Gemm", split.columns, self.node("Mul", matrix, scales), product)
        shape = self.node("Concat", split.rows, self.constant(np.array([height], np.int64)), axis=0)
        return self.node("Reshape", total, shape)

    def _set_apart(self, x: str, width: int, count: int) -> "_Split":
        """x (batch, tokens, width) as rows, with `count` columns taken out; made once, whoever asks.

        Squares are summed because ReduceSum is 5 times faster over rows than ReduceMax.
        """
        if x not in self._splits:
            features = self.node("Shape", x, start=2)
            rows = self.node(
                "Reshape", x, self.node("Concat", self.constant(np.array([-1], np.int64)), features, axis=0)
            )
            first = self.constant(np.array([0], np.int64))
            energy = self.node("ReduceSum", self.node("Mul", rows, rows), first, keepdims=0)
            _, indices = self.nodes("TopK", [energy, self.constant(np.array([count], np.int64))], 2, axis=0, sorted=0)
            one = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
            kept = self.node("ConstantOfShape", self.constant(np.array([width], np.int64)), value=one)
            mask = self.node("ScatterElements", kept, indices, self.constant(np.zeros(count, np.float32)))
            self._splits[x] = _Split(
                others=self.node("Mul", rows, mask),
                columns=self.node("Gather", rows, indices, axis=1),
                indices=indices,
                rows=self.node("Shape", x, end=2),
            )
        return self._splits[x]

    def gather_quantized(self, ids: str, name: str, weight: QuantizedWeight) -> str:
        """Rows of a quantized embedding as float32."""
        packed = pack_nbits(weight)
        rows = weight.codes.shape[0]
        codes = self.store(f"{name}.codes", packed.codes.reshape(rows, -1))
        scales = self._block_scales(name, packed.scales, rows, packed.block_count)
        zeros = "" if packed.zeros is None else self.store(f"{name}.zeros", packed.zeros)
        self._block_inputs[f"{name}.codes"] = (codes, scales, zeros)
        return self.nodes(
            "GatherBlockQuantized", [codes, ids, scales, *([zeros] if zeros else [])], 1, domain=CONTRIB,
            bits=packed.bits, block_size=packed.block_size, gather_axis=0, quantize_axis=1,
        )[0]  # fmt: skip

    def gather_rows(self, ids: str, name: str, weight: QuantizedWeight) -> str:
        """Rows of an 8-bit embedding with one scale a row."""
        codes = self.store(f"{name}.codes", weight.codes)
        scales = self.store(f"{name}.scales", weight.scales.reshape(-1, 1))
        values = self.node("Cast", self.node("Gather", codes, ids), to=TensorProto.FLOAT)
        return self.node("Mul", values, self.node("Cast", self.node("Gather", scales, ids), to=TensorProto.FLOAT))

    def _block_scales(self, name: str, scales: Tensor, rows: int, blocks: int) -> str:
        """(rows, blocks) float32 from the stored 16-bit scales, each repeated over the blocks that share it."""
        value = self.node("Cast", self.store(f"{name}.scales", scales), to=TensorProto.FLOAT)
        if tuple(scales.shape) == (rows, blocks):
            return value
        groups = scales.shape[1]
        value = self.node("Unsqueeze", value, self.constant(np.array([2], np.int64)))
        value = self.node("Expand", value, self.constant(np.array([rows, groups, blocks // groups], np.int64)))
        return self.node("Reshape", value, self.constant(np.array([rows, blocks], np.int64)))

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished model, referring to its data file."""
        graph = helper.make_graph(self._nodes, "cptquant", self._inputs, self._outputs, self._tensors)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, _CONTRIB_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="cptquant")
        helper.set_model_props(model, metadata)
        return model


def with_float_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with float activations, for checking the integers apart from the engine's activation rounding.

    Slow: MatMulNBits at accuracy level 0, and DynamicQuantizeMatMul replaced by dequantization and a float product.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
            nodes.append(node)
        elif node.op_type == "DynamicQuantizeMatMul":
            nodes += _dequantized_product(node)
        else:
            nodes.append(node)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _dequantized_product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, codes, scales, _, *bias = [*node.input, ""][:5] if len(node.input) > 3 else [*node.input, "", ""]
    weight, product, output = f"{node.name}.weight", f"{node.name}.product", node.output[0]
    has_bias = bool(bias and bias[0])
    made = [
        helper.make_node("Cast", [codes], [f"{weight}.codes"], name=f"{weight}.codes", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{weight}.codes", scales], [weight], name=weight),
        helper.make_node("MatMul", [x, weight], [product if has_bias else output], name=product),
    ]
    if has_bias:
        made.append(helper.make_node("Add", [product, bias[0]], [output], name=f"{node.name}.sum"))
    return made


def data_file(model_file: Path) -> Path:
    """Where the tensors of a model file lie."""
    return model_file.with_name(model_file.name + ".data")
