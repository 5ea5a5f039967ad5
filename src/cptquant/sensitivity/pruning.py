"""PMPQ: a block whose loss rises when its small weights are cut is sensitive.

Source: CPTQuant, arXiv 2412.03599.

    S(l) = max(0, loss(model with block l pruned at sparsity s) - loss(model)),   s = 0.3

What we changed: weight *matrices* only (the published code also zeroes norms and biases); each matrix loses exactly the
share s of its smallest entries; the loss is the task's cross entropy in nats (the code uses accuracy for classifiers,
which one evaluation step of noise decides, and for language models subtracts in the wrong order, so that harm counts as
negative). A bare encoder has no labels: its loss is 1 - cosine to the original's pooled embedding.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, read_weight, site_modules
from cptquant.models.text import TokenSet
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.loss import (
    Objective,
    SequenceTotals,
    pick_for_task,
    pick_sequences,
    pose_question,
)
from cptquant.sensitivity.perturbation import changed_weights, integer_formats, run_block_on_all, run_to_end
from cptquant.sensitivity.relative_error import RULE_TEXT, ErrorRule, relative_errors
from cptquant.sensitivity.scores import SCORE_RULE, Scores, SiteFormats, spread_over_sites


@dataclass(frozen=True)
class Pmpq:
    """Hyper-parameters of PMPQ.

    Attributes:
        sparsity: share of a matrix's entries set to zero for the score. curve: further sparsities, for the report.
        granularity: "block" prunes whole blocks and gives a block's score to all its sites; "site" also prunes every
            site alone, for damages of its own, at a cost of sites / blocks times as much.
        sequences, examples: how much calibration text is used for the scores: windows for a language model, texts for a
            classifier or a bare encoder, which answer each text only once.
        error_sequences: sequences for the relative errors.
        rule: which relative error turns the score into damages.
    """

    name: ClassVar[str] = "pmpq"

    sparsity: float = 0.3
    curve: tuple[float, ...] = (0.1, 0.3, 0.5)
    granularity: Literal["block", "site"] = "block"
    sequences: int = 32
    examples: int = 128
    error_sequences: int = 32
    rule: ErrorRule = "output"

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """One score per block; damages by `SCORE_RULE`."""
        layout = model.layout
        sweep = _PruningSweep(model, pick_for_task(model, tokens, self.sequences, self.examples), progress)
        sparsities = sorted({self.sparsity, *self.curve})
        increases, drops, single = sweep.run(sparsities, self.sparsity if self.granularity == "site" else None)
        scores = [row.floored() for row in increases[self.sparsity]]
        errors = relative_errors(
            model, pick_sequences(tokens, self.error_sequences), integer_formats(formats, layout), self.rule, progress
        )
        curves = {
            f"loss_increase_at_sparsity_{sparsity:g}": {str(i): row.value for i, row in enumerate(rows)}
            for sparsity, rows in increases.items()
        }
        if layout.task == "sequence_classification":
            curves |= {
                f"accuracy_drop_at_sparsity_{sparsity:g}": {str(i): row.value for i, row in enumerate(rows)}
                for sparsity, rows in drops.items()
            }
        return Scores(
            unit=f"{sweep.loss_unit}_times_relative_error",
            damages=spread_over_sites(scores, errors, layout, site_scores=single),
            block_scores=scores,
            metadata={
                "sparsity": self.sparsity,
                "granularity": self.granularity,
                "loss": sweep.loss_name,
                "damage_rule": SCORE_RULE if not single else SCORE_RULE + "; sites in blocks take their own score",
                "relative_error": RULE_TEXT[self.rule],
                "stderr": "paired differences per sequence, clustered by document",
            },
            curves=curves,
        )


class _PruningSweep:
    """Prunes one block (or site) at a time and runs the rest of the model on what comes out.

    Blocks before the pruned one are unchanged, so the walk forward is shared: L^2 / 2 block passes for each sparsity.
    """

    def __init__(self, model: LoadedModel, tokens: TokenSet, progress: Progress) -> None:
        question = pose_question(model, tokens)
        self._layout, self._progress = model.layout, progress
        self._stream = ModelStream(model, question.tokens)
        self._objective = Objective(self._stream, question)
        self._documents = question.tokens.documents
        whole = [list(self._stream.hidden)]
        run_to_end(self._stream, 0, whole)
        self._reference = whole[0]
        self._before = self._objective.losses(self._reference, self._reference)
        self.loss_unit = {"encoder": "one_minus_cosine", "sequence_classification": "nll_nats"}.get(
            self._layout.task, "nll_nats_per_token"
        )
        self.loss_name = {
            "encoder": "1 - cosine to the original's pooled embedding",
            "masked_lm": "NLL of masked tokens, nats per token",
            "causal_lm": "NLL of next tokens, nats per token",
            "sequence_classification": "cross entropy of the label, nats per example",
        }[self._layout.task]

    def run(
        self, sparsities: list[float], site_sparsity: float | None
    ) -> tuple[dict[float, list[Estimate]], dict[float, list[Estimate]], dict[str, Estimate]]:
        """Loss increase and accuracy drop per sparsity and block, and, if asked for, loss increase per site."""
        increases: dict[float, list[Estimate]] = {sparsity: [] for sparsity in sparsities}
        drops: dict[float, list[Estimate]] = {sparsity: [] for sparsity in sparsities}
        single: dict[str, Estimate] = {}
        stream, count = self._stream, self._layout.block_count
        for index in range(count):
            block = stream.load_block()
            modules = site_modules(block, self._layout, index)
            weights = {name: read_weight(module, self._layout.site_by_name[name]) for name, module in modules.items()}
            choices = [{name: prune(weight, sparsity) for name, weight in weights.items()} for sparsity in sparsities]
            if site_sparsity is not None:
                choices += [{name: prune(weight, site_sparsity)} for name, weight in weights.items()]
            variants: list[list[Tensor]] = []
            for choice in choices:
                with changed_weights(modules, self._layout, choice):
                    variants.append(run_block_on_all(stream, block, index, stream.hidden))
            run_to_end(stream, index + 1, variants)
            results = [self._compare(variant) for variant in variants]
            for sparsity, (increase, drop) in zip(sparsities, results, strict=False):
                increases[sparsity].append(increase)
                drops[sparsity].append(drop)
            single |= {name: result[0].floored() for name, result in zip(weights, results[len(sparsities) :])}  # noqa: B905
            stream.advance(block)
            self._progress("pruning blocks", index + 1, count)
        return increases, drops, single

    def _compare(self, hidden: list[Tensor]) -> tuple[Estimate, Estimate]:
        """Paired increase of the loss and drop of the accuracy."""
        before, after = self._before, self._objective.losses(hidden, self._reference)
        return (
            estimate_ratio(after.sums - before.sums, before.counts, self._documents),
            _accuracy_drop(before, after, self._documents),
        )


def _accuracy_drop(before: SequenceTotals, after: SequenceTotals, documents: Tensor) -> Estimate:
    return estimate_ratio((before.correct - after.correct).double(), before.counts, documents)


def prune(
    weight: Tensor,  # (out_features, in_features)
    sparsity: float,
) -> Tensor:
    """A copy in which exactly floor(sparsity * entries) of the smallest magnitudes are zero."""
    count = int(sparsity * weight.numel())
    flat = weight.contiguous().flatten().clone()
    flat[torch.topk(flat.abs(), count, largest=False, sorted=False).indices] = 0
    return flat.view(weight.shape)
