"""Learned rounding of the whole model on its outputs and hidden states at once.

GPTQ and SignRound reproduce each layer's or block's output, one after the other, and take every direction of it for
equally important. Here the codes and scales of all blocks' sites are learned together on

    L(v, s) = KL(p_original || p(v, s)) + w mean over blocks b of  mean ||h_b(v, s) - h_b||^2 / spread_b,  |v| <= reach,

means over calibration tokens, h_b the original's hidden state after block b, spread_b the mean squared distance of h_b
from its own mean. The first term says what is judged in the end. The second tells every site far more per token than
one number can: on 120 sequences KL alone learns slower and fits the text at hand. It is a relative of distillation with
hidden states (arXiv 1909.10351, equation 8); unlike a block-wise objective it reaches through all blocks before, so
earlier sites learn to undo what later ones cannot. Learning the grid end to end is EfficientQAT's second phase (arXiv
2407.11062, section 3.3: scales alone), codes and scales by turns is PV-Tuning (arXiv 2405.14852, algorithm 1).
learned_codes.py has the variables and their straight-through gradients. No norm, bias or embedding is touched.

The start is Block-AP's solution (learned_blocks.py), which has most of what is to be won already. From there a quarter
of the rate that served from GPTQ's is better (decision 0012).

The step. Inputs of a layer are strongly correlated, so plain gradients of its codes all pull along the same few
directions: many codes flip at once, overshoot, and undo what GPTQ compensated (KL doubled within 30 steps at 3 bits);
Adam, which also moves what it knows nothing about as fast as the rest, is worse. So gradients are first turned by the
inverse of the Hessian of the layer's inputs, as GPTQ's own compensation is (the input half of K-FAC, arXiv 1503.05671),
and keep their proportions inside a row: with m the momentum of d = (dL/dv) (H + damping)^-1,

    v <- v - rate * m / sqrt(mean over the row of d^2),

so the codes with the most to gain flip first, and the gradients of the rest are taken anew with those in place
(PV-Tuning's "few codes at a time", without sorting). Scales are few and each sums a whole group's gradient; they move
by Adam's rule in relative steps.

Text. Offsets are as many as weights, and the text at hand is soon learned by heart: on 128 sequences KL falls to .0125
there and to .028 elsewhere (reference-llama, 2.46 bits), on 896 more that the model writes itself to .0182 and .0186.
So `quantize` gives such text as well (models/own_text.py), and each sequence is seen about once.

Some sequences of the person's text are held out of learning. Their KL alone chooses the best iterate and decides at the
end: where none is better than the start, the start is kept and the records say so.

Memory: beside the model, its blocks in float32 twice (the original's and the changed ones, 8 bytes a weight), 9 bytes a
weight for offsets, momentum and the start's codes, 1 for the best iterate's; an inverse Hessian of each distinct input,
float32 (in x in); the text's embeddings twice; activations of one batch, of all blocks where they fit
`_ACTIVATION_BYTES`, else only the blocks' inputs, and blocks are run twice. Hidden states of the original are made anew
for each batch: with most sequences seen once, keeping them would save nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cptquant.core.errors import DataError
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, QuantizedSource, read_weight, site_modules
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.followed_text import FollowedText, StateDistance
from cptquant.quantizers.goes_on import GoesOn
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.held_out import split_held_out
from cptquant.quantizers.hessian import collect_block_hessians
from cptquant.quantizers.learned_blocks import LearnedBlocks
from cptquant.quantizers.learned_codes import Learnable, LearnedWeight
from cptquant.quantizers.variables import Variable, gradients_of, learning_of

_ACTIVATION_BYTES = 1 << 30
"""Activations of a batch that are kept for the way back; above it, blocks are run again."""
_ACTIVATIONS_PER_WIDTH = 40
"""Float32 numbers a block keeps for each of a token's `width` numbers, roughly."""
_SURVEYED = 128
"""Sequences from which the Hessians are taken."""
_TINY = 1e-30


