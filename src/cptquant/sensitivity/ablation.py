"""The oracle: quantize one site (or one block), leave the rest alone, and measure the divergence from the original.

Exact for a single change and slow: one pass through the rest of the model for each site and format. It knows nothing of
how the errors of several sites add up; neither do the methods it judges.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.loss import Objective, pick_for_task, pose_question
from cptquant.sensitivity.perturbation import BLOCK_SCORE_BITS, integer_formats, nearest_format
from cptquant.sensitivity.relative_error import RULE_TEXT, relative_errors
from cptquant.sensitivity.scores import SCORE_RULE, Scores, SiteFormats, spread_over_sites
from cptquant.sensitivity.sweep import Change, ChangedEnd, ChangeSweep

_OUTSIDE_LOGITS = 1 << 26
"""Logits compared for each option of a site outside the blocks: 1,300 positions of a vocabulary of 50,000."""


@dataclass(frozen=True)
class Ablation:
    """Hyper-parameters of the oracle.

    Attributes:
        sequences, examples: how much calibration text is used: windows for a language model, texts for a classifier or
            a bare encoder, which answer each text only once.
        granularity: "site" measures every site alone in every format; "block" only whole blocks, each of its sites in
            the format nearest to `BLOCK_SCORE_BITS`, and gives a block's score to its sites by `SCORE_RULE`. Block
            scores are measured on whole blocks either way.
    """

    name: ClassVar[str] = "ablation"

    sequences: int = 16
    examples: int = 64
    granularity: Literal["site", "block"] = "site"

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """KL(original ‖ one site quantized), per site and format, and the same per block."""
        chosen = integer_formats(formats, model.layout)
        used = pick_for_task(model, tokens, self.sequences, self.examples)
        sweep = AblationSweep(model, used, chosen, progress)
        metadata: dict[str, str | int | float | bool | None] = {
            "divergence": "1 - cosine of the pooled embeddings"
            if model.layout.task == "encoder"
            else "KL(original ‖ changed)",
            "granularity": self.granularity,
            "quantizer": "round to nearest",
            "block_score": f"the whole block, each site at the format nearest to {BLOCK_SCORE_BITS} bits",
            "stderr": "over sequences, clustered by document",
        }
        if self.granularity == "site":
            damages, scores = sweep.run(sites=True)
            return Scores(sweep.unit, damages | sweep.measure_outside(), scores, metadata)
        _, scores = sweep.run(sites=False)
        errors = relative_errors(model, used, chosen, "output", progress)
        metadata |= {"damage_rule": SCORE_RULE, "relative_error": RULE_TEXT["output"]}
        return Scores(
            f"{sweep.unit}_times_relative_error", spread_over_sites(scores, errors, model.layout), scores, metadata
        )


class AblationSweep:
    """Walks forward once; at each block runs every change of that block through the rest of the model.

    Args:
        model: never changed. tokens: all of them are used. formats: site name -> integer formats.
        progress: told of blocks done.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokens: TokenSet,
        formats: Mapping[str, tuple[QuantFormat, ...]],
        progress: Progress,
    ) -> None:
        self._layout, self._formats, self._progress = model.layout, formats, progress
        self._question = pose_question(model, tokens)
        self._sweep = ChangeSweep(model, self._question.tokens)
        self._objective = Objective(self._sweep.stream, self._question)
        self._reference = self._sweep.original_end()
        self.unit = self._objective.unit

    def run(self, *, sites: bool) -> tuple[dict[str, dict[str, Estimate]], list[Estimate]]:
        """Damages of the sites inside the blocks (none, if they are not asked for), and the blocks' scores."""
        damages: dict[str, dict[str, Estimate]] = {}
        scores: list[Estimate] = []
        wanted = [changes_of_block(self._layout, self._formats, index) for index in range(self._layout.block_count)]
        ends = self._sweep.inside_blocks(lambda index: (*(wanted[index][0] if sites else ()), wanted[index][1]))
        for end in ends:
            found = self._diverge(end, self._objective)
            if end.change is wanted[end.block_index or 0][1]:
                scores.append(found)
                self._progress("ablation", len(scores), self._layout.block_count)
                continue
            ((name, fmt),) = end.change.items()
            damages.setdefault(name, {})[fmt.name] = found
        return damages, scores

    def _diverge(self, end: ChangedEnd, objective: Objective) -> Estimate:
        totals = objective.divergences(end.hidden, self._reference, changed=end.stream)
        return estimate_ratio(totals.sums, totals.counts, self._question.tokens.documents)

    def measure_outside(self) -> dict[str, dict[str, Estimate]]:
        """Damages of the sites outside the blocks.

        Every format is measured at the same positions, evenly spread, as many as a large vocabulary allows.
        """
        logits = self._question.tokens.input_ids.numel() * max(1, self._layout.vocabulary_size)
        objective = Objective(self._sweep.stream, self._question, stride=-(-logits // _OUTSIDE_LOGITS))
        damages: dict[str, dict[str, Estimate]] = {}
        for end in self._sweep.outside_blocks(self._formats, self._reference):
            ((name, fmt),) = end.change.items()
            damages.setdefault(name, {})[fmt.name] = self._diverge(end, objective)
        return damages


def changes_of_block(
    layout: ModelLayout, formats: Mapping[str, tuple[QuantFormat, ...]], block_index: int
) -> tuple[list[Change], Change]:
    """Each format of each site of a block alone; and the whole block, near `BLOCK_SCORE_BITS`."""
    names = [site.name for site in layout.sites if site.block_index == block_index and site.name in formats]
    alone: list[Change] = [{name: fmt} for name in names for fmt in formats[name]]
    return alone, {name: nearest_format(formats[name]) for name in names}
