"""TDMPQ: how much the loss is expected to rise for the very change that quantization makes to a weight.

Source: CPTQuant, arXiv 2412.03599, as its abstract words it (the published code takes no gradient: it adds unit noise
to one matrix of a block and sums the logits). With d = Q(W) - W and g the gradient of the loss at the original weights,

    first order    | <g, d> |                        mean over the calibration text, then the absolute value
    second order   1/2 d' F d,   F the Fisher matrix, F ~ E[g g']

For a sequence of c tokens whose losses are summed, E[g g'] is c times the Fisher matrix per token, so both are sums
over sequences divided by the number of tokens: nats per token. Three readings of d' F d are offered, by which products
of two weights they keep: "diagonal" takes sum_i F_ii d_i^2, the paper's wording read plainly; "rows" takes, over output
features j, sum_j <g_j, d_j>^2, hence all products inside a row, where correlated inputs make errors add up;
"projected" takes <g, d>^2, all products, at the price of a single noisy number a sequence. With the "empirical" Fisher
matrix g is the gradient of the text's own labels; with the "true" one the expectation is over the model's predictions
(random-sign probes, see `Objective.gradient`), and the second order term is that of the KL divergence to the original.
The defaults are those that came closest to the oracle on validation text (docs/sensitivity.md).

A bare encoder has no labels and stands at a minimum of its embedding error, where all gradients are zero. There the
Gauss-Newton term 1/2 |J d|^2 of the normalised pooled embedding is used, with E_v[<J'v, d>^2] over random signs v; it
is the second order term of 1 - cosine.

The input variant is the abstract's "sensitivity to a perturbation": E |<dL/dh, e>| for noise e ~ sigma rms(h) N(0, 1)
on a block's input h. The inner product is normal, so its mean absolute value is sqrt(2/pi) sigma rms(h) |dL/dh| exactly
and nothing is sampled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress
from cptquant.models.arithmetic import coarse_products, describe_arithmetic, has_fast_bfloat16
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import AblationSweep
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.expansion import Curvature, Terms, backward, input_score, products
from cptquant.sensitivity.loss import Fisher, Objective, Question, pick_for_task, pick_sequences, pose_question
from cptquant.sensitivity.perturbation import (
    BLOCK_SCORE_BITS,
    integer_formats,
    load_block_at,
    nearest_format,
    original_weight,
    perturb,
    run_block_on_all,
)
from cptquant.sensitivity.relative_error import RULE_TEXT, relative_errors
from cptquant.sensitivity.scores import SCORE_RULE, Scores, SiteFormats, spread_over_sites

_CHANGE_BYTES = 224 << 20
"""Changes of a block's weights held in float32, all formats together. A block that needs more goes back in several
turns, some of its sites each."""

_HIDDEN_BYTES = 256 << 20
"""Block inputs kept for the way back, in bfloat16 where products are coarse. Where all of them need more, every
sqrt(blocks)-th is kept and those between are computed again, which costs a second forward pass; where that needs more
still, sequences are gone through in groups, which costs rounding every weight to every format once a group."""


@dataclass(frozen=True)
class Tdmpq:
    """Hyper-parameters of TDMPQ.

    Attributes:
        variant: "weight" perturbs weights as quantization does; "input" perturbs block inputs by noise.
        order: which Taylor terms count: "first", "second", or their "sum".
        curvature: which products the second order term keeps: "diagonal", "rows" or "projected".
        fisher: "empirical" (the text's labels) or "true" (the model's own predictions). First order terms and the input
            variant take the text's labels whatever is set here: without a label there is no loss to rise.
        noise: sigma of the input variant, relative to the root mean square of the input.
        sequences, examples: how much calibration text is used: windows for a language model, texts for a classifier or
            a bare encoder, which answer each text only once.
        outside_sequences: sequences for sites outside the blocks, whose divergence is measured, not expanded: one pass
            per format is cheap there, and a gradient with respect to a large vocabulary's head is not.
        seed: of the random signs.
        coarse_products: passes may round the factors of their matrix products to bfloat16 (models/arithmetic.py).
    """

    name: ClassVar[str] = "tdmpq"

    variant: Literal["weight", "input"] = "weight"
    order: Literal["first", "second", "sum"] = "second"
    curvature: Curvature = "rows"
    fisher: Fisher = "true"
    noise: float = 0.01
    sequences: int = 32
    examples: int = 128
    outside_sequences: int = 16
    seed: int = 0
    coarse_products: bool = True

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """Expected rise of the loss per site and format; per block, the sum over its sites near 4 bits."""
        used = pick_for_task(model, tokens, self.sequences, self.examples)
        question = pose_question(model, used)
        chosen = integer_formats(formats, model.layout)
        walk = _BackwardWalk(self, model, question, chosen, progress)
        walk.run()
        if self.variant == "input":
            return self._scores_of_inputs(walk, model, used, chosen, progress)
        outside = {name: row for name, row in chosen.items() if model.layout.site_by_name[name].block_index is None}
        damages = walk.damages()
        if outside:
            sweep = AblationSweep(model, pick_sequences(tokens, self.outside_sequences), outside, progress)
            damages |= sweep.measure_outside()
        return Scores(
            unit=_unit(model),
            damages=damages,
            block_scores=walk.block_sums(),
            metadata={
                **self._metadata(model),
                "block_score": f"sum over the block's sites at the format nearest to {BLOCK_SCORE_BITS} bits",
                "sites_outside_blocks": f"measured: divergence with the site quantized, {self.outside_sequences} "
                "sequences at most",
            },
        )

    @property
    def used_fisher(self) -> Fisher:
        """ "empirical" wherever a first order term is asked for."""
        return self.fisher if self.variant == "weight" and self.order == "second" else "empirical"

    def _scores_of_inputs(
        self,
        walk: "_BackwardWalk",
        model: LoadedModel,
        tokens: TokenSet,
        formats: Mapping[str, tuple[QuantFormat, ...]],
        progress: Progress,
    ) -> Scores:
        scores = walk.input_scores()
        errors = relative_errors(model, tokens, formats, "output", progress)
        return Scores(
            unit="loss_nats_per_token_times_relative_error",
            damages=spread_over_sites(scores, errors, model.layout),
            block_scores=scores,
            metadata={
                **self._metadata(model),
                "noise": self.noise,
                "damage_rule": SCORE_RULE,
                "relative_error": RULE_TEXT["output"],
            },
        )

    def _metadata(self, model: LoadedModel) -> dict[str, str | int | float | bool | None]:
        encoder = model.layout.task == "encoder"
        return {
            "variant": self.variant,
            "order": "second" if encoder else self.order,
            "curvature": self.curvature,
            "fisher": "Gauss-Newton of the normalised pooled embedding, random sign probes (no labels; first-order "
            "terms vanish at the original weights)"
            if encoder
            else self.used_fisher,
            "quantizer": "round to nearest",
            "seed": self.seed,
            "arithmetic": describe_arithmetic(self.coarse_products),
            "stderr": "over sequences, clustered by document",
        }


def _unit(model: LoadedModel) -> str:
    return {"encoder": "one_minus_cosine", "sequence_classification": "loss_nats"}.get(
        model.layout.task, "loss_nats_per_token"
    )


class _BackwardWalk:
    """One forward and one backward pass over the calibration text, a sequence and a block at a time.

    Going forward the blocks' inputs are kept; going back each block is run again with gradients, its weight gradients
    are set against the changes of all formats at once and dropped. Sequences go one by one because a gradient is needed
    for each: the square of a sum is not the sum of squares.
    """

    def __init__(
        self,
        method: Tdmpq,
        model: LoadedModel,
        question: Question,
        formats: Mapping[str, tuple[QuantFormat, ...]],
        progress: Progress,
    ) -> None:
        self._method, self._model, self._question, self._progress = method, model, question, progress
        layout = model.layout
        self._formats = {
            name: row for name, row in formats.items() if layout.site_by_name[name].block_index is not None
        }
        self._terms = {name: {fmt.name: Terms() for fmt in row} for name, row in self._formats.items()}
        self._inputs: list[list[float]] = [[] for _ in range(layout.block_count)]
        self._counts: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(method.seed)

    def run(self) -> None:
        """Go through all sequences, a group at a time."""
        tokens, layout = self._question.tokens, self._model.layout
        count, sequences = layout.block_count, tokens.sequence_count
        one_input_bytes = self._kept_dtype.itemsize * tokens.input_ids.shape[1] * layout.hidden_size
        stride, size = 1, sequences
        if sequences * count * one_input_bytes > _HIDDEN_BYTES:
            stride = math.ceil(count**0.5)
            held = math.ceil(count / stride) + stride
            size = max(1, _HIDDEN_BYTES // (held * one_input_bytes))
        groups = torch.arange(sequences).split(size)
        for number, indices in enumerate(groups):
            self._run_group(
                indices, stride, lambda done, number=number: self._report(number * count + done, len(groups))
            )

    @property
    def _kept_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._method.coarse_products and has_fast_bfloat16() else torch.float32

    def _keep(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [hidden.to(self._kept_dtype) for hidden in states]

    def _report(self, done: int, group_count: int) -> None:
        self._progress("gradients", done, group_count * self._model.layout.block_count)

    def _run_group(self, indices: Tensor, stride: int, report: Callable[[int], None]) -> None:
        question = Question(
            self._question.tokens.subset(indices),
            None if self._question.targets is None else self._question.targets[indices],
        )
        stream = ModelStream(self._model, question.tokens, batch_size=1)
        count = self._model.layout.block_count
        kept: dict[int, list[Tensor]] = {}
        for index in range(count):
            if index % stride == 0:
                kept[index] = self._keep(stream.hidden)
            with coarse_products(self._method.coarse_products):
                stream.advance(stream.load_block())
        objective = Objective(stream, question)
        gradients: list[Tensor] = []
        for index, hidden in enumerate(stream.hidden):
            with coarse_products(self._method.coarse_products):
                gradient, counts = objective.gradient(index, hidden, self._method.used_fisher, self._generator)
            gradients.append(gradient)
            self._counts.append(counts)
        for start in reversed(kept):
            inputs = [kept[start]]
            for index in range(start, min(start + stride, count) - 1):
                states = [hidden.float() for hidden in inputs[-1]]
                with coarse_products(self._method.coarse_products):
                    inputs.append(self._keep(run_block_on_all(stream, load_block_at(stream, index), index, states)))
            while inputs:
                block_index = start + len(inputs) - 1
                self._go_back(stream, block_index, inputs.pop(), gradients)
                report(count - block_index)

    def _go_back(
        self,
        stream: ModelStream,
        block_index: int,
        inputs: list[Tensor],  # per sequence (1, T, d)
        gradients: list[Tensor],  # per sequence (1, T, d), of the block's output; replaced by those of its input
    ) -> None:
        block = load_block_at(stream, block_index)
        modules = site_modules(block, self._model.layout, block_index)
        names = [name for name in modules if name in self._formats and self._method.variant == "weight"]
        turns = self._turns(names)
        for turn in turns:
            changes = {name: self._changes(name) for name in turn}
            for index, kept in enumerate(inputs):
                hidden = kept.float()
                weights, gradient = self._backward(stream, block_index, block, index, hidden, turn, gradients[index])
                for name in turn:
                    self._take(name, weights.get(name), changes[name])
                if turn is turns[-1]:
                    gradients[index] = gradient
                    self._inputs[block_index].append(input_score(hidden, gradient, self._method.noise))

    def _turns(self, names: list[str]) -> list[list[str]]:
        """The sites of a block, as many together as their changes fit into memory; at least one turn, maybe empty."""
        turns: list[list[str]] = [[]]
        free = _CHANGE_BYTES
        for name in names:
            needed = 4 * self._model.layout.site_by_name[name].weight_count * len(self._formats[name])
            if needed > free and turns[-1]:
                turns.append([])
                free = _CHANGE_BYTES
            turns[-1].append(name)
            free -= needed
        return turns

    def _changes(self, name: str) -> Tensor:
        """(formats, out_features, in_features) float32."""
        layout = self._model.layout
        weight = original_weight(self._model, layout.site_by_name[name])
        changes = torch.empty(len(self._formats[name]), *weight.shape)
        for row, fmt in zip(changes, self._formats[name], strict=True):
            row.copy_(perturb(weight, fmt, layout, Rtn()))
        return changes

    def _backward(
        self,
        stream: ModelStream,
        block_index: int,
        block: nn.Module,
        index: int,
        hidden: Tensor,  # (1, T, d)
        names: list[str],
        gradient: Tensor,  # (1, T, d)
    ) -> tuple[dict[str, Tensor], Tensor]:
        layout = self._model.layout
        modules = site_modules(block, layout, block_index)

        def run(states: Tensor) -> Tensor:
            return stream.run_block_at(block, block_index, index, states)

        with coarse_products(self._method.coarse_products):
            return backward(
                run,
                {name: modules[name] for name in names},
                {name: layout.site_by_name[name] for name in names},
                hidden,
                gradient,
            )

    def _take(self, name: str, gradient: Tensor | None, changes: Tensor) -> None:
        """Set one sequence's gradient against the changes of all formats."""
        inner, quadratic = products(gradient, changes, self._method.curvature)
        for fmt, first, second in zip(self._formats[name], inner, quadratic, strict=True):
            terms = self._terms[name][fmt.name]
            terms.inner.append(first)
            terms.quadratic.append(second)

    def damages(self) -> dict[str, dict[str, Estimate]]:
        """Site name -> format name -> expected rise of the loss."""
        return {name: {fmt: self._combine([terms]) for fmt, terms in row.items()} for name, row in self._terms.items()}

    def block_sums(self) -> list[Estimate]:
        """Per block, the sum over its sites at the format nearest to `BLOCK_SCORE_BITS`."""
        owned: list[list[Terms]] = [[] for _ in range(self._model.layout.block_count)]
        for site in self._model.layout.block_sites:
            if site.name in self._formats and site.block_index is not None:
                owned[site.block_index].append(self._terms[site.name][nearest_format(self._formats[site.name]).name])
        return [self._combine(terms) for terms in owned]

    def input_scores(self) -> list[Estimate]:
        """Per block, the expected change of the loss under noise on its input."""
        return [self._estimate(torch.tensor(values, dtype=torch.float64)) for values in self._inputs]

    def _combine(self, terms: list[Terms]) -> Estimate:
        """Add up the chosen Taylor terms of some sites."""
        sequences = self._question.tokens.sequence_count
        total = torch.zeros(sequences, dtype=torch.float64)
        order = "second" if self._question.targets is None else self._method.order
        for part in terms:
            inner = torch.tensor(part.inner, dtype=torch.float64)
            if order != "second":
                total += inner * math.copysign(1.0, float(inner.sum()))  # the absolute value of the mean, term by term
            if order != "first":
                total += 0.5 * torch.tensor(part.quadratic, dtype=torch.float64)
        return self._estimate(total)

    def _estimate(self, sums: Tensor) -> Estimate:
        return estimate_ratio(sums, torch.cat(self._counts), self._question.tokens.documents).floored()
