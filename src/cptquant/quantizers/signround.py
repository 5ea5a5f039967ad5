"""SignRound (arXiv 2309.05516): rounding offsets and scales of a block learned on the block's own output.

    minimise over v, s   mean over tokens of || F(x) - F_q(x_q; v, s) ||^2        (the paper's equation 2, per block)
    v <- v - rate * sign(dL/dv)                                                    (its equation 4; algorithm 1)

with F the original block on the original stream, F_q the quantized block on the stream that the quantized blocks before
it produce, straight-through rounding, 200 steps of 8 sequences and a rate of 1/200 that falls linearly to 0.
learned_codes.py has the variables.

What we changed. Codes and scales start from GPTQ's solution instead of plain rounding, so the offset is counted from
GPTQ's code, and scales are learned as relative changes of GPTQ's, at a smaller rate, instead of as two clips of the
min-max range. The best iterate is chosen by the block's error on one batch that is not learned on, not by the loss of
the batch at hand; where no iterate beats the start there, the start is kept and the records say so. Batches are fixed
groups of sequences in random order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cptquant.models.arithmetic import coarse_products
from cptquant.models.stream import ModelStream, write_weight_
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.goes_on import GoesOn
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.variables import Variable, gradients_of, learning_of


@dataclass(frozen=True)
class SignRound(GoesOn):
    """Hyper-parameters.

    Attributes:
        start: makes the solution learning starts from.
        steps: gradient steps a block, of one batch each. code_rate: first step of the offsets, in steps of the grid.
        scale_rate: first relative step of the scales.
        reach: largest offset from the start's code, in steps of the grid.
        checks: how often the held-out batch is looked at. seed: of the order of the batches.
    """

    start: Gptq | GoesOn = field(default_factory=Gptq)
    steps: int = 200
    code_rate: float = 1 / 200
    scale_rate: float = 1 / 2000
    reach: float = 1.0
    checks: int = 10
    seed: int = 0


@dataclass(frozen=True)
class LearnedBlock:
    """What learning a block found.

    Attributes:
        weights: its quantized sites; the start's own objects where they were kept.
        held_out_before, held_out_after: relative squared error of the block's output on the held-out batch.
    """

    weights: dict[str, StoredWeight]
    held_out_before: float
    held_out_after: float


def learn_block(
    block: nn.Module,
    stream: ModelStream,
    targets: Sequence[Tensor],
    variables: Sequence[Variable],
    method: SignRound,
) -> LearnedBlock:
    """Learn the sites of one block.

    Args:
        block: private float32 copy with the start's weights in place; left with the result's in place.
        stream: the quantized stream, standing at this block.
        targets: per batch (b, T, width), the original block's outputs on the original stream.
        variables: the block's quantized sites, in their modules.
    """
    learning = _Learning(block, stream, targets, variables, method)
    first = best = learning.held_out_error()
    chosen: dict[str, StoredWeight] = {variable.site.name: variable.weight.start for variable in variables}
    generator = torch.Generator().manual_seed(method.seed)
    order: list[int] = []
    every = max(1, method.steps // method.checks)
    for step in range(1, method.steps + 1 if variables else 1):
        if not order:
            picks = torch.randperm(len(learning.learned_on), generator=generator).tolist()
            order = [learning.learned_on[pick] for pick in picks]
        learning.step_(order.pop(), 1 - (step - 1) / method.steps)
        if step % every == 0 or step == method.steps:
            error = learning.held_out_error()
            if error < best:  # False where it is NaN
                best = error
                chosen = {variable.site.name: variable.weight.stored() for variable in variables}
    for variable in variables:
        write_weight_(variable.module, variable.site, chosen[variable.site.name].dequantize())
    return LearnedBlock(chosen, first, best)


class _Learning:
    def __init__(
        self,
        block: nn.Module,
        stream: ModelStream,
        targets: Sequence[Tensor],
        variables: Sequence[Variable],
        method: SignRound,
    ) -> None:
        self._block, self._stream, self._targets = block, stream, targets
        self._variables, self._method = variables, method
        batches = list(range(len(stream.batches)))
        self._held = batches[len(batches) // 2]
        self.learned_on = [batch for batch in batches if batch != self._held]
        self._masks = [batch.attention_mask.bool().unsqueeze(-1) for batch in stream.batches]

    def step_(self, batch: int, rate: float) -> None:
        """One sign step on a batch; `rate` is the schedule's factor. Gradients that are not finite move nothing."""
        method = self._method
        with torch.enable_grad(), coarse_products(method.coarse_products), learning_of(self._variables):
            output = self._stream.run_block(self._block, batch, self._stream.hidden[batch])
            loss = ((output - self._targets[batch]) * self._masks[batch]).square().sum()
            gradients, _ = gradients_of(loss, self._variables)
        for variable, gradient in zip(self._variables, gradients, strict=True):
            if not bool(torch.isfinite(gradient.sum())):
                continue
            by_code, by_scale = variable.weight.gradients(gradient, variable.value())
            by_scale = None if by_scale is None else by_scale.sign_().mul_(method.scale_rate * rate)
            variable.weight.move_(by_code.sign_().mul_(method.code_rate * rate), by_scale)
            variable.write_()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """||F - F_q||^2 / ||F||^2 over the real tokens of the held-out batch."""
        target, mask = self._targets[self._held], self._masks[self._held]
        with coarse_products(self._method.coarse_products):
            output = self._stream.run_block(self._block, self._held, self._stream.hidden[self._held])
        error = ((output - target) * mask).square().sum(dtype=torch.float64)
        power = (target * mask).square().sum(dtype=torch.float64)
        return float(error / power.clamp(min=1e-30))
