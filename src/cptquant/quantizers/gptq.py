"""GPTQ (arXiv 2210.17323): round one column after the other, and let the columns not yet rounded make up for it.

With U the upper Cholesky factor of the inverse Hessian (H^-1 = U' U; the paper's equations 2 to 5 and algorithm 1):

    for each column k:   Q_k = round(W_k),   W_j -= (W_k - Q_k) U_kj / U_kk   for every later column j

so that W always holds the best real-valued continuation of the columns rounded so far, and a group's scale is fitted to
that when the loop enters the group.

What we changed. U is found without inverting H (hessian_factor.py). Errors are spread by halving the columns
recursively instead of in fixed blocks, so that nearly all arithmetic is matrix products; the result is the same.

Damping is relative to the mean diagonal of the live inputs and is added to a copy; where it does not make the Hessian
positive definite it is raised tenfold until it does and the outcome says so, never replaced by plain rounding. Inputs
that were zero on all calibration text keep their weights, rounded (the paper sets them to 0, which costs more if the
input ever is not zero). Scales are 16-bit before anything is rounded, and may be negative (grid.py). Formats with
corrected columns are corrected.py's, those with a product of low rank low_rank.py's, with this loop for the codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteOutcome
from cptquant.packing.quantized_weight import QuantizedWeight, StoredWeight, join_rows, scale_shape
from cptquant.quantizers.block_descent import descend_blocks_
from cptquant.quantizers.block_gptq import BlockLoop
from cptquant.quantizers.corrected import quantize_with_columns
from cptquant.quantizers.descent import Rounded, descend_, descend_stored
from cptquant.quantizers.grid import ROWS_ENTRIES, Grid, code_range, fit_grid
from cptquant.quantizers.hessian_factor import HessianFactor, factor_hessian
from cptquant.quantizers.low_rank import quantize_with_low_rank

_LEAF_COLUMNS = 16
"""Below this width columns are rounded one by one; above it errors are spread by matrix products."""


@dataclass(frozen=True)
class GptqResult:
    """One matrix after GPTQ.

    Attributes:
        weight: codes and scales. outcome: NOMINAL, DEAD_INPUTS or RANK_DEFICIENT_HESSIAN_DAMPED.
        damping: fraction of the mean diagonal that was really added.
        relative_output_error: tr(E H E') / tr(W H W') with E = Q - W and the Hessian as given, undamped; None when
            the denominator is 0.
    """

    weight: StoredWeight
    outcome: SiteOutcome
    damping: float
    relative_output_error: float | None


@dataclass(frozen=True)
class Gptq:
    """Hyper-parameters of GPTQ.

    Attributes:
        damping: fraction of the mean diagonal added to the Hessian.
        activation_order: round the columns with the largest inputs first. Groups keep their columns, so their scales
            are then fitted before the loop, on the original weights; at 2 bits that costs more than the order gains.
        clip_search: search for the scale of least squared error instead of covering the largest weight.
        diagonal_importance: weigh that squared error by the Hessian's diagonal.
        descent_rounds: rounds of coordinate descent on scales and codes afterwards (descent.py); 0 is the paper's GPTQ.
        coarse_products: calibration passes may round the factors of their matrix products to bfloat16, where the
            processor does that in hardware (models/arithmetic.py).
    """

    damping: float = 0.01
    activation_order: bool = False
    clip_search: bool = True
    diagonal_importance: bool = True
    descent_rounds: int = 4
    coarse_products: bool = True

    def __call__(
        self,
        weight: Tensor,  # (out_features, in_features), any float dtype
        hessian: Tensor,  # (in_features, in_features) float32: mean of x x'
        fmt: QuantFormat,
        scale_dtype: torch.dtype,
    ) -> GptqResult:
        """Quantize one matrix; see `quantize_together`."""
        return self.quantize_together([weight], hessian, fmt, scale_dtype)[0]

    def quantize_together(
        self,
        weights: Sequence[Tensor],  # each (out_features, in_features), any float dtype
        hessian: Tensor,  # (in_features, in_features) float32: mean of x x'
        fmt: QuantFormat,
        scale_dtype: torch.dtype,
    ) -> list[GptqResult]:
        """Quantize matrices that read the same input and get the same format: one factorisation, one loop.

        Rows do not depend on each other: tall matrices go through the loop in pieces, so that memory stays bounded.
        Where codes are corrected, each matrix has columns or directions of its own, and hence two factorisations.

        Raises:
            DataError: the Hessian is NaN or infinite: the calibration text overflowed the model.
            ModelError: a weight is NaN or infinite, or needs a scale beyond the storage dtype's range.
        """
        blocks = fmt.block_layout is not None  # whose columns keep their order
        if fmt.is_corrected:
            factor = factor_hessian(hessian, self.damping, by_activation=False)
            return [self._quantize_corrected(weight.float(), factor, hessian, fmt, scale_dtype) for weight in weights]
        factor = factor_hessian(hessian, self.damping, by_activation=self.activation_order and not blocks)
        quantize = self._quantize_blocks if blocks else self._quantize
        pieces: list[list[Piece]] = [[] for _ in weights]
        for stack in row_stacks(weights, fmt):
            done = quantize([weights[index][rows] for index, rows in stack], factor, hessian, fmt, scale_dtype)
            for (index, _), piece in zip(stack, done, strict=True):
                pieces[index].append(piece)
        return [join_pieces(parts, factor) for parts in pieces]

    def _quantize_corrected(
        self, weight: Tensor, factor: HessianFactor, hessian: Tensor, fmt: QuantFormat, dtype: torch.dtype
    ) -> GptqResult:
        """One matrix with a correction; the Hessian is damped before columns or directions are swept out of it.

        What is left without some directions is singular and is damped again.
        """
        columns = fmt.storage == "columns"
        plain, inner = replace(self, damping=0.0) if columns else self, list[GptqResult]()

        def quantize(values: Tensor, moments: Tensor) -> StoredWeight:
            inner.append(plain(values, moments, fmt.base, dtype))
            return inner[0].weight

        construct = quantize_with_columns if columns else quantize_with_low_rank
        found = construct(weight, factor.damped, fmt, dtype, quantize, clip_search=self.clip_search)
        if not columns and self.descent_rounds:  # codes make up for what rounding the product has left
            target = found.correction.without(weight)
            found = replace(found, base=descend_stored(found.base, target, factor.damped, self.descent_rounds))
        raised = inner[0].damping > plain.damping
        return GptqResult(
            found,
            inner[0].outcome if raised else factor.outcome,
            factor.damping + inner[0].damping - plain.damping,
            relative_output_error(found.dequantize().sub_(weight).t(), weight.t(), hessian),
        )

    def _quantize(
        self, weights: Sequence[Tensor], factor: HessianFactor, hessian: Tensor, fmt: QuantFormat, dtype: torch.dtype
    ) -> list["Piece"]:
        # Columns become rows of the transpose, so that the loop reads and writes memory in order.
        columns = torch.cat([weight.float().t() for weight in weights], dim=1)[factor.order].contiguous()
        loop = _Loop(columns, factor, fmt, dtype, self)
        loop.sweep(0, columns.shape[0])
        inverse = torch.argsort(factor.order)
        rounded, columns = loop.rounded(inverse), columns[inverse]
        if self.descent_rounds:
            descend_(rounded, columns, factor.damped, self.descent_rounds)
        error = rounded.values().sub_(columns)
        codes = rounded.shifted
        if loop.zeros is not None:
            codes = codes + loop.zeros.repeat_interleave(rounded.group_columns, dim=0)[: len(codes)]
        codes = codes.t().to(torch.int8)
        pieces, start = [], 0
        for weight in weights:
            rows = slice(start, start + weight.shape[0])
            start = rows.stop
            lines = slice(None) if fmt.granularity == "tensor" else rows
            quantized = QuantizedWeight(
                fmt,
                codes[rows].contiguous(),
                _per_row(rounded.scales[:, lines], weight, fmt).to(dtype),
                None if loop.zeros is None else _per_row(loop.zeros[:, lines], weight, fmt).to(torch.int8),
            )
            pieces.append(
                Piece(quantized, output_power(error[:, rows], hessian), output_power(columns[:, rows], hessian))
            )
        return pieces

    def _quantize_blocks(
        self, weights: Sequence[Tensor], factor: HessianFactor, hessian: Tensor, fmt: QuantFormat, dtype: torch.dtype
    ) -> list["Piece"]:
        """The same onto GGUF's blocks; their scales are float16 whatever `dtype` is."""
        layout = fmt.block_layout
        assert layout is not None
        columns = torch.cat([weight.float().t() for weight in weights], dim=1).contiguous()
        importance = factor.importance if self.diagonal_importance else None
        placed = BlockLoop(columns, factor.feedback, layout, importance, search=self.clip_search).run()
        if self.descent_rounds:
            descend_blocks_(placed, columns, factor.damped, self.descent_rounds)
        error = placed.values().sub_(columns)
        pieces: list[Piece] = []
        start = 0
        for weight in weights:
            rows = slice(start, start + weight.shape[0])
            start = rows.stop
            stored = placed.weight(rows, fmt)
            pieces.append(Piece(stored, output_power(error[:, rows], hessian), output_power(columns[:, rows], hessian)))
        return pieces


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix: tr(E H E') and tr(W H W') over them."""

    weight: StoredWeight
    error: float
    power: float


def join_pieces(pieces: Sequence[Piece], factor: HessianFactor) -> GptqResult:
    """One matrix from its rows."""
    error = _ratio(sum(piece.error for piece in pieces), sum(piece.power for piece in pieces))
    return GptqResult(join_rows([piece.weight for piece in pieces]), factor.outcome, factor.damping, error)


def row_stacks(weights: Sequence[Tensor], fmt: QuantFormat) -> list[list[tuple[int, slice]]]:
    """Which rows of which matrix go through the loop together: [(matrix, rows), ...] a stack."""
    if fmt.granularity == "tensor":  # one scale for all rows of a matrix
        return [[(index, slice(0, weight.shape[0]))] for index, weight in enumerate(weights)]
    room = max(1, ROWS_ENTRIES // weights[0].shape[1])
    stacks: list[list[tuple[int, slice]]] = []
    free = 0
    for index, weight in enumerate(weights):
        start = 0
        while start < weight.shape[0]:
            if free == 0:
                stacks.append([])
                free = room
            stop = min(weight.shape[0], start + free)
            stacks[-1].append((index, slice(start, stop)))
            free -= stop - start
            start = stop
    return stacks


def _per_row(
    per_group: Tensor,  # (groups, out_features), or (1, 1) per tensor
    weight: Tensor,
    fmt: QuantFormat,
) -> Tensor:
    return per_group.t().reshape(scale_shape(fmt, *weight.shape))


def relative_output_error(
    error: Tensor,  # (in_features, out_features): columns first
    weight: Tensor,  # (in_features, out_features)
    hessian: Tensor,  # (in_features, in_features)
) -> float | None:
    """tr(E H E') / tr(W H W'): mean squared output error over mean squared output; None if the output is zero."""
    return _ratio(output_power(error, hessian), output_power(weight, hessian))


def output_power(matrix: Tensor, hessian: Tensor) -> float:
    """tr(M' H M), at least 0."""
    return max(0.0, float(torch.sum((hessian @ matrix).mul_(matrix), dtype=torch.float64)))


def _ratio(error: float, power: float) -> float | None:
    return error / power if power > 0 else None


class _Loop:
    """The columns of one stack of matrices on their way through GPTQ.

    Attributes:
        codes: float32 of integers (in_features, out_features), in the order of the factor.
        scales, zeros: float32 (groups, out_features), groups in original order; (1, 1) per tensor.
    """

    def __init__(
        self, columns: Tensor, factor: HessianFactor, fmt: QuantFormat, dtype: torch.dtype, gptq: Gptq
    ) -> None:
        count, rows = columns.shape
        self._factor, self._fmt, self._dtype, self._gptq = factor, fmt, dtype, gptq
        self._compensated = columns.clone()
        self._error = torch.zeros_like(columns)
        self.codes = torch.empty_like(columns)
        self._width = fmt.granularity if isinstance(fmt.granularity, int) else count
        groups = fmt.group_count(count)
        lines = 1 if fmt.granularity == "tensor" else rows
        self.scales = columns.new_ones(groups, lines)
        self.zeros = None if fmt.symmetric else columns.new_zeros(groups, lines)
        self._grids: dict[int, Grid] = {}
        self._group_of = torch.div(factor.order, self._width, rounding_mode="floor").tolist()
        if gptq.activation_order:
            inverse = torch.argsort(factor.order)
            for group in range(groups):
                self._fit(group, columns[inverse[group * self._width : (group + 1) * self._width]])

    def rounded(
        self,
        inverse: Tensor,  # (in_features,): where each original column went
    ) -> Rounded:
        """The result in original order, once all columns are through."""
        low, high = code_range(self._fmt)
        shifted, zeros = self.codes[inverse], torch.zeros_like(self.scales)
        if self.zeros is not None:
            zeros = self.zeros
            shifted -= zeros.repeat_interleave(self._width, dim=0)[: len(shifted)]
        return Rounded(shifted, self.scales, low - zeros, high - zeros, self._width, self._dtype)

    def sweep(self, start: int, stop: int) -> None:
        """Round columns start to stop, which have received all errors of the columns before `start`."""
        if stop - start <= _LEAF_COLUMNS:
            for index in range(start, stop):
                self._round_column(index, stop)
            return
        middle = self._split(start, stop)
        self.sweep(start, middle)
        feedback = self._factor.feedback[start:middle, middle:stop]
        self._compensated[middle:stop].addmm_(feedback.t(), self._error[start:middle], alpha=-1)
        self.sweep(middle, stop)

    def _split(self, start: int, stop: int) -> int:
        """A middle on a group's edge if there is one inside, so that a group is complete when it is fitted."""
        middle = (start + stop) // 2
        width = self._width
        if width < stop - start:
            edge = round(middle / width) * width
            if start < edge < stop:
                return edge
        return start + -(-(middle - start) // _LEAF_COLUMNS) * _LEAF_COLUMNS

    def _round_column(self, index: int, stop: int) -> None:
        group = self._group_of[index]
        if group not in self._grids:  # entering the group: fit it to the weights as compensated so far
            self._fit(group, self._compensated[index : min(index + self._width, len(self._group_of))])
        column, grid = self._compensated[index], self._grids[group]
        if self._fmt.granularity == "tensor":
            column = column[None]
        codes = grid.round(column)
        self.codes[index] = codes.reshape(-1)
        error = torch.sub(self._compensated[index], grid.value(codes).reshape(-1), out=self._error[index])
        if index + 1 < stop:
            feedback = self._factor.feedback[index, index + 1 : stop]
            self._compensated[index + 1 : stop].addr_(feedback, error, alpha=-1)

    def _fit(
        self,
        group: int,
        columns: Tensor,  # (group columns, out_features)
    ) -> None:
        rows = columns.t().contiguous()
        importance = None
        if self._gptq.diagonal_importance:
            importance = self._factor.importance[group * self._width : group * self._width + rows.shape[1]]
        if self._fmt.granularity == "tensor":
            importance = None if importance is None else importance.repeat(rows.shape[0])
            rows = rows.reshape(1, -1)
        grid = fit_grid(rows, self._fmt, self._dtype, importance=importance, clip_search=self._gptq.clip_search)
        self._grids[group] = grid
        self.scales[group] = grid.scales
        if self.zeros is not None and grid.zeros is not None:
            self.zeros[group] = grid.zeros
