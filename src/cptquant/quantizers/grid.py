"""Choosing the grid of a group of weights: its scale and, where asymmetric, its zero point.

A grid is fitted before rounding and is then stored in 16 bits, so the scale is rounded to the storage dtype first and
every error below is counted with the scale that will really be on disk.

The search minimises ||Q(w) - w||^2 per group, or sum_j h_j (Q(w)_j - w_j)^2 with an importance h (the Hessian's
diagonal): the group error that remains when interactions between columns are left out. It tries a list of shrunken
min-max scales and then alternates: with the codes fixed the best scale is a least-squares quotient, with the scale
fixed the best codes are the nearest ones. Neither step can increase the error, apart from the rounding of the scale,
and the best scale seen is what counts.

Symmetric codes reach from -2^(b-1) to 2^(b-1)-1, one level further down than up. A negative scale turns the grid over,
which is free at run time (value = code * scale), so both signs are tried: of the four levels of 2 bits, the lone far
one then goes to the side that needs it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import QuantizedWeight, StoredWeight, join_rows, scale_shape

_CHUNK_ENTRIES = 1 << 18
"""Weights searched at a time: three float32 buffers of this size stay inside the processor's cache."""

ROWS_ENTRIES = 1 << 23
"""Weights held in float32 at a time; rows do not depend on each other, so a tall matrix is taken in pieces."""

_SHRINK_FACTORS = {2: (1.0, 0.3, 15), 3: (1.0, 0.45, 12), 4: (1.0, 0.6, 10)}
"""Code bits -> first, last and number of factors tried on the min-max scale; above 4 bits clipping gains little."""
_SHRINK_FACTORS_WIDE = (1.0, 0.8, 6)
_ALTERNATIONS = 2


@dataclass(frozen=True)
class Grid:
    """Scales and zero points as they will be stored, and the range of the codes.

    Attributes:
        scales: float32 (n,), each representable in the storage dtype and never zero.
        zeros: float32 (n,) of integers, or None. low, high: smallest and largest code.
    """

    scales: Tensor
    zeros: Tensor | None
    low: int
    high: int

    def round(
        self,
        rows: Tensor,  # (n, g) float32, or anything whose leading dimension is that of the scales
    ) -> Tensor:
        """Nearest codes, float32 of integers, shape of `rows`."""
        shape = (-1,) + (1,) * (rows.ndim - 1)
        codes = rows / self.scales.view(shape)
        if self.zeros is not None:
            codes += self.zeros.view(shape)
        return codes.round_().clamp_(self.low, self.high)

    def value(
        self,
        codes: Tensor,  # as `round` returns them
    ) -> Tensor:
        """What the codes stand for, float32, same shape."""
        shape = (-1,) + (1,) * (codes.ndim - 1)
        shifted = codes if self.zeros is None else codes - self.zeros.view(shape)
        return shifted * self.scales.view(shape)