@dataclass(frozen=True)
class KlRounding(GoesOn):
    """Hyper-parameters.

    Attributes:
        start: makes the solution learning starts from.
        steps: gradient steps. batch_sequences: sequences in each.
        code_rate: step of an offset whose gradient has its row's root mean square, in steps of the grid.
        scale_rate: relative step of a scale. left_rate: step of the left factor of a product of low rank by Adam's
            rule, in steps of the grid (the mean). All rise over the first twentieth and then fall linearly to 0.
        state_weight: w above; 0 learns on the KL alone.
        momentum, memory: of the gradient's mean and of its mean square, per step.
        damping: fraction of the mean diagonal added to the Hessians.
        reach: largest offset from the start's code, in steps of the grid.
        held_out: share of the person's calibration sequences kept for choosing the iterate (at least one sequence).
        checks: how often the held-out sequences are looked at.
        seed: of the order of the batches.
    """

    start: Gptq | GoesOn = field(default_factory=lambda: LearnedBlocks(sequences=1024))
    steps: int = 120
    batch_sequences: int = 8
    code_rate: float = 0.0005
    scale_rate: float = 5e-4
    left_rate: float = 0.02
    state_weight: float = 8.0
    momentum: float = 0.9
    memory: float = 0.95
    damping: float = 0.1
    reach: float = 1.0
    held_out: float = 1 / 16
    checks: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """What learning found.

    Attributes:
        weights: the blocks' quantized sites; the start's own where it was kept.
        held_out_before, held_out_after: mean divergence on the held-out sequences, of the start and of `weights`.
        best_step: the iterate that was taken; 0 is the start.
    """

    weights: Mapping[str, StoredWeight]
    held_out_before: float
    held_out_after: float
    best_step: int


def learn_model(
    model: LoadedModel,
    start: QuantizedSource,
    method: KlRounding,
    tokens: TokenSet,
    progress: Callable[[int, int], None] | None = None,
) -> Learned:
    """Learn the codes and scales of all quantized sites inside the blocks; those outside stay as `start` has them.

    The result depends on model, start, method and tokens only.

    Args:
        model: never changed. start: finished weights of every quantized site. tokens: calibration text.
        progress: called with (steps done, steps in all).

    Raises:
        DataError: fewer than two sequences.
    """
    if tokens.sequence_count < 2:
        raise DataError(
            f"--quantizer kl-rounding needs at least 2 calibration sequences, got {tokens.sequence_count}: one to "
            "learn on, one to judge by; raise --calibration-sequences"
        )
    held, learned = split_held_out(tokens, method.held_out, method.seed)
    return _WholeModel(model, start, method, learned, held).run(progress)


def _some(tokens: TokenSet) -> TokenSet:
    """At most `_SURVEYED` sequences, evenly spread."""
    count = tokens.sequence_count
    return tokens.subset(torch.linspace(0, count - 1, min(count, _SURVEYED)).round().long())


_Inverses = dict[str, Tensor | None]


