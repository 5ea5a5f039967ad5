"""Learned rounding of the whole model on the divergence of its outputs.

GPTQ and SignRound reproduce each layer's or block's output and take every direction of it for equally important. Here
the codes and scales of all blocks' sites are learned together on what is judged in the end,

    minimise over v, s   mean over calibration tokens of KL(p_original || p(v, s)),     |v| <= reach

(learned_codes.py has the variables and their straight-through gradients; EfficientQAT, arXiv 2407.11062, section 3.3,
learns the scales alone on the task's loss, PV-Tuning, arXiv 2405.14852, codes and scales by turns). Nothing else of the
model is touched: no norm, no bias.

A code changes the weight by a whole step, so noise must not flip it. Sign steps (SignRound) and Adam move every offset
equally fast, sure of its gradient or not; on the model's own divergence that made things worse in our tests. The step
here keeps the proportions inside a row: with m the momentum of dL/dv,

    v <- v - rate * m / sqrt(mean over the row of (dL/dv)^2),

so the codes with the most to gain flip first, and gradients of the rest are taken anew with those in place (PV-Tuning's
"change few codes at a time", without sorting). Scales are few and each sums a whole group's gradient; they move by
Adam's rule in relative steps.

Some calibration sequences are held out of learning. They choose the best iterate and decide at the end: where none is
better than the start, the start is kept and the records say so.

Memory: beside model and block copies in float32 (4 bytes a weight), 9 bytes a weight for offsets, momentum and codes, 2
for the best iterate; the originals' last hidden states; activations of one batch, of all blocks where they fit
`_ACTIVATION_BYTES`, else inputs of blocks only, which are then run twice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cptquant.core.errors import DataError
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, QuantizedSource, read_weight, site_modules
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.learned_codes import LearnedWeight
from cptquant.quantizers.output_divergence import OutputDivergence, mask_for_task
from cptquant.quantizers.variables import Variable, gradients_of, learning_of

_ACTIVATION_BYTES = 1 << 30
"""Activations of a batch that are kept for the way back; above it, blocks are run again."""
_ACTIVATIONS_PER_WIDTH = 40
"""Float32 numbers a block keeps for each of a token's `width` numbers, roughly."""
_TINY = 1e-30


@dataclass(frozen=True)
class KlRounding:
    """Hyper-parameters.

    Attributes:
        start: makes the solution learning starts from.
        steps: gradient steps. batch_sequences: sequences in each.
        code_rate: step of an offset whose gradient has its row's root mean square, in steps of the grid.
        scale_rate: relative step of a scale. Both rise over the first twentieth and then fall linearly to 0.
        momentum, memory: of the gradient's mean and of its mean square, per step.
        reach: largest offset from the start's code, in steps of the grid.
        held_out: share of the calibration sequences kept for choosing the iterate (at least one batch).
        checks: how often the held-out sequences are looked at.
        seed: of the order of the batches.
    """

    start: Gptq = field(default_factory=Gptq)
    steps: int = 120
    batch_sequences: int = 8
    code_rate: float = 0.005
    scale_rate: float = 3e-4
    momentum: float = 0.9
    memory: float = 0.95
    reach: float = 1.0
    held_out: float = 1 / 16
    checks: int = 6
    seed: int = 0

    @property
    def coarse_products(self) -> bool:
        """As of the start."""
        return self.start.coarse_products

    @property
    def clip_search(self) -> bool:
        """As of the start."""
        return self.start.clip_search


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
            f"--quantizer kl-rounding needs at least 2 calibration sequences, got {tokens.sequence_count}: one to learn "
            "on, one to judge by; raise --calibration-sequences"
        )
    held, learned = _split(tokens, method)
    return _WholeModel(model, start, method, learned, held).run(progress)


