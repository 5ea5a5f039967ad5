"""Adam for steps and norms; for latent weights a step that knows how strongly the layer's inputs are correlated.

Plain gradients of a layer's weights all pull along the few directions in which its inputs lie: many codes flip at once,
overshoot, and undo what GPTQ compensated. Adam, which moves what it knows nothing about as fast as the rest, first
doubles the loss (opt-mini at 2 bits: KL .142 -> .310 in ten steps). So gradients are turned by the inverse of the
Hessian of the layer's inputs (the input half of K-FAC, arXiv 1503.05671), and keep their proportions inside a row: with
m the momentum of d = (dL/dw s)(H + damping)^-1, s the step of the weight's group,

    w <- w - rate s m / sqrt(mean over the row of d^2)

as `quantizers/kl_rounding.py` moves offsets. Where there is no inverse (training spread over processes that shard the
weights) Adam's rule is what is left.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_TINY = 1e-30

Spread = Callable[[], Tensor]
"""The present steps of the grid, positive, broadcastable against the latent weight."""


class GridOptimizer(torch.optim.Optimizer):
    """One group for each rate (`lr`); a group whose `latent` is true holds latent weights.

    Args:
        groups: with `params`, `lr`, and `latent`. steps: latent weight -> its present steps.
        inverses: latent weight -> (H + damping)^-1, float32 (columns, columns) in stored order.
        momentum, memory: of the gradient's mean and its mean square, per step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        steps: Mapping[nn.Parameter, Spread],
        inverses: Mapping[nn.Parameter, Tensor],
        *,
        momentum: float = 0.9,
        memory: float = 0.95,
    ) -> None:
        super().__init__(groups, {"lr": 1.0, "latent": False, "count": 0})
        self._steps, self._inverses, self._momentum, self._memory = steps, inverses, momentum, memory

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            group["count"] += 1
            for parameter in cast(list[nn.Parameter], group["params"]):
                if parameter.grad is None:
                    continue
                if group["latent"]:
                    self._step_latent(parameter, parameter.grad, group)
                else:
                    self._step_adam(parameter, parameter.grad, group, 1.0)

    def _step_latent(self, latent: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        steps, inverse = self._steps[latent](), self._inverses.get(latent)
        direction = gradient * steps
        if inverse is None:
            self._step_adam(latent, direction, group, steps)
            return
        direction = direction @ inverse
        state = self.state[latent]
        if not state:
            state["mean"] = torch.zeros_like(direction)
            state["row_square"] = direction.new_zeros(len(direction), 1)
        mean, square = cast(Tensor, state["mean"]), cast(Tensor, state["row_square"])
        square.mul_(self._memory).add_(direction.square().mean(dim=1, keepdim=True), alpha=1 - self._memory)
        mean.lerp_(direction, 1 - self._momentum)
        size = (square / (1 - self._memory ** group["count"])).sqrt_().clamp_(min=_TINY)
        rate = group["lr"] / (1 - self._momentum ** group["count"])
        latent.sub_(mean * steps * (rate / size))

    def _step_adam(
        self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], unit: Tensor | float
    ) -> None:
        """`unit`: what a rate of 1 moves."""
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = cast(Tensor, state["mean"]), cast(Tensor, state["square"])
        mean.lerp_(gradient, 1 - self._momentum)
        square.mul_(self._memory).addcmul_(gradient, gradient, value=1 - self._memory)
        size = (square / (1 - self._memory ** group["count"])).sqrt_().clamp_(min=_TINY)
        parameter.sub_(mean / size * (unit * (group["lr"] / (1 - self._momentum ** group["count"]))))