class _State:
    """A site that is learned, with the moments of its gradient."""

    def __init__(self, variable: Variable, inverse: Tensor | None) -> None:
        self.variable, self._inverse = variable, inverse
        offsets, scales = variable.weight.offsets, variable.weight.scales
        self._momentum = torch.zeros_like(offsets)
        self._row_square = offsets.new_zeros(len(offsets), 1)
        self._scale_momentum = torch.zeros_like(self._row_square if scales is None else scales)
        self._scale_square = torch.zeros_like(self._scale_momentum)
        left = variable.weight.left
        self._left_momentum = None if left is None else torch.zeros_like(left)
        self._left_square = None if left is None else torch.zeros_like(left)

    def step_(self, gradient: Tensor, method: KlRounding, count: int, rate: float) -> None:
        """One step from dL/dvalue. `count` counts from 1; `rate` is the schedule's factor."""
        if not bool(torch.isfinite(gradient.sum())):
            return  # a batch on which the model overflows teaches nothing
        weight = self.variable.weight
        by_code, by_scale = weight.gradients(gradient, self.variable.value())
        if self._inverse is not None:
            by_code = (by_code @ self._inverse).float()  # coarse where that is allowed
        keep, recall = method.momentum, method.memory
        started, squared = 1 - keep**count, 1 - recall**count
        self._row_square.mul_(recall).add_(by_code.square().mean(dim=1, keepdim=True), alpha=1 - recall)
        self._momentum.lerp_(by_code, 1 - keep)
        size = (self._row_square / squared).sqrt_().clamp_(min=_TINY)
        offsets = self._momentum * (size.reciprocal_() * (method.code_rate * rate / started))
        scales = None
        if by_scale is not None:
            self._scale_momentum.lerp_(by_scale, 1 - keep)
            self._scale_square.mul_(recall).addcmul_(by_scale, by_scale, value=1 - recall)
            size = (self._scale_square / squared).sqrt_().clamp_(min=_TINY)
            scales = self._scale_momentum / size * (method.scale_rate * rate / started)
        weight.move_(offsets, scales)
        self._move_left_(gradient, method, count, rate)
        self.variable.write_()

    def _move_left_(self, gradient: Tensor, method: KlRounding, count: int, rate: float) -> None:
        """Adam's rule for the left factor of a product of low rank."""
        weight, mean, square = self.variable.weight, self._left_momentum, self._left_square
        found = weight.left_gradient(gradient)
        if found is None or weight.left is None or mean is None or square is None:
            return
        mean.lerp_(found, 1 - method.momentum)
        square.mul_(method.memory).addcmul_(found, found, value=1 - method.memory)
        size = (square / (1 - method.memory**count)).sqrt_().clamp_(min=_TINY)
        pace = method.left_rate * rate * weight.left_unit() / (1 - method.momentum**count)
        weight.left.sub_(mean / size * pace)


def _inverse_hessians(stream: ModelStream, block: nn.Module, wanted: Sequence[str], method: KlRounding) -> _Inverses:
    """(H + damping * mean diagonal)^-1 of every wanted site's inputs in the block that the stream stands at."""
    modules = site_modules(block, stream.layout, stream.block_index)
    chosen = {name: modules[name] for name in wanted}
    if not chosen:
        return {}
    hessians = collect_block_hessians(stream, block, chosen, coarse=method.coarse_products)
    made: _Inverses = {}
    found: _Inverses = {}
    for name in chosen:
        if hessians.has(name):
            leader = hessians.leader[name]
            if leader not in made:
                made[leader] = _damped_inverse(hessians.hessian(leader), method.damping)
            found[name] = made[leader]
    return found


def _damped_inverse(hessian: Tensor, damping: float) -> Tensor | None:
    """None where the Hessian is not finite or has no live input: such a site is moved by its plain gradient."""
    mean = float(hessian.diagonal().mean())
    if not math.isfinite(mean) or mean <= 0:
        return None
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean)
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else torch.cholesky_inverse(factor)


def _load_blocks(stream: ModelStream) -> list[nn.Module]:
    """Private float32 copies of all blocks; the stream stays where it is."""
    blocks: list[nn.Module] = []
    for index in range(stream.layout.block_count):
        stream.block_index = index
        blocks.append(stream.load_block())
    stream.block_index = 0
    return blocks


