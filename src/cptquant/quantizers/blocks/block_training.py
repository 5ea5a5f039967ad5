"""One block, trained against the original's block: what every block-wise method has in common.

Adam with a rate for each kind of parameter, rising over the first steps, then falling along a cosine; batches in random
order; held-out sequences choose the iterate, and the start is among what they choose from.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cptquant.core.layout import Site
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.open_block import Moving, OpenBlock

_TINY = 1e-30


@dataclass(frozen=True)
class Pace:
    """How long a block is trained, and how that is judged.

    Attributes:
        epochs: passes over the text, a fraction of one allowed. batch_sequences: sequences a step.
        warm_up: share of the steps over which rates rise. last_rate: where the cosine ends, of the first rate.
        memories: Adam's, of the mean and of the mean square.
        held_out: share of the person's sequences that choose the iterate, at least one. checks: looks at them.
        coarse_products: let products round their factors to bfloat16 where that is faster.
        seed: of the order of the batches.
    """

    epochs: float = 2.0
    batch_sequences: int = 4
    warm_up: float = 0.05
    last_rate: float = 0.05
    memories: tuple[float, float] = (0.9, 0.95)
    held_out: float = 1 / 8
    checks: int = 8
    coarse_products: bool = True
    seed: int = 0

    def factor(self, step: int, steps: int) -> float:
        """Of the rates at a step, counted from 1."""
        warm = max(1.0, self.warm_up * steps)
        share = min(1.0, max(0.0, (step - warm) / max(1.0, steps - warm)))
        cosine = self.last_rate + (1 - self.last_rate) * 0.5 * (1 + math.cos(math.pi * share))
        return min(1.0, step / warm) * cosine


@dataclass(frozen=True)
class Targets:
    """What a batch's outputs are compared with, (b, T, width).

    Attributes:
        followed: the original block on the original stream.
        alike: the original block on the quantized stream; None unless the method asks for it.
        mask: bool (b, T, 1), real tokens.
    """

    followed: Tensor
    alike: Tensor | None
    mask: Tensor


class BlockMethod(Protocol):
    """What moves inside a block, and what for."""

    @property
    def pace(self) -> Pace:
        """Of the loop."""
        ...

    @property
    def flag(self) -> str:
        """As `--method` spells it."""
        ...

    @property
    def wants_alike(self) -> bool:
        """Whether `Targets.alike` is needed."""
        ...

    def check(self, site: Site, stored: StoredWeight) -> None:
        """Whether a site in this form can be trained; looked at for all sites before anything is done.

        Raises:
            UserError: it cannot.
        """
        ...

    def open_(self, block: OpenBlock) -> Moving:
        """Make the block trainable."""
        ...

    def loss(self, output: Tensor, targets: Targets) -> Tensor:
        """Of one batch, a scalar; differentiable in `output`."""
        ...


def relative_error(
    output: Tensor,  # (b, T, width)
    target: Tensor,  # (b, T, width)
    mask: Tensor,  # bool (b, T, 1)
) -> Tensor:
    """||output - target||^2 / ||target||^2 over the real tokens, a scalar."""
    power = (target * mask).square().sum().clamp(min=_TINY)
    return ((output - target) * mask).square().sum() / power


class SideBySide:
    """Sequences on which the original and the quantized model run side by side, a block at a time."""

    def __init__(self, model: LoadedModel, weights: WeightSource, tokens: TokenSet, pace: Pace) -> None:
        self.original = ModelStream(model, tokens, batch_size=pace.batch_sequences)
        self.stream = ModelStream(model, tokens, weights=weights, batch_size=pace.batch_sequences)
        self._coarse = pace.coarse_products
        self._masks = [batch.attention_mask.bool().unsqueeze(-1) for batch in self.stream.batches]
        self._alike: list[Tensor] | None = None

    @torch.no_grad()
    def follow(self, original: nn.Module, *, alike: bool) -> None:
        """Run the original's block on its own stream and, where asked, on the quantized one."""
        with coarse_products(self._coarse):
            if alike:
                hidden = self.stream.hidden
                self._alike = [self.stream.run_block(original, index, hidden[index]) for index in range(len(hidden))]
            self.original.advance(original)

    def advance(self, block: nn.Module) -> None:
        """The quantized stream steps to the next block."""
        with coarse_products(self._coarse):
            self.stream.advance(block)

    def run(self, block: nn.Module, batch: int) -> tuple[Tensor, Targets]:
        """The block's output for a batch, and what to compare it with."""
        with coarse_products(self._coarse):
            output = self.stream.run_block(block, batch, self.stream.hidden[batch])
        alike = None if self._alike is None else self._alike[batch]
        return output, Targets(self.original.hidden[batch], alike, self._masks[batch])

    @torch.no_grad()
    def error(self, block: nn.Module) -> float:
        """||F_q(x_q) - F(x)||^2 / ||F(x)||^2 over the real tokens."""
        error = power = 0.0
        for batch in range(len(self.stream.batches)):
            output, targets = self.run(block, batch)
            error += float(((output - targets.followed) * targets.mask).square().sum(dtype=torch.float64))
            power += float((targets.followed * targets.mask).square().sum(dtype=torch.float64))
        return error / max(power, _TINY)


