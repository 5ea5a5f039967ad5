"""CMPQ: a block that moves unlike the others is hard to replace.

Source: CPTQuant, arXiv 2412.03599. For block l with pooled outputs Z^l,

    S(l) = 1 - mean over m != l of rho(Z^l, Z^m)

with rho a canonical correlation. What we changed, because the published code cannot tell blocks apart (with fewer
samples than dimensions the first canonical correlation of any two blocks is nearly 1): block *outputs* instead of
inputs; padding left out; principal directions before the correlation, at most one for every five samples; a ridge; the
mean of the correlations by default; a jackknife standard error. Units: none, 0 (moves with the rest) to 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet
from cptquant.sensitivity.canonical import Weighting, mean_correlation, reduce_view
from cptquant.sensitivity.estimates import Estimate, jackknife_stderr
from cptquant.sensitivity.loss import pick_sequences
from cptquant.sensitivity.perturbation import integer_formats
from cptquant.sensitivity.relative_error import RULE_TEXT, ErrorRule, relative_errors
from cptquant.sensitivity.scores import SCORE_RULE, Scores, SiteFormats, spread_over_sites


@dataclass(frozen=True)
class Cmpq:
    """Hyper-parameters of CMPQ.

    Attributes:
        weighting: how the canonical correlations of two blocks become one number; see `canonical.mean_correlation`.
        pool_tokens: hidden states are averaged over this many consecutive tokens (the paper: over the whole sequence),
            so that a 256-token window gives four samples; None pools whole sequences.
        energy: share of the variance that the kept principal directions hold.
        directions_per_sample: at most this many directions for each sample.
        ridge: added to the covariances, relative to the mean variance of the kept directions.
        sequences, error_sequences: calibration sequences for the scores, and for the relative errors.
        jackknife_groups: groups of sequences left out in turn for the standard error.
        rule: which relative error turns the score into damages.
    """

    name: ClassVar[str] = "cmpq"

    weighting: Weighting = "mean"
    pool_tokens: int | None = 64
    energy: float = 0.99
    directions_per_sample: float = 0.2
    ridge: float = 0.01
    sequences: int = 128
    error_sequences: int = 32
    jackknife_groups: int = 10
    rule: ErrorRule = "output"

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """One score per block; damages by `SCORE_RULE`."""
        used = pick_sequences(tokens, self.sequences)
        outputs, owners = self.pool_outputs(model, used, progress)
        scores = self.score_blocks(outputs, owners)
        errors = relative_errors(
            model,
            pick_sequences(tokens, self.error_sequences),
            integer_formats(formats, model.layout),
            self.rule,
            progress,
        )
        return Scores(
            unit="relative",
            damages=spread_over_sites(scores, errors, model.layout),
            block_scores=scores,
            metadata={
                "weighting": self.weighting,
                "pool_tokens": self.pool_tokens,
                "samples": len(owners),
                "energy": self.energy,
                "directions_per_sample": self.directions_per_sample,
                "ridge": self.ridge,
                "damage_rule": SCORE_RULE,
                "relative_error": RULE_TEXT[self.rule],
                "stderr": f"delete-a-group jackknife over sequences, {self.jackknife_groups} groups",
            },
        )

    def pool_outputs(self, model: LoadedModel, tokens: TokenSet, progress: Progress) -> tuple[list[Tensor], Tensor]:
        """Masked means of every block's output.

        Returns:
            Per block (N, d) float32 samples, and (N,) int64: which sequence each sample is from.
        """
        stream = ModelStream(model, tokens)
        masks = torch.cat([batch.attention_mask for batch in stream.batches])
        _, owners = pool_spans(masks.unsqueeze(-1).float(), masks, self.pool_tokens)
        outputs: list[Tensor] = []
        for index in range(model.layout.block_count):
            stream.advance(stream.load_block())
            pooled = [
                pool_spans(hidden, batch.attention_mask, self.pool_tokens)[0]
                for hidden, batch in zip(stream.hidden, stream.batches, strict=True)
            ]
            outputs.append(torch.cat(pooled))
            progress("block outputs", index + 1, model.layout.block_count)
        return outputs, owners

    def score_blocks(
        self,
        outputs: list[Tensor],  # per block (N, d)
        owners: Tensor,  # (N,) int64: which sequence each sample is from
    ) -> list[Estimate]:
        """1 - mean correlation of each block's samples with every other block's."""
        every = torch.ones(len(owners), dtype=torch.bool)
        values = self._dissimilarity(outputs, every)
        spread = jackknife_stderr(lambda rows: self._dissimilarity(outputs, rows), owners, self.jackknife_groups)
        count = len(owners.unique())
        return [
            Estimate(max(0.0, float(value)), None if spread is None else float(spread[index]), count)
            for index, value in enumerate(values)
        ]

    def _dissimilarity(
        self,
        outputs: list[Tensor],  # per block (N, d)
        rows: Tensor,  # (N,) bool
    ) -> Tensor:
        """Scores on some of the samples, (blocks,) float64."""
        views = [
            reduce_view(
                data[rows], energy=self.energy, directions_per_sample=self.directions_per_sample, ridge=self.ridge
            )
            for data in outputs
        ]
        count = len(views)
        rho = torch.zeros(count, count, dtype=torch.float64)
        for first in range(count):
            for second in range(count):
                if first == second or (self.weighting != "pwcca" and second < first):
                    continue
                rho[first, second] = mean_correlation(views[first], views[second], self.weighting)
        if self.weighting != "pwcca":  # the projection weights are the first view's; the others are symmetric
            rho = rho + rho.t()
        return 1 - rho.sum(dim=1) / max(1, count - 1)


def pool_spans(
    hidden: Tensor,  # (b, T, d)
    mask: Tensor,  # (b, T), 1 = real token
    span: int | None,
) -> tuple[Tensor, Tensor]:
    """Means over the real tokens of consecutive spans.

    A span counts if at least half of it is real; of a sequence without such a span, its fullest one counts.

    Returns:
        (N, d) means and (N,) int64 numbers of the sequences they are from.
    """
    sequences, length, width = hidden.shape
    span = min(span or length, length)
    spans = -(-length // span)
    padding = spans * span - length
    weights = torch.nn.functional.pad(mask.to(hidden.dtype), (0, padding)).view(sequences, spans, span, 1)
    states = torch.nn.functional.pad(hidden, (0, 0, 0, padding)).view(sequences, spans, span, width)
    real = weights.sum(dim=(2, 3))  # (b, spans)
    means = (states * weights).sum(dim=2) / real.unsqueeze(-1).clamp(min=1)
    counts = real >= span / 2
    fullest = torch.zeros_like(counts)
    fullest[torch.arange(sequences), real.argmax(dim=1)] = True  # at least one sample a sequence
    counts |= fullest & ~counts.any(dim=1, keepdim=True)
    owners = torch.arange(sequences).unsqueeze(1).expand_as(counts)
    return means[counts], owners[counts]