class _WholeModel:
    def __init__(
        self, model: LoadedModel, start: QuantizedSource, method: KlRounding, learned: TokenSet, held: TokenSet
    ) -> None:
        self._model, self._method, self._start = model, method, start
        self._learned = FollowedText(model, start, learned, method.batch_sequences)
        self._held = FollowedText(model, start, held, method.batch_sequences)
        self._originals = _load_blocks(self._learned.original)
        self._blocks: list[nn.Module] = []
        self._states: list[list[_State]] = []
        survey = ModelStream(model, _some(learned), weights=start, batch_size=method.batch_sequences)
        for index in range(model.layout.block_count):
            block = survey.load_block()
            self._blocks.append(block)
            sites = [site.name for site in model.layout.sites if site.block_index == index]
            quantized = [name for name in sites if isinstance(start.quantized(name), Learnable)]
            self._states.append(self._states_of(block, _inverse_hessians(survey, block, quantized, method), quantized))
            with coarse_products(method.coarse_products):
                survey.advance(block)
        with coarse_products(method.coarse_products):
            self._distance = StateDistance(self._learned, self._originals)
        stream = self._learned.stream
        width = stream.hidden[0].shape[-1]
        tokens = stream.hidden[0].shape[0] * stream.hidden[0].shape[1]
        kept = 4 * tokens * width * _ACTIVATIONS_PER_WIDTH * len(self._blocks)
        self._recomputes = kept > _ACTIVATION_BYTES

    def _states_of(self, block: nn.Module, inverses: _Inverses, quantized: Sequence[str]) -> list[_State]:
        found: list[_State] = []
        for name in quantized:
            site, stored = self._model.layout.site_by_name[name], self._start.quantized(name)
            assert isinstance(stored, Learnable) and site.block_index is not None
            module = site_modules(block, self._model.layout, site.block_index)[name]
            original = read_weight(self._model.module.get_submodule(name), site).detach()
            variable = Variable(site, module, LearnedWeight(stored, original, reach=self._method.reach))
            found.append(_State(variable, inverses.get(name)))
        return found

    def run(self, progress: Callable[[int, int], None] | None) -> Learned:
        """All steps; the best iterate on the held-out sequences."""
        method, variables = self._method, [state.variable for states in self._states for state in states]
        first = best = self._held_out_divergence()
        best_step, chosen = 0, {v.site.name: v.weight.start for v in variables}
        generator = torch.Generator().manual_seed(method.seed)
        order: list[int] = []
        looks = {math.ceil(method.steps * (look + 1) / method.checks) for look in range(method.checks)}
        for step in range(1, method.steps + 1 if variables else 1):
            if not order:
                order = torch.randperm(len(self._learned.stream.batches), generator=generator).tolist()
            self._step(order.pop(), step)
            if step in looks:
                found = self._held_out_divergence()
                if found < best:  # False where it is NaN
                    best, best_step = found, step
                    chosen = {v.site.name: v.weight.stored() for v in variables}
            if progress is not None:
                progress(step, method.steps)
        return Learned(chosen, first, best, best_step)

    def _step(self, batch: int, step: int) -> None:
        method = self._method
        warm = max(1.0, method.steps / 20)
        rate = min(1.0, step / warm) * (1 - (step - 1) / method.steps)
        stream = self._learned.stream
        with coarse_products(method.coarse_products):
            followed = self._learned.follow(batch, self._originals)
            inputs, outputs = self._forward(batch)
            gradient = self._learned.judge.gradient(batch, outputs[-1].detach())
            mask = stream.batches[batch].attention_mask
            for index in range(len(self._blocks) - 1, -1, -1):
                states, output = self._states[index], outputs.pop()
                pull = self._distance.gradient(index, mask, output.detach(), followed.pop())
                gradient = gradient + method.state_weight * pull
                variables = [state.variable for state in states]
                with torch.enable_grad(), learning_of(variables):
                    if self._recomputes:
                        output = stream.run_block_at(self._blocks[index], index, batch, inputs[index])
                    found, onward = gradients_of(output, variables, inputs[index], gradient)
                for state, by_value in zip(states, found, strict=True):
                    state.step_(by_value, method, step, rate)
                assert onward is not None
                gradient = onward

    def _forward(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of every block; outputs carry their block's graph unless blocks are run again later."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hidden = self._learned.stream.hidden[batch]
        for index, block in enumerate(self._blocks):
            inputs.append(hidden.detach().requires_grad_(True))
            variables = [state.variable for state in self._states[index]]
            with torch.set_grad_enabled(not self._recomputes), learning_of(variables):
                hidden = self._learned.stream.run_block_at(block, index, batch, inputs[-1])
            outputs.append(hidden)
        return inputs, outputs

    @torch.no_grad()
    def _held_out_divergence(self) -> float:
        stream, total, count = self._held.stream, 0.0, 0
        for batch, hidden in enumerate(stream.hidden):
            with coarse_products(self._method.coarse_products):
                self._held.follow(batch, self._originals)
                for index, block in enumerate(self._blocks):
                    hidden = stream.run_block_at(block, index, batch, hidden)
            found, judged = self._held.judge.divergence(batch, hidden)
            total, count = total + found, count + judged
        return total / max(1, count)
