"""PV-Tuning's discrete step (arXiv 2405.14852, algorithm 1 and section 3.3) on integer grids: codes without latents.

A step moves only a small share of the codes, those with the largest effect, and moves them all the way; the rest stay
exactly where they are. So steps can be long enough to leave a rounding cell without latent weights that remember where
between two codes a weight stands. The paper re-rounds groups of codes of a learned codebook; on a grid with fixed steps
that is one code up or down, and the expected effect of it is |dL/dw| s to first order:

    m <- momentum m + (1 - momentum) dL/dw;    S = the share of all codes with the largest |m| s
    q <- q - sign(m s) in S

Departures: gradients are averaged over steps (the paper's code uses none for codes and a batch of 128 sequences
instead); the share is taken over the whole model, not of each layer, and falls with the schedule. A code that moved
forgets its average.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.quantizers.blocks.trained_layer import TrainedLinear
from cptquant.recovery.student import Student


@dataclass(frozen=True)
class CodeSteps:
    """Attributes: share: of all codes, at most so many move in a step. momentum: of the gradient's mean."""

    share: float = 1e-3
    momentum: float = 0.9

    def start(self, student: Student) -> Callable[[float], None]:
        """What to call before every optimizer step, with the schedule's factor."""
        layers = [layer for layer in student.layers.values() if layer.log_steps is not None and layer.latent is None]
        for layer in layers:
            layer.follow_codes()
        return _Mover(self, layers)


class _Mover:
    def __init__(self, method: CodeSteps, layers: list[TrainedLinear]) -> None:
        self._method, self._layers = method, layers
        self._count = sum(layer.codes.numel() for layer in layers)

    def __call__(self, factor: float) -> None:
        effects: list[Tensor] = []
        for layer in self._layers:
            effects.append(self._effect(layer))
        wanted = int(self._method.share * factor * self._count)
        if wanted < 1:
            return
        found = torch.cat([effect.abs().flatten() for effect in effects])
        least = found.topk(wanted, sorted=True).values[-1]
        if not bool(least > 0):
            return
        for layer, effect in zip(self._layers, effects, strict=True):
            moved = effect.abs() >= least
            layer.codes.sub_((effect.sign() * moved).to(torch.int8))
            layer.code_momentum.masked_fill_(moved, 0.0)

    def _effect(self, layer: TrainedLinear) -> Tensor:
        """Momentum times step, 0 where the code cannot go; (rows, columns), in stored order."""
        gradient = layer.take_value_gradient()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient, op=torch.distributed.ReduceOp.AVG)
        layer.code_momentum.lerp_(gradient, 1 - self._method.momentum)
        effect = layer.code_momentum * layer.spread(layer.present_steps().detach())
        low, high = layer.limits()
        codes = layer.codes.float()
        stuck = ((effect > 0) & (codes <= low)) | ((effect < 0) & (codes >= high))
        return effect.masked_fill_(stuck, 0.0)