def _split(tokens: TokenSet, method: KlRounding) -> tuple[TokenSet, TokenSet]:
    """(held out, learned on); the held-out sequences are spread evenly over the set."""
    count = tokens.sequence_count
    held = min(max(1, round(method.held_out * count)), count // 2)
    chosen = torch.linspace(0, count - 1, held + 2)[1:-1].round().long() if held < count - 1 else torch.tensor([0])
    rest = torch.ones(count, dtype=torch.bool)
    rest[chosen] = False
    return tokens.subset(chosen), tokens.subset(rest.nonzero().flatten())


class _Text:
    """Tokens with a stream of the changed model and the judge of its outputs."""

    def __init__(
        self, model: LoadedModel, weights: QuantizedSource, tokens: TokenSet, batch: int, coarse: bool
    ) -> None:
        seen, judged = mask_for_task(model, tokens)
        original = ModelStream(model, seen, batch_size=batch)
        with coarse_products(coarse):
            while original.block_index < model.layout.block_count:
                original.advance(original.load_block())
        self.stream = ModelStream(model, seen, weights=weights, batch_size=batch)
        self.judge = OutputDivergence(original, self.stream, original.hidden, judged)


class _State:
    """A site that is learned, with the moments of its gradient."""

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        offsets, scales = variable.weight.offsets, variable.weight.scales
        self._momentum = torch.zeros_like(offsets)
        self._row_square = offsets.new_zeros(len(offsets), 1)
        self._scale_momentum = torch.zeros_like(self._row_square if scales is None else scales)
        self._scale_square = torch.zeros_like(self._scale_momentum)

    def step_(self, gradient: Tensor, method: KlRounding, count: int, rate: float) -> None:
        """One step from dL/dvalue. `count` counts from 1; `rate` is the schedule's factor."""
        if not bool(torch.isfinite(gradient).all()):
            return  # a batch on which the model overflows teaches nothing
        weight = self.variable.weight
        by_code, by_scale = weight.gradients(gradient, self.variable.value())
        keep, recall = method.momentum, method.memory
        started, squared = 1 - keep**count, 1 - recall**count
        self._row_square.mul_(recall).add_(by_code.square().mean(dim=1, keepdim=True), alpha=1 - recall)
        self._momentum.lerp_(by_code, 1 - keep)
        size = (self._row_square / squared).sqrt_().clamp_(min=_TINY)
        offsets = self._momentum * (method.code_rate * rate / started / size)
        scales = None
        if by_scale is not None:
            self._scale_momentum.lerp_(by_scale, 1 - keep)
            self._scale_square.mul_(recall).addcmul_(by_scale, by_scale, value=1 - recall)
            size = (self._scale_square / squared).sqrt_().clamp_(min=_TINY)
            scales = self._scale_momentum / size * (method.scale_rate * rate / started)
        weight.move_(offsets, scales)
        self.variable.write_()


class _WholeModel:
    def __init__(
        self, model: LoadedModel, start: QuantizedSource, method: KlRounding, learned: TokenSet, held: TokenSet
    ) -> None:
        self._model, self._method, self._start = model, method, start
        coarse, batch = method.coarse_products, method.batch_sequences
        self._learned = _Text(model, start, learned, batch, coarse)
        self._held = _Text(model, start, held, batch, coarse)
        self._blocks: list[nn.Module] = []
        self._states: list[list[_State]] = []
        stream = self._learned.stream
        for index in range(model.layout.block_count):
            stream.block_index = index
            block = stream.load_block()
            self._blocks.append(block)
            self._states.append(self._states_of(block, index))
        stream.block_index = 0
        width = stream.hidden[0].shape[-1]
        tokens = stream.hidden[0].shape[0] * stream.hidden[0].shape[1]
        kept = 4 * tokens * width * _ACTIVATIONS_PER_WIDTH * len(self._blocks)
        self._recomputes = kept > _ACTIVATION_BYTES

    def _states_of(self, block: nn.Module, index: int) -> list[_State]:
        found: list[_State] = []
        for name, module in site_modules(block, self._model.layout, index).items():
            stored = self._start.quantized(name)
            if stored is not None:
                site = self._model.layout.site_by_name[name]
                original = read_weight(self._model.module.get_submodule(name), site).detach()
                found.append(_State(Variable(site, module, LearnedWeight(stored, original, reach=self._method.reach))))
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
            inputs, outputs = self._forward(batch)
            gradient = self._learned.judge.gradient(batch, outputs[-1].detach())
            for index in range(len(self._blocks) - 1, -1, -1):
                states, output = self._states[index], outputs.pop()
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
                for index, block in enumerate(self._blocks):
                    hidden = stream.run_block_at(block, index, batch, hidden)
            found, judged = self._held.judge.divergence(batch, hidden)
            total, count = total + found, count + judged
        return total / max(1, count)
