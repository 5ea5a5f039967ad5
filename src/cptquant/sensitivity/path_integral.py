"""Path integrals: the divergence that a width does to the whole model, shared out among its sites exactly.

Move every site of the blocks together from W to Q(W), W(t) = W + t D with D = Q(W) - W, and let F(t) be the divergence
of the moved model from the original, KL(original ‖ W(t)) per token. The score of site l is its share of the way,

    s_l = integral over t in [0, 1] of < dF/dW_l at W(t), D_l > dt

Completeness: the shares add up to F(1) - F(0) = KL(original ‖ all sites quantized), by the chain rule and nothing else,
so up to the quadrature's error no order of a Taylor series is left out and all interactions are counted, each pair's
half with either site (the Aumann-Shapley value; as integrated gradients, arXiv 1703.01365, proposition 1). At the
original F's gradient is 0, which is why a first-order Taylor term there says nothing. Sources: PQI, arXiv 2503.01901,
equation 8, with the loss of the text; we take the divergence from the original, whose sum cannot be negative.

A share can be negative where errors cancel; the table then says 0 (its `metadata` keeps the sums before that).

Which path: one for each width ("together"), since errors of different widths are all but uncorrelated, and the gradient
on the way of one says nothing first-order about another's. That is `points` forward and backward passes a width, with
all sites at once. "curvature" walks one path only, that of `reference_bits`, and reads every format off its curvature,

    s_lf = integral of (1 - t) D_lf' H(t) D_lf dt,   H(t) = E[g g'] at W(t), products inside a row as in TDMPQ

the exact remainder of a Taylor series where f is the path's own format and l moves alone; `points` passes for all
formats, no completeness. The quadrature is Gauss-Legendre: with F quadratic one point is exact, with F of the fourth
order two are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress
from cptquant.models.arithmetic import coarse_products, describe_arithmetic
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import AblationSweep
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.expansion import backward, products
from cptquant.sensitivity.loss import Objective, Question, pick_for_task, pick_sequences, pose_question
from cptquant.sensitivity.perturbation import (
    BLOCK_SCORE_BITS,
    changed_weights,
    integer_formats,
    load_block_at,
    nearest_format,
    original_weight,
    perturb,
    run_to_end,
)
from cptquant.sensitivity.scores import Scores, SiteFormats

_HIDDEN_BYTES = 256 << 20
"""Block inputs kept for the way back; sequences that need more are gone through in groups."""


@dataclass(frozen=True)
class PathIntegral:
    """Hyper-parameters.

    Attributes:
        variant: "together": one path for each width, all sites move; "curvature": one path for all formats.
        points: of the quadrature, K.
        reference_bits: the width of the path of "curvature": each site's format nearest to it.
        sequences, examples: how much calibration text is used: windows for a language model, texts for a classifier or
            a bare encoder, which answer each text only once.
        outside_sequences: sequences for sites outside the blocks, whose divergence is measured one by one.
        seed: of the random signs of "curvature".
        coarse_products: passes may round the factors of their matrix products to bfloat16. Off: the gradient is a small
            difference of two predictions, which that rounding drowns at 8 bits.
    """

    name: ClassVar[str] = "path"

    variant: Literal["together", "curvature"] = "together"
    points: int = 2
    reference_bits: int = 3
    sequences: int = 8
    examples: int = 64
    outside_sequences: int = 16
    seed: int = 0
    coarse_products: bool = False

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """Shares of the divergence per site and format; per block, the sum over its sites near 4 bits."""
        layout, chosen = model.layout, integer_formats(formats, model.layout)
        inside = {name: row for name, row in chosen.items() if layout.site_by_name[name].block_index is not None}
        outside = {name: row for name, row in chosen.items() if name not in inside}
        walk = _Walk(self, model, pose_question(model, pick_for_task(model, tokens, self.sequences, self.examples)))
        sums = walk.run(inside, progress)
        damages = {
            name: {fmt: walk.estimate(values).floored() for fmt, values in row.items()} for name, row in sums.items()
        }
        blocks = [torch.zeros(walk.sequence_count, dtype=torch.float64) for _ in range(layout.block_count)]
        for name, row in sums.items():
            blocks[layout.site_by_name[name].block_index or 0] += row[nearest_format(inside[name]).name]
        if outside:
            sweep = AblationSweep(model, pick_sequences(tokens, self.outside_sequences), outside, progress)
            damages |= sweep.measure_outside()
        return Scores(
            unit=walk.unit,
            damages=damages,
            block_scores=[walk.estimate(values).floored() for values in blocks],
            metadata={
                "variant": self.variant,
                "points": self.points,
                "quadrature": "Gauss-Legendre",
                "quantizer": "round to nearest",
                "arithmetic": describe_arithmetic(self.coarse_products),
                "stderr": "over sequences, clustered by document",
                "block_score": f"sum over the block's sites at the format nearest to {BLOCK_SCORE_BITS} bits",
                "sites_outside_blocks": f"measured: divergence with the site quantized, {self.outside_sequences} "
                "sequences at most",
                **walk.path_sums,
            },
        )


@dataclass(frozen=True)
class Path:
    """One way of all sites.

    Attributes:
        label: of its width. moved: the format that every site moves to. scored: sites whose share is read here; the
            others have no such format and only keep them company.
    """

    label: str
    moved: Mapping[str, QuantFormat]
    scored: frozenset[str]


def list_paths(formats: Mapping[str, Sequence[QuantFormat]]) -> list[Path]:
    """One path for each width, and for each place among formats of one width (groups of 64, of 128, ...).

    A site that has no format of the width moves to the nearest it has, so that it does not stand still while all
    others move. Every format of every site is scored on exactly one path.
    """
    rows = {name: _by_width(row) for name, row in formats.items()}
    widths = sorted({bits for row in rows.values() for bits in row})
    paths: list[Path] = []
    for bits in widths:
        for place in range(max(len(row.get(bits, ())) for row in rows.values())):
            moved = {
                name: row[bits][min(place, len(row[bits]) - 1)] if bits in row else nearest_format(formats[name], bits)
                for name, row in rows.items()
            }
            scored = frozenset(name for name, row in rows.items() if place < len(row.get(bits, ())))
            paths.append(Path(f"{bits} bits" + (f", {place + 1}" if place else ""), moved, scored))
    return paths


def _by_width(row: Sequence[QuantFormat]) -> dict[int, list[QuantFormat]]:
    found: dict[int, list[QuantFormat]] = {}
    for fmt in row:
        found.setdefault(fmt.code_bits, []).append(fmt)
    return found


def gauss_legendre(points: int) -> list[tuple[float, float]]:
    """(t, weight) on [0, 1], exact for polynomials up to degree 2 points - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return [((1 + float(node)) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]


class _Walk:
    """Forward and backward passes along paths, a sequence at a time: a share is wanted for each."""

    def __init__(self, method: PathIntegral, model: LoadedModel, question: Question) -> None:
        self._method, self._model, self._layout, self._question = method, model, model.layout, question
        self._points = gauss_legendre(method.points)
        self._stream = ModelStream(model, question.tokens, batch_size=1)
        self._objective = Objective(self._stream, question)
        self._generator = torch.Generator().manual_seed(method.seed)
        ends = [list(self._stream.hidden)]
        with coarse_products(method.coarse_products):
            run_to_end(self._stream, 0, ends)
        self._reference = ends[0]
        totals = self._objective.divergences(self._reference, self._reference)
        self._counts = totals.counts
        self.unit = self._objective.unit
        self.path_sums: dict[str, float] = {}

    @property
    def sequence_count(self) -> int:
        """Of the text that is used."""
        return self._question.tokens.sequence_count

    def estimate(self, sums: Tensor) -> Estimate:
        """Mean per scored token of sums per sequence."""
        return estimate_ratio(sums, self._counts, self._question.tokens.documents)

    def run(self, formats: Mapping[str, Sequence[QuantFormat]], progress: Progress) -> dict[str, dict[str, Tensor]]:
        """Site name -> format name -> shares summed per sequence, (n,) float64."""
        if not formats:
            return {}
        if self._method.variant == "curvature":
            curvature = _Curvature(self._model, formats, self.sequence_count)
            moved = {name: nearest_format(row, self._method.reference_bits) for name, row in formats.items()}
            self._go_along(moved, curvature)
            progress("paths", 1, 1)
            return curvature.sums
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in formats}
        paths = list_paths(formats)
        for number, path in enumerate(paths):
            shares = _Shares(path.moved, self.sequence_count)
            self._go_along(path.moved, shares)
            for name in path.scored:
                sums[name][path.moved[name].name] = shares.sums[name]
            whole = torch.stack(list(shares.sums.values())).sum(dim=0)
            self.path_sums[f"sum of the shares at {path.label}"] = self.estimate(whole).value
            progress("paths", number + 1, len(paths))
        return sums

    def _go_along(self, moved: Mapping[str, QuantFormat], take: "_Take") -> None:
        """Go along one path; hand every gradient on it to `take`."""
        needed = (
            4 * len(self._points) * self._layout.block_count * self._layout.hidden_size
        ) * self._question.tokens.input_ids.shape[1]
        for group in torch.arange(self.sequence_count).split(max(1, _HIDDEN_BYTES // needed)):
            sequences: list[int] = group.tolist()
            with coarse_products(self._method.coarse_products):
                kept, states = self._go_forward(moved, sequences)
                gradients = [
                    [self._gradient(number, hidden) for number, hidden in zip(sequences, row, strict=True)]
                    for row in states
                ]
                for index in reversed(range(self._layout.block_count)):
                    self._go_back(self._block(index, moved), sequences, kept.pop(), gradients, take)

    def _go_forward(
        self, moved: Mapping[str, QuantFormat], sequences: list[int]
    ) -> tuple[list[list[list[Tensor]]], list[list[Tensor]]]:
        """Inputs of every block, and the last one's outputs; per point and sequence (1, T, d)."""
        states = [[self._stream.hidden[number] for number in sequences] for _ in self._points]
        kept: list[list[list[Tensor]]] = []
        for index in range(self._layout.block_count):
            kept.append([list(row) for row in states])
            block = self._block(index, moved)
            for row, (step, _) in zip(states, self._points, strict=True):
                with block.moved(step), torch.no_grad():
                    row[:] = [block.run(number, hidden) for number, hidden in zip(sequences, row, strict=True)]
        return kept, states

    def _gradient(self, number: int, hidden: Tensor) -> Tensor:
        if self._method.variant == "curvature":
            return self._objective.gradient(number, hidden, "true", self._generator)[0]
        return self._objective.divergence_gradient(number, hidden, self._reference[number])[0]

    def _go_back(
        self,
        block: "_Block",
        sequences: list[int],
        inputs: list[list[Tensor]],  # per point and sequence (1, T, d)
        gradients: list[list[Tensor]],  # at the block's output; replaced by those at its input
        take: "_Take",
    ) -> None:
        for (step, weight), states, row in zip(self._points, inputs, gradients, strict=True):
            with block.moved(step):
                for place, number in enumerate(sequences):
                    found, row[place] = block.backward(number, states[place], row[place])
                    for name, gradient in found.items():
                        take(name, gradient, block.changes[name], _Spot(number, step, weight))

    def _block(self, index: int, moved: Mapping[str, QuantFormat]) -> "_Block":
        return _Block(self._model, self._stream, index, moved)


class _Block:
    """A private copy of one block whose sites move; `changes` holds Q(W) - W, (out_features, in_features) float32."""

    def __init__(self, model: LoadedModel, stream: ModelStream, index: int, moved: Mapping[str, QuantFormat]) -> None:
        self._stream, self._index, self._layout = stream, index, model.layout
        self._block = load_block_at(stream, index)
        modules = site_modules(self._block, model.layout, index)
        self._modules: dict[str, nn.Module] = {name: module for name, module in modules.items() if name in moved}
        self._sites = {name: model.layout.site_by_name[name] for name in self._modules}
        self._weights = {name: original_weight(model, site).float() for name, site in self._sites.items()}
        self.changes = {
            name: perturb(weight, moved[name], model.layout, Rtn()) for name, weight in self._weights.items()
        }

    def moved(self, step: float) -> AbstractContextManager[None]:
        """The block with its weights at W + step (Q(W) - W)."""
        weights = {name: weight + step * self.changes[name] for name, weight in self._weights.items()}
        return changed_weights(self._modules, self._layout, weights)

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """The block's output for one sequence, (1, T, d)."""
        return self._stream.run_block_at(self._block, self._index, number, hidden)

    def backward(self, number: int, hidden: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients at the sites' weights and at the block's input; see `expansion.backward`."""
        return backward(lambda states: self.run(number, states), self._modules, self._sites, hidden, gradient)


@dataclass(frozen=True)
class _Spot:
    """One sequence at one point of the quadrature."""

    number: int
    step: float
    weight: float


_Take = Callable[[str, Tensor, Tensor, _Spot], None]
"""Takes a site's name, its gradient and its change on the path, (out_features, in_features), and where that was."""


class _Shares:
    """First order, along the path itself. `sums`: site name -> (n,) float64, per sequence."""

    def __init__(self, names: Iterable[str], count: int) -> None:
        self.sums = {name: torch.zeros(count, dtype=torch.float64) for name in names}

    def __call__(self, name: str, gradient: Tensor, change: Tensor, spot: _Spot) -> None:
        self.sums[name][spot.number] += spot.weight * float((gradient * change).sum(dtype=torch.float64))


class _Curvature:
    """Second order, of every format, along one path. `sums`: site name -> format name -> (n,) float64."""

    def __init__(self, model: LoadedModel, formats: Mapping[str, Sequence[QuantFormat]], count: int) -> None:
        self._model, self._formats = model, formats
        self._known: dict[str, Tensor] = {}
        self.sums = {
            name: {fmt.name: torch.zeros(count, dtype=torch.float64) for fmt in row} for name, row in formats.items()
        }

    def __call__(self, name: str, gradient: Tensor, change: Tensor, spot: _Spot) -> None:
        _, quadratic = products(gradient, self._changes(name), "rows")
        for values, found in zip(self.sums[name].values(), quadratic, strict=True):
            values[spot.number] += spot.weight * (1 - spot.step) * found

    def _changes(self, name: str) -> Tensor:
        """(formats, out_features, in_features) float32; those of one block are kept."""
        site = self._model.layout.site_by_name[name]
        if name not in self._known:
            for other in list(self._known):
                if self._model.layout.site_by_name[other].block_index != site.block_index:
                    del self._known[other]
            weight = original_weight(self._model, site)
            rows = [perturb(weight, fmt, self._model.layout, Rtn()) for fmt in self._formats[name]]
            self._known[name] = torch.stack(rows)
        return self._known[name]
