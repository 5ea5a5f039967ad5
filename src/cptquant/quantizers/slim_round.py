"""Groups of mixed width by rounding to nearest: what SliM-LLM becomes where no text is read.

Groups are ranked by mean h w^2 (h = 1 where no importance is given) and the number of pairs is the one of least
sum h (Q(w) - w)^2, found from each group's own error at its three widths; half of the groups where the format says so.
"""

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.segments import MEAN_STEPS, SegmentedWeight, group_size
from cptquant.quantizers.slim_allocation import widths_for
from cptquant.quantizers.slim_scale import ScaleSearch, fit_scale


def round_to_segments(
    weight: Tensor,  # (out_features, in_features), any float dtype
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,  # (in_features,) float32
    clip: bool = True,
) -> SegmentedWeight:
    """Round one matrix; `clip` searches for the scale of least squared error instead of covering the largest weight.

    Raises:
        ModelError: as `fit_grid`. ValueError: a row that the groups do not divide.
    """
    reason = fmt.segments_refusal(weight.shape[1])
    if reason is not None:
        raise ValueError(reason)
    values = weight.float()
    counts = torch.ones(weight.shape[1]) if importance is None else importance
    columns, order = values.square().mean(dim=0) * counts, None
    if fmt.sorted_columns:
        order = torch.argsort(columns, descending=True, stable=True)
        values, counts, columns = values[:, order], counts[order], columns[order]
    size, bits = group_size(fmt), fmt.code_bits
    groups = weight.shape[1] // size
    rounded = [_round_groups(values, counts, width, size, scale_dtype, clip) for width in (bits - 1, bits, bits + 1)]
    errors = torch.stack([((found[0] - values).square() * counts).sum(dim=0) for found in rounded])
    per_group = errors.view(3, groups, size).sum(dim=2, dtype=torch.float64)
    ranking = torch.argsort(columns.view(groups, size).mean(dim=1), stable=True).tolist()
    allowed = [groups // 2] if fmt.halves else range(groups // 2 + 1)
    choices = [widths_for(ranking, pairs, bits) for pairs in allowed]
    totals = [
        sum(float(per_group[width - bits + 1, group]) for group, width in enumerate(choice)) for choice in choices
    ]
    widths = torch.tensor(choices[totals.index(min(totals))])
    level = widths - bits + 1
    of_group, of_column = torch.arange(groups), torch.arange(groups * size)
    codes = torch.stack([found[1] for found in rounded])[level.repeat_interleave(size), :, of_column].t()
    scales = torch.stack([found[2] for found in rounded])[level, :, of_group].t()
    means = torch.stack([found[3] for found in rounded])[level, :, of_group].t()
    return SegmentedWeight(
        fmt, widths.to(torch.uint8), codes.to(torch.int8).contiguous(), scales.to(scale_dtype).contiguous(),
        means.to(torch.int8).contiguous() if bits == 2 else None, order,
    )  # fmt: skip


def _round_groups(
    weight: Tensor, importance: Tensor, bits: int, size: int, scale_dtype: torch.dtype, clip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and codes (out, in), scales and means (out, groups), with every group at one width."""
    search = ScaleSearch(start="search" if clip else "minmax", steps=0, diagonal_importance=clip)
    per_row = importance.view(-1, size).repeat(weight.shape[0], 1)
    rows = weight.reshape(-1, size)
    grid = fit_scale(rows, bits, scale_dtype, search, importance=per_row)
    codes = grid.round(rows)
    steps = torch.zeros_like(grid.scales) if grid.zeros is None else ((-grid.zeros - 0.5) * MEAN_STEPS).round()
    shape = (weight.shape[0], -1)
    return grid.value(codes).view(shape), codes.view(shape), grid.scales.view(shape), steps.view(shape)