def fit_grid(
    rows: Tensor,  # (n, g) float32: weights that share a scale in each row
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,  # (g,) or (n, g) float32, at least 0
    clip_search: bool = True,
) -> Grid:
    """One scale (and zero point) a row.

    A row of zeros gets scale 1 (a scale of 0 would divide by zero in engines that quantize again). A scale below the
    storage dtype's smallest positive number is raised to it.

    Args:
        rows: weights. fmt: code bits and symmetry are used, the granularity is the shape of `rows`.
        scale_dtype: float16 or bfloat16.
        importance: weight of each squared error; None counts all alike.
        clip_search: False takes the min-max scale: no weight is clipped.

    Raises:
        ModelError: a weight is NaN or infinite, or needs a scale beyond the storage dtype's range.
    """
    if not bool(torch.isfinite(rows).all()):
        raise ModelError("a weight to quantize is NaN or infinite; repair the model (inspect names the tensor)")
    step = max(1, _CHUNK_ENTRIES // max(1, rows.shape[1]))
    scales, zeros = [], []
    for start in range(0, rows.shape[0], step):
        weights = importance
        if importance is not None and importance.ndim == 2:
            weights = importance[start : start + step]
        scale, zero = _fit_rows(rows[start : start + step], fmt, scale_dtype, weights, clip_search)
        scales.append(scale)
        zeros.append(zero)
    low, high = code_range(fmt)
    return Grid(torch.cat(scales), None if fmt.symmetric else torch.cat(zeros), low, high)


def code_range(fmt: QuantFormat) -> tuple[int, int]:
    """Smallest and largest code: (-2^(b-1), 2^(b-1) - 1)."""
    half = 1 << (fmt.code_bits - 1)
    return -half, half - 1


def _fit_rows(
    rows: Tensor,  # (n, g)
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    importance: Tensor | None,
    clip_search: bool,
) -> tuple[Tensor, Tensor]:
    starts = _minmax_scales(rows, fmt)
    search = _Search(rows, fmt, scale_dtype, importance)
    if not clip_search:
        for scale, zero in starts:
            search.consider(scale, zero)
            if fmt.symmetric:
                break  # the first is the sign with the smaller scale
        return search.scale, search.zero
    first, last, count = _SHRINK_FACTORS.get(fmt.code_bits, _SHRINK_FACTORS_WIDE)
    for scale, zero in starts:
        for factor in torch.linspace(first, last, count).tolist():
            shrunk_zero = zero if fmt.symmetric else _zero_point(rows, factor, scale * factor, fmt)
            search.consider(scale * factor, shrunk_zero)
    for _ in range(_ALTERNATIONS):
        search.refit()
    return search.scale, search.zero


def _minmax_scales(rows: Tensor, fmt: QuantFormat) -> list[tuple[Tensor, Tensor]]:
    """Scales (n,) that clip nothing, the tightest first, each with its zero point (n,)."""
    low, high = code_range(fmt)
    largest = rows.amax(dim=1).clamp_(min=0)
    smallest = rows.amin(dim=1).clamp_(max=0)
    if not fmt.symmetric:
        scale = (largest - smallest) / (high - low)
        return [(scale, _zero_point(rows, 1.0, scale, fmt))]
    upright = torch.maximum(largest / high, smallest / low)
    turned = torch.maximum(largest / -low, smallest / -high)
    none = torch.zeros_like(upright)
    tighter = torch.where(turned < upright, -turned, upright)
    other = torch.where(turned < upright, upright, -turned)
    return [(tighter, none), (other, none)]


def _zero_point(rows: Tensor, factor: float, scale: Tensor, fmt: QuantFormat) -> Tensor:
    low, high = code_range(fmt)
    smallest = rows.amin(dim=1).clamp_(max=0) * factor
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (low - smallest / safe).round_().clamp_(low, high)


class _Search:
    """The best scale and zero point seen so far, per row."""

    def __init__(self, rows: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, importance: Tensor | None) -> None:
        self._rows, self._importance, self._scale_dtype = rows, importance, scale_dtype
        self._symmetric = fmt.symmetric
        self._low, self._high = code_range(fmt)
        self._buffer = torch.empty_like(rows)
        self.scale = rows.new_ones(rows.shape[0])
        self.zero = rows.new_zeros(rows.shape[0])
        self._error = rows.new_full((rows.shape[0],), torch.inf)

    def consider(
        self,
        scale: Tensor,  # (n,)
        zero: Tensor,  # (n,)
    ) -> None:
        """Keep (scale, zero) in the rows where it is better than what was seen."""
        scale = round_scale(scale, self._scale_dtype)
        codes = self._shifted_codes(scale, zero)
        error = codes.mul_(scale[:, None]).sub_(self._rows).square_()
        total = self._weighted_sum(error)
        better = total < self._error
        self._error = torch.where(better, total, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Least-squares scale for the codes of the best grid: <w, q>_h / <q, q>_h."""
        codes = self._shifted_codes(self.scale, self.zero)
        product = self._weighted_sum(codes * self._rows)
        norm = self._weighted_sum(codes.square_())
        fitted = product / norm
        self.consider(torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, self.scale), self.zero)

    def _shifted_codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Code minus zero of the nearest codes, in the shared buffer."""
        codes = torch.div(self._rows, scale[:, None], out=self._buffer)
        if self._symmetric:
            return codes.round_().clamp_(self._low, self._high)
        return codes.add_(zero[:, None]).round_().clamp_(self._low, self._high).sub_(zero[:, None])

    def _weighted_sum(self, values: Tensor) -> Tensor:
        if self._importance is None:
            return values.sum(dim=1)
        if self._importance.ndim == 1:
            return values @ self._importance
        return values.mul_(self._importance).sum(dim=1)


def round_scale(
    scale: Tensor,  # (n,) float32
    scale_dtype: torch.dtype,
) -> Tensor:
    """The scale as stored, in float32: rounded to 16 bits, 0 replaced by 1, tiny ones raised to the smallest number.

    Raises:
        ModelError: beyond the dtype's range.
    """
    info = torch.finfo(scale_dtype)
    stored = scale.to(scale_dtype).float()
    if bool(torch.isinf(stored).any()):
        raise ModelError(
            f"a group of weights needs a scale of {scale.abs().max():.3g}, beyond the {info.max:.3g} of "
            f"{str(scale_dtype).removeprefix('torch.')}; convert the model to bfloat16 first"
        )
    smallest = info.smallest_normal * info.eps  # the smallest subnormal
    stored = torch.where((stored == 0) & (scale != 0), torch.copysign(torch.full_like(scale, smallest), scale), stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)


def round_to_grid(
    weight: Tensor,  # (out_features, in_features), any float dtype
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,  # (in_features,) float32
    clip_search: bool = True,
) -> StoredWeight:
    """Fit every group of a matrix and round to nearest; the last group of a row may be shorter.

    Large matrices are cast to float32 a few rows at a time.

    Args, Raises: as `fit_grid`, on whole matrices.
    """
    rows, columns = weight.shape
    if fmt.granularity == "tensor":
        flat, all_importance = weight.float().reshape(1, -1), None
        if importance is not None:
            all_importance = importance.repeat(rows)
        grid = fit_grid(flat, fmt, scale_dtype, importance=all_importance, clip_search=clip_search)
        return _assemble(fmt, scale_dtype, grid.round(flat).reshape(rows, columns), grid.scales, grid.zeros)
    step = max(1, ROWS_ENTRIES // columns)
    parts = [
        _round_rows(weight[start : start + step].float(), fmt, scale_dtype, importance, clip_search)
        for start in range(0, rows, step)
    ]
    return join_rows(parts)


def _round_rows(
    weight: Tensor,  # (rows, columns) float32
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    importance: Tensor | None,
    clip_search: bool,
) -> QuantizedWeight:
    rows, columns = weight.shape
    width = fmt.granularity if isinstance(fmt.granularity, int) else columns
    whole = columns // width
    codes, scales, zeros = torch.empty_like(weight), [], []
    for first, count, size in ((0, whole, width), (whole * width, 1, columns - whole * width)):
        if count == 0 or size == 0:
            continue
        part = weight[:, first : first + count * size].reshape(rows * count, size)
        weights = None
        if importance is not None:
            weights = importance[first : first + count * size].reshape(count, size).repeat(rows, 1)
        grid = fit_grid(part, fmt, scale_dtype, importance=weights, clip_search=clip_search)
        codes[:, first : first + count * size] = grid.round(part).reshape(rows, count * size)
        scales.append(grid.scales.reshape(rows, count))
        if grid.zeros is not None:
            zeros.append(grid.zeros.reshape(rows, count))
    return _assemble(fmt, scale_dtype, codes, torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None)


def _assemble(
    fmt: QuantFormat, scale_dtype: torch.dtype, codes: Tensor, scales: Tensor, zeros: Tensor | None
) -> QuantizedWeight:
    shape = scale_shape(fmt, *codes.shape)
    return QuantizedWeight(
        fmt,
        codes.to(torch.int8),
        scales.to(scale_dtype).reshape(shape),
        None if zeros is None else zeros.to(torch.int8).reshape(shape),
    )
