"""Embeddings and heads that are never in float32 as a whole: rows are upcast or dequantized where they are used."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptquant.packing.quantized_weight import StoredWeight

_HEAD_CHUNK_ENTRIES = 1 << 21
"""Rows of a large head are upcast to float32 this many weights (8 MB) at a time."""


class WeightRows:
    """A tall matrix whose rows are upcast or dequantized only where they are used."""

    def __init__(self, stored: Tensor | StoredWeight) -> None:
        self._stored = stored
        self.shape = tuple(stored.shape)

    def chunks(self) -> Iterator[slice]:
        """All rows in order, as many at a time as are upcast together."""
        step = max(1, _HEAD_CHUNK_ENTRIES // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Rows in float32, shape (len(rows), columns)."""
        stored = self._stored
        return stored[rows].float() if isinstance(stored, Tensor) else stored.rows(rows).dequantize()


class LargeEmbedding(nn.Module):
    """nn.Embedding whose table stays in its stored form."""

    def __init__(self, rows: WeightRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., width) float32."""
        return self.rows[input_ids.reshape(-1)].reshape(*input_ids.shape, self.rows.shape[1])


class _LargeProduct(torch.autograd.Function):
    """inputs @ rows', a few rows upcast at a time, on the way back as well: autograd would keep them all in float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: WeightRows) -> Tensor:
        """(n, in) float32 -> (n, out) float32."""
        ctx.rows = rows
        output = inputs.new_empty(len(inputs), rows.shape[0])
        for part in rows.chunks():
            torch.mm(inputs, rows[part].t(), out=output[:, part])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(n, out) -> (n, in); the weight is fixed."""
        (gradient,), rows = gradients, ctx.rows
        result = gradient.new_zeros(len(gradient), rows.shape[1])
        for part in rows.chunks():
            result.addmm_(gradient[:, part], rows[part])
        return result, None


class LargeLinear(nn.Module):
    """nn.Linear whose weight stays in its stored form and is upcast in row chunks."""

    def __init__(self, rows: WeightRows, bias: Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) float32 -> (..., out) float32."""
        flat = hidden.reshape(-1, self.rows.shape[1]).float()  # a coarse layer before it gives bfloat16
        logits = cast(Tensor, _LargeProduct.apply(flat, self.rows)).view(*hidden.shape[:-1], self.rows.shape[0])
        return logits if self.bias is None else logits.add_(self.bias)
