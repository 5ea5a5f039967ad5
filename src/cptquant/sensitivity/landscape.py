"""The loss around a model's weights: along the direction in which rounding moves them, and along random ones.

Features of the PTQ law (arXiv 2410.12119 uses loss landscapes along random directions). Nothing is quantized for good:
a moved weight is made when its block is run and dropped after it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress, ignore_progress
from cptquant.laws.ptq_features import Landscape
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource
from cptquant.models.text import TokenSet
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.loss import Objective, Question, pose_question
from cptquant.sensitivity.perturbation import original_weight, perturb

RADII = (0.05, 0.1, 0.3)
"""Noise over weights, root mean square. 0.05 is about 5 bits, 0.1 about 4, 0.3 between 2 and 3."""
_STEPS = (-0.5, 0.5, 1.0)
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Moved:
    """KL(original ‖ moved) and the rise of the text's NLL, both in nats per token."""

    kl_nats: float
    rise_nats: float


class LandscapeProbe:
    """Measures moved models against the original on a fixed text.

    Args:
        model: never changed. tokens: text; all of it is used.

    Attributes:
        nll_nats_per_token: of the original.
    """

    def __init__(self, model: LoadedModel, tokens: TokenSet) -> None:
        self._model = model
        self._question: Question = pose_question(model, tokens)
        self._batch_size = _BATCH_SIZE
        self._original = self._stream(None)
        self._run_together([self._original])
        self._objective = Objective(self._original, self._question)
        losses = self._objective.losses(self._original.hidden, self._original.hidden)
        self._count = float(losses.counts.sum())
        self.nll_nats_per_token = float(losses.sums.sum()) / self._count

    def _stream(self, weights: WeightSource | None) -> ModelStream:
        return ModelStream(self._model, self._question.tokens, weights=weights, batch_size=self._batch_size)

    @staticmethod
    def _run_together(streams: Sequence[ModelStream]) -> None:
        for _ in range(streams[0].layout.block_count):
            for stream in streams:
                stream.advance(stream.load_block())

    def measure(self, sources: Sequence[WeightSource]) -> list[Moved]:
        """Run several moved models block by block together."""
        streams = [self._stream(source) for source in sources]
        self._run_together(streams)
        found: list[Moved] = []
        for stream in streams:
            kl = self._objective.divergences(stream.hidden, self._original.hidden, changed=stream)
            nll = Objective(stream, self._question).losses(stream.hidden, self._original.hidden)
            rise = float(nll.sums.sum()) / self._count - self.nll_nats_per_token
            found.append(Moved(float(kl.sums.sum()) / self._count, rise))
        return found

    def along_rounding(self, formats: Mapping[str, QuantFormat]) -> Landscape:
        """Half a way back, half a way and all the way to the rounded model.

        Args:
            formats: format of every site; sites in 16 bits stay.
        """
        rounding = _Rounding(self._model, formats)
        back, half, full = self.measure([_Step(rounding, step) for step in _STEPS])
        return Landscape(
            half_kl_nats=half.kl_nats,
            full_kl_nats=full.kl_nats,
            minus_half_rise_nats=back.rise_nats,
            half_rise_nats=half.rise_nats,
            full_rise_nats=full.rise_nats,
        )

    def along_random(
        self, radii: Sequence[float] = RADII, *, seeds: Sequence[int] = (0,), progress: Progress = ignore_progress
    ) -> dict[float, Moved]:
        """Mean over the seeds; the blocks' linear weights move, each row by the radius times its norm."""
        found: dict[float, list[Moved]] = {}
        for number, seed in enumerate(seeds):
            moved = self.measure([_Random(self._model, radius, seed) for radius in radii])
            for radius, point in zip(radii, moved, strict=True):
                found.setdefault(radius, []).append(point)
            progress("random directions", number + 1, len(seeds))
        return {
            radius: Moved(_mean([p.kl_nats for p in points]), _mean([p.rise_nats for p in points]))
            for radius, points in found.items()
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass
class _Rounding:
    """Q(W) - W of the sites of one block at a time, shared by the steps that are run together."""

    model: LoadedModel
    formats: Mapping[str, QuantFormat]
    _block_index: int | None = -1
    _changes: dict[str, Tensor] = field(default_factory=dict)

    def change(self, site_name: str) -> Tensor | None:
        """(out_features, in_features) float32; None for a site that stays."""
        fmt, site = self.formats[site_name], self.model.layout.site_by_name[site_name]
        if fmt.is_float:
            return None
        if site.block_index != self._block_index:
            self._changes, self._block_index = {}, site.block_index
        if site_name not in self._changes:
            self._changes[site_name] = perturb(original_weight(self.model, site), fmt, self.model.layout, Rtn())
        return self._changes[site_name]


@dataclass(frozen=True)
class _Step:
    """W + step (Q(W) - W)."""

    rounding: _Rounding
    step: float

    def weight(self, site_name: str) -> Tensor | None:
        """Moved weight of a site."""
        change = self.rounding.change(site_name)
        if change is None:
            return None
        model = self.rounding.model
        return original_weight(model, model.layout.site_by_name[site_name]).float() + self.step * change


@dataclass(frozen=True)
class _Random:
    """W + radius * |row| * unit noise, in the blocks' linear sites."""

    model: LoadedModel
    radius: float
    seed: int

    def weight(self, site_name: str) -> Tensor | None:
        """Moved weight of a site."""
        position = [site.name for site in self.model.layout.sites].index(site_name)
        site = self.model.layout.sites[position]
        if site.block_index is None:
            return None
        weight = original_weight(self.model, site).float()
        generator = torch.Generator().manual_seed(self.seed * 100_003 + position)
        noise = torch.randn(weight.shape, generator=generator)
        return weight + self.radius * weight.square().mean(dim=1, keepdim=True).sqrt() * noise
