"""Codes of all weights, and a product of two thin 8-bit factors beside them (formats like `int3-g64-r4`).

With W the weights, Q the codes' values, H the damped second moments of the inputs and A B the product, the error is
tr(E H E') with E = W - Q - A B. SLiM (arXiv 2410.09615, "SLiM-LoRA") and LQER (arXiv 2402.02446) quantize first and fit
A B to what is left, by the SVD of (W - Q) H^(1/2). That is worth little after GPTQ, which has moved what was large in
the error to where it costs least (docs/low-rank.md). Here the directions B come first. Whatever the codes are, the best
A is then (W - Q) H B' (B H B')^-1, and it leaves

    tr((W - Q) S (W - Q)'),     S = H - H B' (B H B')^-1 B H,

so GPTQ and its descent run under S: errors along B are free. For the same reason the codes need not hold what W itself
has along B: they are made of W - A0 B with A0 = W H B' (B H B')^-1, whose groups span less and have finer steps
(SVDQuant, arXiv 2411.05007, takes out the same part, and rounds the rest without S). B are the leading right singular
vectors of W H^(1/2), times H^(-1/2): the part that is worth most to take out. At the end both factors are fitted once
more to W - Q, as SLiM does.

B is rounded to 8 bits before A is fitted to it, so its rounding costs next to nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.low_rank import RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, StoredWeight
from cptquant.quantizers.grid import fit_grid, round_to_grid

_EIGHT_BITS, _JUDGED = QuantFormat(code_bits=8), QuantFormat(code_bits=3, granularity=64)
_LARGEST_CODE = 127
_OVERSAMPLED, _POWER_STEPS = 8, 4
"""Of the randomised SVD (Halko et al., arXiv 0909.4061): further directions, and passes that sharpen the spectrum."""


def quantize_with_low_rank(
    weight: Tensor,  # (out_features, in_features) float32
    damped: Tensor,  # (in_features, in_features) float32, positive definite
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    quantize: Callable[[Tensor, Tensor], StoredWeight],
    *,
    clip_search: bool = True,
) -> CorrectedWeight:
    """Choose directions, quantize under what their product leaves, and fit the product.

    Args:
        damped: mean of x x' with damping. quantize: (weight, second moments, nearly singular) -> codes in `fmt.base`.

    Raises:
        ModelError: as `fit_grid`.
    """
    if not bool(torch.isfinite(weight).all()):
        quantize(weight, damped)  # says which weight
    metric = _Dense(damped)
    right = _directions(weight, metric, fmt.rank)
    apart, moments = metric.project(weight, right)
    return _with_product(weight, metric, fmt, scale_dtype, quantize(weight - apart, moments), clip_search)


def round_with_low_rank(
    weight: Tensor,  # (out_features, in_features), any float dtype
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,  # (in_features,) float32
    clip_search: bool = True,
) -> CorrectedWeight:
    """Round to nearest what the leading product leaves of the weights; inputs count as uncorrelated.

    Raises:
        ModelError: as `fit_grid`.
    """
    original = weight.float()

    def rounded(values: Tensor, moments: Tensor | None) -> StoredWeight:
        return round_to_grid(values, fmt.base, scale_dtype, importance=moments, clip_search=clip_search)

    if not bool(torch.isfinite(original).all()):
        rounded(original, None)  # says which weight
    metric = _Diagonal(original.new_ones(original.shape[1]) if importance is None else importance)
    apart, _ = metric.project(original, _directions(original, metric, fmt.rank))
    return _with_product(original, metric, fmt, scale_dtype, rounded(original - apart, importance), clip_search)


class LowRankSearch:
    """What products of some ranks leave of one matrix's error; ranks that are asked for share what they can.

    Args:
        weight: (out_features, in_features) float32; its directions are looked for in all rows.
        damped: (in_features, in_features) float32, positive definite.
        judged: rows that are rounded, int64; the others count as like them. None: all.

    Raises:
        ModelError: as `fit_grid`.
    """

    def __init__(self, weight: Tensor, damped: Tensor, scale_dtype: torch.dtype, judged: Tensor | None = None) -> None:
        self._weight, self._damped, self._dtype = weight, damped, scale_dtype
        self._rows = weight if judged is None else weight[judged]
        self._metric, self._right = _Dense(damped), weight[:0]
        self._before = self._error(self._rows, damped)

    def ratio(self, rank: int) -> float:
        """What the product leaves of tr(E H E') of rounding to 3 bits in groups of 64, A not rounded; at most 1.

        Of rounding to 2 and 4 bits it leaves nearly the same.
        """
        if len(self._right) < rank:
            self._right = _directions(self._weight, self._metric, rank)
        apart, moments = self._metric.project(self._rows, self._right[:rank])  # the best come first
        return min(1.0, max(0.0, self._error(self._rows - apart, moments)) / self._before) if self._before > 0 else 1.0

    def _error(self, values: Tensor, moments: Tensor) -> float:
        rounded = round_to_grid(values, _JUDGED, self._dtype, importance=moments.diagonal().clamp(min=0))
        found = rounded.dequantize().sub_(values)
        return float(((found @ moments) * found).sum(dtype=torch.float64))


class _Dense:
    """H, its root and its projections."""

    def __init__(self, moments: Tensor) -> None:
        self._moments, self._root = moments, _root_of(moments)

    def times(self, rows: Tensor) -> Tensor:
        """rows H."""
        return rows @ self._moments

    def to_root(self, rows: Tensor) -> Tensor:
        """rows H^(1/2), by a triangular root."""
        return rows @ self._root

    def from_root(self, rows: Tensor) -> Tensor:
        """rows H^(-1/2)."""
        return torch.linalg.solve_triangular(self._root, rows, upper=False, left=False)

    def project(self, weight: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(the weight's own part along B, S)."""
        moved = self.times(right)
        solved = _inverse(moved @ right.t()) @ moved  # (B H B')^-1 B H
        left_over = self._moments.addmm(moved.t(), solved, alpha=-1)
        return weight @ solved.t() @ right, (left_over + left_over.t()) / 2


class _Diagonal:
    """The same where inputs count as uncorrelated."""

    def __init__(self, importance: Tensor) -> None:
        tiny = float(importance.mean()) * 1e-6 or 1.0
        self._moments = importance.float().clamp(min=tiny)

    def times(self, rows: Tensor) -> Tensor:
        """rows H."""
        return rows * self._moments

    def to_root(self, rows: Tensor) -> Tensor:
        """rows H^(1/2)."""
        return rows * self._moments.sqrt()

    def from_root(self, rows: Tensor) -> Tensor:
        """rows H^(-1/2)."""
        return rows / self._moments.sqrt()

    def project(self, weight: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """(the weight's own part along B, the diagonal itself: rounding to nearest has no use for S)."""
        moved = self.times(right)
        return weight @ moved.t() @ _inverse(moved @ right.t()) @ right, self._moments


def _root_of(moments: Tensor) -> Tensor:
    """Lower triangular L with L L' = H."""
    root, failed = torch.linalg.cholesky_ex(moments)
    if int(failed):  # positive definite in another order of the columns, but for rounding
        raised = moments.double()
        raised.diagonal().add_(1e-6 * float(moments.diagonal().mean()))
        root = torch.linalg.cholesky(raised)
    return root.to(moments.dtype)


def _inverse(matrix: Tensor) -> Tensor:
    """Of a small symmetric matrix, which may be singular."""
    return torch.linalg.pinv(matrix.double(), hermitian=True).to(matrix.dtype)


def _directions(values: Tensor, metric: _Dense | _Diagonal, rank: int) -> Tensor:
    """B, rounded: codes / `RIGHT_UNIT`, float32 (rank, in_features)."""
    wanted = metric.to_root(values)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the processor alone, which is what is put back
        count = min(rank + _OVERSAMPLED, *wanted.shape)
        _, _, vectors = torch.svd_lowrank(wanted, q=count, niter=_POWER_STEPS)
    right = metric.from_root(vectors[:, :rank].t().contiguous())
    largest = right.abs().amax(dim=1, keepdim=True)
    return (right * (_LARGEST_CODE / torch.where(largest > 0, largest, torch.ones_like(largest)))).round_() / RIGHT_UNIT


def _with_product(
    weight: Tensor,
    metric: _Dense | _Diagonal,
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    base: StoredWeight,
    clip_search: bool,
) -> CorrectedWeight:
    """The codes with the product that fits what they leave."""
    assert isinstance(base, QuantizedWeight)
    error = base.dequantize().neg_().add_(weight)
    right = _directions(error, metric, fmt.rank)
    moved = metric.times(right)
    columns = (_inverse(moved @ right.t()) @ (moved @ error.t())).contiguous()  # A', (rank, out_features)
    grid = fit_grid(columns, _EIGHT_BITS, scale_dtype, clip_search=clip_search)
    left = grid.round(columns).t().to(torch.int8).contiguous()
    codes = (right * RIGHT_UNIT).round_().to(torch.int8)
    return CorrectedWeight(fmt, base, LowRankCorrection(left, codes, grid.scales.to(scale_dtype).flatten()))
