"""The pieces that transformers are made of, as ONNX nodes: linear maps, norms, activations, embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.exporters.onnx.columns import columns_product
from cptquant.exporters.onnx.graph import CONTRIB, GraphBuilder
from cptquant.exporters.onnx.low_rank import low_rank_product
from cptquant.exporters.onnx.segments import segment_product
from cptquant.models.stream import QuantizedSource
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, join_quantized
from cptquant.packing.segments import SegmentedWeight, join_segmented_rows

_Product = QuantizedWeight | SegmentedWeight | CorrectedWeight
"""What a product can be made with."""
_APART = {"q": 8, "k": 8, "v": 8, "up": 8, "down": 8}
"""Columns of an input that stay floats beside an 8-bit product with one scale for all activations, by role: a few are
so large that the others would lose their digits (decision 0006)."""


@dataclass(frozen=True)
class Norm:
    """Names of a norm's parameters, and its kind. `bias` empty: root-mean-square norm or one without bias."""

    name: str
    epsilon: float
    centered: bool = True


class Parts:
    """A model being rewritten as a graph.

    Args:
        graph: takes nodes and tensors. config: the Hugging Face configuration.
        layout: sites and shared tensors. state: the original's tensors by name.
        formats: site name -> format. source: the quantized sites' codes and scales.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        config: Any,
        layout: ModelLayout,
        state: dict[str, Tensor],
        formats: dict[str, QuantFormat],
        source: QuantizedSource,
    ) -> None:
        self.graph, self.config, self.layout = graph, config, layout
        self._state, self._formats, self._source = state, formats, source

    @property
    def head(self) -> str:
        """Name of the site that makes logits."""
        return next(site.name for site in self.layout.sites if site.role == "head")

    def has(self, name: str) -> bool:
        """Whether the original has a tensor of that name."""
        return name in self._state

    def tensor(self, name: str) -> str:
        """A kept tensor as a float32 value."""
        return self.graph.float_tensor(name, self._state[name])

    def raw(self, name: str) -> Tensor:
        """A kept tensor itself."""
        return self._state[name]

    def linear(self, x: str, site: str) -> str:
        """x W^T + b for a site, in whatever format the plan gave it."""
        bias = self.tensor(f"{site}.bias") if self.has(f"{site}.bias") else ""
        if self._format(site) is None:
            return self._dense(x, site, bias)
        if self._is_shared(site):
            return self.graph.block_product(x, self._shared_embedding(site), self._one_width(site), bias)
        return self._quantized(x, site, self._stored(site), bias)

    def joined(self, x: str, sites: Sequence[str], order: Tensor | None = None) -> str | None:
        """Several sites with the same input as one product, outputs side by side; None if their formats, or their
        columns of either width, differ.

        Args:
            order: rows of the joined matrix in the order wanted.
        """
        formats = [self._format(site) for site in sites]
        fmt = formats[0]
        if any(other != fmt for other in formats) or fmt is None or fmt.granularity == "tensor":
            return None
        weight = _join([self._stored(site) for site in sites])
        if weight is None:
            return None
        biases = [self._state[f"{site}.bias"] for site in sites if self.has(f"{site}.bias")]
        if len(biases) not in (0, len(sites)):
            return None
        bias = ""
        if order is not None:
            weight = weight.rows(order)
        if biases:
            joined_bias = torch.cat(biases)
            joined_bias = joined_bias if order is None else joined_bias[order]
            bias = self.graph.float_tensor("+".join(sites) + ".bias", joined_bias)
        return self._quantized(x, "+".join(sites), weight, bias)

    def reordered_linear(self, x: str, site: str, order: Tensor) -> str:
        """As `linear`, with the output features in another order."""
        joined = self.joined(x, [site], order)
        if joined is not None:
            return joined
        name = f"{site}.reordered"
        quantized = self._format(site) is not None
        dense = self._stored(site).rows(order) if quantized else self._float_matrix(site)[order]
        bias = ""
        if self.has(f"{site}.bias"):
            bias = self.graph.float_tensor(f"{name}.bias", self._state[f"{site}.bias"][order])
        if not isinstance(dense, Tensor):
            return self._quantized(x, name, dense, bias)
        product = self.graph.node("MatMul", x, self.graph.float_tensor(f"{name}.weight", dense, transpose=True))
        return self.graph.node("Add", product, bias) if bias else product

    def embedding(self, ids: str, site: str) -> str:
        """Rows of an embedding as float32."""
        fmt = self._format(site)
        if fmt is None:
            name = f"{site}.weight"
            rows = self.graph.node("Gather", self.graph.stored_float(name, self._state[name]), ids)
            return self.graph.node("Cast", rows, to=TensorProto.FLOAT)
        weight = self._one_width(site)
        by_rows = fmt.granularity == "channel" and fmt.code_bits == 8 and fmt.symmetric
        if by_rows and not self._is_shared(site):
            return self.graph.gather_rows(ids, site, weight)
        return self.graph.gather_quantized(ids, site, weight)

    def norm(self, x: str, norm: Norm) -> str:
        """Layer norm, or root-mean-square norm where not centered."""
        weight = self.tensor(f"{norm.name}.weight")
        if not norm.centered:
            return self.graph.node("SimplifiedLayerNormalization", x, weight, epsilon=norm.epsilon, axis=-1)
        bias = [self.tensor(f"{norm.name}.bias")] if self.has(f"{norm.name}.bias") else []
        return self.graph.node("LayerNormalization", x, weight, *bias, epsilon=norm.epsilon, axis=-1)

    def add_norm(self, x: str, update: str, norm: Norm) -> tuple[str, str]:
        """(x + update, norm of it): in one node for decoders.

        The one node costs 0.5 ms for 128 tokens of width 768, the two 0.1 ms, but decoding, a token at a time, is a
        matter of nodes. `Sum` because the engine would make an `Add` and the norm the one node again.
        """
        if self.layout.task != "causal_lm":
            total = self.graph.node("Sum", x, update)
            return total, self.norm(total, norm)
        weight = self.tensor(f"{norm.name}.weight")
        operator, inputs = "SkipSimplifiedLayerNormalization", [x, update, weight]
        if norm.centered:
            operator = "SkipLayerNormalization"
            inputs += [self.tensor(f"{norm.name}.bias")] if self.has(f"{norm.name}.bias") else []
        label = f"{norm.name}.out"
        outputs = [label, "", "", f"{norm.name}.sum"]
        normed, _, _, total = self.graph.nodes(operator, inputs, outputs, domain=CONTRIB, epsilon=norm.epsilon)
        return total, normed

    def activate(self, x: str, name: str) -> str:
        """An activation by its Hugging Face name, one of `check.ACTIVATIONS`."""
        if name == "relu":
            return self.graph.node("Relu", x)
        if name in ("silu", "swish"):
            return self.graph.node("QuickGelu", x, domain=CONTRIB, alpha=1.0)
        if name == "gelu":
            return self.graph.node("Gelu", x, domain=CONTRIB)
        if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            return self.graph.node("FastGelu", x, domain=CONTRIB)
        if name == "tanh":
            return self.graph.node("Tanh", x)
        raise AssertionError(f"{name} is not among the activations that were checked")

    def _format(self, site: str) -> QuantFormat | None:
        """The integer format of a site; None in 16 bits, and for linear maps that are no site."""
        fmt = self._formats.get(site)
        return None if fmt is None or fmt.is_float else fmt

    def _is_shared(self, site: str) -> bool:
        """Whether a site is an embedding or head that are one quantized tensor."""
        shared = self.layout.shared_head
        return shared is not None and site in shared and self._format(site) is not None

    def _shared_embedding(self, head: str) -> str:
        """The embedding whose tensor the head is.

        Raises:
            ModelError: the two were quantized apart.
        """
        assert self.layout.shared_head is not None
        embedding = self.layout.shared_head[0]
        first, second = self._one_width(embedding), self._one_width(head)
        if not torch.equal(first.codes, second.codes) or not torch.equal(first.scales, second.scales):
            raise ModelError(
                f"{embedding} and {head} are one tensor in a file for ONNX Runtime, but this run quantized them apart; "
                "quantize with --target onnx"
            )
        return embedding

    def _stored(self, site: str) -> _Product:
        weight = self._source.quantized(site)
        if not isinstance(weight, QuantizedWeight | SegmentedWeight | CorrectedWeight):
            raise ModelError(f"the plan quantizes {site}, but no codes of it stand; run: cptquant quantize RUN")
        return weight

    def _one_width(self, site: str) -> QuantizedWeight:
        weight = self._stored(site)
        if not isinstance(weight, QuantizedWeight):
            raise ModelError(
                f"{site} has {self._formats[site].name} here, groups of mixed width or a correction, which only "
                "products with a matrix of its own can have"
            )
        return weight

    def _quantized(self, x: str, name: str, weight: _Product, bias: str) -> str:
        if isinstance(weight, CorrectedWeight):
            return self._corrected(x, name, weight, bias)
        if isinstance(weight, SegmentedWeight):
            return segment_product(self.graph, x, name, weight, bias)
        fmt = weight.format
        if self.layout.task != "causal_lm" and fmt.code_bits == 8 and fmt.granularity == "channel" and fmt.symmetric:
            site = self.layout.site_by_name.get(name)
            apart = 0 if site is None else _APART.get(site.role, 0)
            return self.graph.row_product(x, name, weight, bias, apart=apart)
        return self.graph.block_product(x, name, weight, bias)

    def _corrected(self, x: str, name: str, weight: CorrectedWeight, bias: str) -> str:
        correction = weight.correction
        if isinstance(correction, LowRankCorrection):
            return low_rank_product(self.graph, x, name, weight.base, correction, bias)
        return columns_product(self.graph, x, name, weight.base, correction, bias)

    def _dense(self, x: str, site: str, bias: str) -> str:
        shared = self.layout.shared_head
        if shared is not None and site == shared[1] and self._format(shared[0]) is None:
            name = f"{shared[0]}.weight"  # one tensor in the original, and so in the file
        else:
            name = f"{site}.weight"
        known = self.layout.site_by_name.get(site)
        transposed = known is not None and known.transposed
        product = self.graph.node(
            "MatMul", x, self.graph.float_tensor(name, self._state[name], transpose=not transposed)
        )
        return self.graph.node("Add", product, bias) if bias else product

    def _float_matrix(self, site: str) -> Tensor:
        weight = self._state[f"{site}.weight"]
        return weight.t() if self.layout.site_by_name[site].transposed else weight


def _join(weights: Sequence[_Product]) -> QuantizedWeight | SegmentedWeight | None:
    """Matrices of one input and format below each other; None where their columns stand in different halves, or where
    each corrects columns of its own."""
    plain = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(plain) == len(weights):
        return join_quantized(plain)
    mixed = [weight for weight in weights if isinstance(weight, SegmentedWeight)]
    if len(mixed) < len(weights):
        return None
    first = mixed[0].stored_order()
    return join_segmented_rows(mixed) if all(torch.equal(first, other.stored_order()) for other in mixed) else None
