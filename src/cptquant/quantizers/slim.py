"""SliM-LLM (arXiv 2405.14917): groups of input columns of one matrix get N-1, N or N+1 bits, inside GPTQ.

    1. H of the layer's inputs, damped; salience w^2 / U_jj^2 (salience.py)
    2. SBA: which group gets which width, by the KL of the layer's own softmaxed output (slim_allocation.py)
    3. GPTQ from group to group; on entering one, SQC finds its scale on the compensated weights (slim_scale.py)

As in the authors' code, inputs come from blocks that are quantized already and the reference of the KL is the layer's
own original weight on those inputs.

What we changed: grids are symmetric with a scale of either sign instead of having zero points (a scale is all that is
stored, 16 bits a group and row; one-bit groups put their mean into those 16 bits too); damping is relative; coordinate
descent follows GPTQ (descent.py; 0 rounds is the paper). Defaults rest on few runs so far
(docs/segments.md); `PUBLISHED` is the paper's.

p by the KL of plain rounding is wrong where GPTQ and descent follow: they make up for most of the error of two bits,
but not of one. So by default p is what leaves the least output error tr(E H E') of the finished matrix: p = 0, 1, ...
are carried out until the error rises (objective "finished"). Never worse than uniform bits by that measure.

Ours besides: `-halves` formats have p = groups / 2, the same groups in all matrices that read one input, and `-sorted`
formats put columns into groups by salience before anything else, most salient first, so that groups differ as much as
columns do. That costs 16 bits a column (packing/segments.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.segments import SegmentedWeight, group_size
from cptquant.quantizers.descent import Rounded, descend_
from cptquant.quantizers.gptq import (
    Gptq,
    GptqResult,
    Piece,
    join_pieces,
    output_power,
    relative_output_error,
    row_stacks,
)
from cptquant.quantizers.grid import ROWS_ENTRIES
from cptquant.quantizers.hessian_factor import HessianFactor, factor_hessian
from cptquant.quantizers.salience import group_salience
from cptquant.quantizers.slim_allocation import Objective, Ranking, allocate_bits, widths_for
from cptquant.quantizers.slim_loop import SegmentLoop, assemble
from cptquant.quantizers.slim_scale import PUBLISHED_SCALE_SEARCH, ScaleSearch


@dataclass(frozen=True)
class Slim:
    """Hyper-parameters of SliM-LLM.

    Attributes:
        ranking: by what groups are ranked; "magnitude" (mean w^2) and "random" are the paper's ablations.
        objective: what p minimises: "finished", the output error after GPTQ and descent; "kl" of the output after plain
            rounding (the paper), or its mean squared error "mse", the paper's ablation.
        fixed_pairs: take this p instead of searching; 0 is uniform bits in this storage.
        search_clip: "kl" and "mse": round with clipped scales in the search for p; False is the paper.
        scale: the search for scales. descent_rounds: coordinate descent afterwards; 0 is the paper.
        damping: fraction of the mean diagonal added to the Hessian.
        gptq: what `quantize_sites` does on sites whose format has one width.
        seed: of the random ranking.
    """

    ranking: Ranking = "salience"
    objective: Objective | Literal["finished"] = "finished"
    fixed_pairs: int | None = None
    search_clip: bool = True
    scale: ScaleSearch = field(default_factory=ScaleSearch)
    descent_rounds: int = 4
    damping: float = 0.01
    gptq: Gptq = field(default_factory=Gptq)
    seed: int = 0

    @classmethod
    def like(cls, gptq: Gptq) -> "Slim":
        """The defaults with GPTQ's damping and rounds of descent."""
        return cls(damping=gptq.damping, descent_rounds=gptq.descent_rounds, gptq=gptq)

    def __call__(
        self,
        weight: Tensor,  # (out_features, in_features), any float dtype
        hessian: Tensor,  # (in_features, in_features) float32: mean of x x'
        fmt: QuantFormat,
        scale_dtype: torch.dtype,
        *,
        inputs: Sequence[Tensor] = (),  # per sequence (tokens, in_features) float32, for p by "kl" and "mse"
        bias: Tensor | None = None,  # (out_features,)
    ) -> GptqResult:
        """Quantize one matrix.

        Raises:
            DataError: the Hessian is NaN or infinite. ModelError: a weight is, or needs a scale beyond the range.
            ValueError: a format that is not of storage "segments", or a row that its groups do not divide.
        """
        reason = fmt.segments_refusal(weight.shape[1])
        if fmt.storage != "segments" or reason is not None:
            raise ValueError(reason or f"{fmt.name} has one width: use Gptq")
        if fmt.halves:
            return self.quantize_together([weight], hessian, fmt, scale_dtype)[0]
        order, factor = self._factor(weight, hessian, fmt)
        ordered, moved = weight.float(), inputs
        if order is not None:
            ordered, moved = ordered[:, order], [tokens[:, order] for tokens in inputs]
        columns = ordered.t().contiguous()
        moments = hessian if order is None else hessian[order][:, order]
        ranking = self._rank(ordered, factor, fmt)
        if self.objective == "finished" and self.fixed_pairs is None:
            candidates = range(len(ranking) // 2 + 1)
        else:
            candidates = [self._pairs(ordered, factor, fmt, ranking, moved, bias)]
        best: tuple[float | None, SegmentedWeight] | None = None
        for pairs in candidates:
            widths = widths_for(ranking, pairs, fmt.code_bits)
            rounded = self._carry_out(columns, factor, fmt, widths, scale_dtype)
            error = relative_output_error(rounded.values().sub_(columns), columns, moments)
            if best is not None and (error is None or best[0] is None or error >= best[0]):
                break
            best = (error, assemble(rounded, fmt, widths, scale_dtype, order))
        assert best is not None
        return GptqResult(best[1], factor.outcome, factor.damping, best[0])

    def quantize_together(
        self,
        weights: Sequence[Tensor],  # (out_features, in_features) each, any float dtype
        hessian: Tensor,  # (in_features, in_features) float32
        fmt: QuantFormat,  # with halves
        scale_dtype: torch.dtype,
    ) -> list[GptqResult]:
        """Matrices that read the same input, with one choice of columns, so that an engine takes each half once.

        Rows go through the loop in pieces, as in `Gptq.quantize_together`, so that memory stays bounded.

        Raises:
            As a call.
        """
        profile = _mean_squares(weights).sqrt()[None]  # salience is a mean of squares over rows: one row stands for all
        order, factor = self._factor(profile, hessian, fmt)
        columns = slice(None) if order is None else order
        moments = hessian[columns][:, columns]
        ranking = self._rank(profile[:, columns], factor, fmt)
        widths = widths_for(ranking, len(ranking) // 2, fmt.code_bits)
        pieces: list[list[Piece]] = [[] for _ in weights]
        for stack in row_stacks(weights, fmt):
            lines = torch.cat([weights[index][rows].float()[:, columns] for index, rows in stack]).t().contiguous()
            rounded = self._carry_out(lines, factor, fmt, widths, scale_dtype)
            error = rounded.values().sub_(lines)
            stored = assemble(rounded, fmt, widths, scale_dtype, order)
            start = 0
            for index, rows in stack:
                own = slice(start, start + rows.stop - rows.start)
                start = own.stop
                powers = (output_power(part[:, own], moments) for part in (error, lines))
                pieces[index].append(Piece(stored.rows(own), *powers))
        return [join_pieces(parts, factor) for parts in pieces]

    def _carry_out(
        self, columns: Tensor, factor: HessianFactor, fmt: QuantFormat, widths: Sequence[int], dtype: torch.dtype
    ) -> Rounded:
        """GPTQ and descent on columns (in_features, out_features) in the order of the factor."""
        rounded = SegmentLoop(columns, factor, fmt, widths, dtype, self.scale).run()
        if self.descent_rounds:
            descend_(rounded, columns, factor.damped, self.descent_rounds)
        return rounded

    def _pairs(
        self,
        weight: Tensor,  # (out_features, in_features) float32, columns in the order of the factor
        factor: HessianFactor,
        fmt: QuantFormat,
        ranking: Sequence[int],
        inputs: Sequence[Tensor],  # per sequence (tokens, in_features) float32
        bias: Tensor | None,
    ) -> int:
        """p, fixed or by SBA."""
        if self.fixed_pairs is not None or self.objective == "finished":
            return min(self.fixed_pairs or 0, len(ranking) // 2)
        return allocate_bits(
            weight, bias, inputs, ranking, fmt,
            objective=self.objective, importance=factor.importance if self.search_clip else None,
        ).pairs  # fmt: skip

    def _rank(self, weight: Tensor, factor: HessianFactor, fmt: QuantFormat) -> list[int]:
        """Group numbers, least salient first."""
        size = group_size(fmt)
        if self.ranking == "random":
            groups = weight.shape[1] // size
            return torch.randperm(groups, generator=torch.Generator().manual_seed(self.seed)).tolist()
        pivots = factor.pivots if self.ranking == "salience" else torch.ones_like(factor.pivots)
        return torch.argsort(group_salience(weight, pivots, size), stable=True).tolist()

    def _factor(self, weight: Tensor, hessian: Tensor, fmt: QuantFormat) -> tuple[Tensor | None, HessianFactor]:
        """The order of the columns (None: as they are) and the Hessian's factor in it."""
        factor = factor_hessian(hessian, self.damping, by_activation=False)
        if not fmt.sorted_columns:
            return None, factor
        order = torch.argsort(column_salience(weight.float(), factor), descending=True, stable=True)
        return order, factor_hessian(hessian[order][:, order], self.damping, by_activation=False)


PUBLISHED = Slim(objective="kl", search_clip=False, scale=PUBLISHED_SCALE_SEARCH, descent_rounds=0)
"""The paper's choices, where they are choices: plain rounding in the search for p, its scale search, no descent."""


def column_salience(
    weight: Tensor,  # (out_features, in_features) float32
    factor: HessianFactor,
) -> Tensor:
    """mean over rows of w^2 / [H^-1]_jj, float32 (in_features,): what does not depend on the order of the columns."""
    upper = factor.feedback + torch.eye(len(factor.pivots))
    inverse_diagonal = (upper.square() / factor.pivots[:, None]).sum(dim=0)
    return weight.square().mean(dim=0) / inverse_diagonal


def _mean_squares(weights: Sequence[Tensor]) -> Tensor:
    """Mean of w^2 over all rows, float32 (in_features,), a bounded number of rows at a time."""
    step = max(1, ROWS_ENTRIES // weights[0].shape[1])
    parts = [part.float().square().sum(dim=0) for weight in weights for part in weight.split(step)]
    return torch.stack(parts).sum(dim=0) / sum(len(weight) for weight in weights)
