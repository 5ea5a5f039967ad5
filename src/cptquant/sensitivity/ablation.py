"""The oracle: quantize one site (or one block), leave the rest alone, and measure the divergence from the original.

Exact for a single change and slow: one pass through the rest of the model for each site and format. It knows nothing of
how the errors of several sites add up; neither do the methods it judges.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.loss import Objective, pick_for_task, pose_question
from cptquant.sensitivity.perturbation import (
    BLOCK_SCORE_BITS,
    OneSite,
    changed_weights,
    integer_formats,
    nearest_format,
    original_weight,
    perturb,
    run_block_on_all,
    run_to_end,
    scale_dtype,
)
from cptquant.sensitivity.relative_error import RULE_TEXT, relative_errors
from cptquant.sensitivity.scores import (
    SCORE_RULE,
    Scores,
    SiteFormats,
    entry_sites,
    exit_sites,
    spread_over_sites,
)

_BATCH_SIZE = 8  # sequences; a large vocabulary is met by judging a few positions at a time (`Objective`)
_OUTSIDE_LOGITS = 1 << 26
"""Logits compared for each option of a site outside the blocks: 1,300 positions of a vocabulary of 50,000."""
_VARIANT_BYTES = 256 << 20  # hidden states of changed models carried through the blocks at once


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
        self._model, self._layout, self._formats, self._progress = model, model.layout, formats, progress
        self._question = pose_question(model, tokens)
        self._stream = self._new_stream()
        self._start = list(self._stream.hidden)
        self._objective = Objective(self._stream, self._question)
        whole = [list(self._start)]
        run_to_end(self._stream, 0, whole)
        self._reference = whole[0]
        self.unit = self._objective.unit

    def _new_stream(self, change: OneSite | None = None) -> ModelStream:
        return ModelStream(self._model, self._question.tokens, weights=change, batch_size=_BATCH_SIZE)

    def run(self, *, sites: bool) -> tuple[dict[str, dict[str, Estimate]], list[Estimate]]:
        """Damages of the sites inside the blocks (none, if they are not asked for), and the blocks' scores."""
        damages: dict[str, dict[str, Estimate]] = {}
        scores: list[Estimate] = []
        for index in range(self._layout.block_count):
            found, score = self._run_block(index, sites=sites)
            damages |= found
            scores.append(score)
            self._progress("ablation", index + 1, self._layout.block_count)
        return damages, scores

    def _run_block(self, index: int, *, sites: bool) -> tuple[dict[str, dict[str, Estimate]], Estimate]:
        stream, layout = self._stream, self._layout
        block = stream.load_block()
        modules = {name: module for name, module in site_modules(block, layout, index).items() if name in self._formats}
        changes: list[dict[str, QuantFormat]] = []
        if sites:
            changes += [{name: fmt} for name in modules for fmt in self._formats[name]]
        changes.append({name: nearest_format(self._formats[name]) for name in modules})
        results: list[Estimate] = []
        at_once = self._variants_at_once()
        for start in range(0, len(changes), at_once):
            variants: list[list[Tensor]] = []
            for change in changes[start : start + at_once]:
                with changed_weights(modules, layout, self._quantize(modules, change)):
                    variants.append(run_block_on_all(stream, block, index, stream.hidden))
            run_to_end(stream, index + 1, variants)
            results += [self._diverge(variant) for variant in variants]
        stream.advance(block)
        damages: dict[str, dict[str, Estimate]] = {}
        for change, result in zip(changes[:-1], results[:-1], strict=True):
            ((name, fmt),) = change.items()
            damages.setdefault(name, {})[fmt.name] = result
        return damages, results[-1]

    def _variants_at_once(self) -> int:
        return max(1, _VARIANT_BYTES // sum(states.numel() * 4 for states in self._start))

    def _quantize(self, modules: Mapping[str, object], change: Mapping[str, QuantFormat]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, fmt in change.items():
            site = self._layout.site_by_name[name]
            weight = original_weight(self._model, site).float()
            weights[name] = weight + perturb(weight, fmt, self._layout, Rtn())
        return weights

    def _diverge(
        self, hidden: list[Tensor], changed: ModelStream | None = None, objective: Objective | None = None
    ) -> Estimate:
        totals = (objective or self._objective).divergences(hidden, self._reference, changed=changed)
        return estimate_ratio(totals.sums, totals.counts, self._question.tokens.documents)

    def measure_outside(self) -> dict[str, dict[str, Estimate]]:
        """Damages of the sites outside the blocks: embeddings pass through the whole model, heads only its end.

        Every format is measured at the same positions, evenly spread, as many as a large vocabulary allows.
        """
        logits = self._question.tokens.input_ids.numel() * max(1, self._layout.vocabulary_size)
        objective = Objective(self._stream, self._question, stride=-(-logits // _OUTSIDE_LOGITS))
        damages: dict[str, dict[str, Estimate]] = {}
        for site in (*entry_sites(self._layout), *exit_sites(self._layout)):
            for fmt in self._formats.get(site.name, ()):
                weight = original_weight(self._model, site)  # large: upcast by the quantizer, a few rows at a time
                change = OneSite(site.name, Rtn()(weight, fmt, scale_dtype(self._layout)))
                stream = self._new_stream(change)
                if site in entry_sites(self._layout):
                    variants = [list(stream.hidden)]
                    run_to_end(self._stream, 0, variants)
                    found = self._diverge(variants[0], objective=objective)
                else:
                    found = self._diverge(self._reference, stream, objective)
                damages.setdefault(site.name, {})[fmt.name] = found
        return damages