@dataclass(frozen=True)
class FinishedBlock:
    """What training a block gives.

    Attributes:
        weights: its quantized sites; the start's own objects where they were kept.
        kept: its norms and biases that moved, by name, in the storage dtype.
    """

    weights: Mapping[str, StoredWeight]
    kept: Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockLook:
    """What became of a block.

    Attributes:
        block_index: which. steps: that were to be made. moved: numbers that were trained.
        held_out_start: the start's relative squared error of the block's output on the held-out sequences.
        held_out: the same by step; at 0 as the method sets out, which need not be the start (clipping rounds anew).
        best_step: the iterate that was taken; None where the start was kept.
        stopped: why training ended early; "" where it did not.
    """

    block_index: int
    steps: int
    moved: int
    held_out_start: float
    held_out: Mapping[int, float]
    best_step: int | None
    stopped: str

    @property
    def held_out_end(self) -> float:
        """Of what was taken."""
        return self.held_out_start if self.best_step is None else self.held_out[self.best_step]

    @property
    def sentence(self) -> str:
        """For people."""
        error = f"block {self.block_index}: error on held-out text {self.held_out_start:.4g}"
        if self.best_step is None:
            told = f"{error}; no step was better, the start was kept" if self.steps else f"{error}; nothing to train"
        else:
            told = f"{error} -> {self.held_out_end:.4g} at step {self.best_step} of {self.steps}"
        return f"{told}; {self.stopped}" if self.stopped else told


class _NotFinite(Exception):
    """A loss, a gradient or an error is no number."""


def train_block(
    opened: OpenBlock,
    method: BlockMethod,
    learn: SideBySide,
    judge: SideBySide,
    steps: int,
    progress: Callable[[int], None],
) -> tuple[FinishedBlock, BlockLook]:
    """Train one block; its module is left with the result's weights in place.

    Args:
        opened: with the start's weights. learn, judge: text to learn on and text that chooses, both standing at this
            block. steps: of one batch each. progress: called with the steps done.
    """
    first = judge.error(opened.module)
    moving = method.open_(opened)
    training = _Training(opened, method, moving, judge, first)
    if not moving.parameters():
        steps = 0
    every = {math.ceil(steps * (look + 1) / method.pace.checks) for look in range(method.pace.checks)}
    step, stopped = 0, ""
    try:
        if steps:
            training.look(0)
        for step, batch in enumerate(_batches(steps, len(learn.stream.batches), opened.index, method.pace.seed), 1):
            training.step(learn, batch, method.pace.factor(step, steps))
            if step in every:
                training.look(step)
            progress(step)
    except _NotFinite as error:
        stopped = f"training stopped at step {step} of {steps}: {error}"
    opened.close_(training.best.weights, training.best.kept)
    look = BlockLook(opened.index, steps, moving.size, first, training.errors, training.best_step, stopped)
    return training.best, look


def _batches(steps: int, count: int, block_index: int, seed: int) -> Iterator[int]:
    """Every batch once in random order, then all anew; a block's order depends on no other block's."""
    generator = torch.Generator().manual_seed((seed << 16) + block_index)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(count, generator=generator).tolist()
        yield order.pop()


class _Training:
    def __init__(self, opened: OpenBlock, method: BlockMethod, moving: Moving, judge: SideBySide, first: float) -> None:
        self._block, self._method, self._moving, self._judge = opened.module, method, moving, judge
        self._optimizer = None
        if moving.parameters():
            groups = [{"params": group.parameters, "lr": group.rate} for group in moving.groups]
            self._optimizer = torch.optim.Adam(groups, betas=method.pace.memories, eps=1e-12)
        self.best, self.best_step = FinishedBlock(dict(opened.starts), moving.kept()), None
        self.errors: dict[int, float] = {}
        self._least = first

    def step(self, learn: SideBySide, batch: int, factor: float) -> None:
        """One step of Adam.

        Raises:
            _NotFinite: the loss or a gradient is no number; nothing has moved.
        """
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            output, targets = learn.run(self._block, batch)
            loss = self._method.loss(output, targets)
        if not bool(torch.isfinite(loss)):
            raise _NotFinite(f"the loss is {float(loss.detach())}")
        loss.backward()
        for parameter in self._moving.parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.sum())):
                raise _NotFinite("a gradient is not finite")
        for group, made in zip(self._moving.groups, self._optimizer.param_groups, strict=True):
            made["lr"] = group.rate * factor
        self._optimizer.step()

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Judge the present iterate as it would be written.

        Raises:
            _NotFinite: the error is no number.
        """
        with self._moving.rounded():
            self.errors[step] = error = self._judge.error(self._block)
            if error < self._least:
                self._least, self.best_step = error, step
                self.best = FinishedBlock({**self.best.weights, **self._moving.stored()}, self._moving.kept())
        if not math.isfinite(error):
            raise _NotFinite(f"the error on held-out text is {error}")
