"""Adam whose rates for latent weights are in steps of the grid.

What a rate means must not depend on how large a layer's weights are: a latent weight that moves by half a step changes
its code, in every layer and group. So the update of a latent weight is Adam's, times the present step of its group

    w <- w - rate s mean / sqrt(mean square)

(Adam on w / s, up to the movement of s). Gradients turned by the inverse Hessian of the layer's inputs, by which
`quantizers/kl_rounding.py` learns twice as fast in its 120 steps, made no difference over 400 (docs/log.md).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_TINY = 1e-30

Unit = Callable[[], Tensor]
"""The present steps of the grid, positive, broadcastable against the latent weight."""


class GridAdam(torch.optim.Optimizer):
    """One group for each rate (`lr`).

    Args:
        groups: with `params` and `lr`. units: parameter -> what a rate of 1 moves; 1 where it is not named.
        momentum, memory: of the gradient's mean and its mean square, per step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        units: Mapping[nn.Parameter, Unit],
        *,
        momentum: float = 0.9,
        memory: float = 0.95,
    ) -> None:
        super().__init__(groups, {"lr": 1.0, "count": 0})
        self._units, self._momentum, self._memory = units, momentum, memory

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            group["count"] += 1
            rate = group["lr"] / (1 - self._momentum ** group["count"])
            correction = (1 - self._memory ** group["count"]) ** 0.5
            for parameter in cast(list[nn.Parameter], group["params"]):
                if parameter.grad is None:
                    continue
                mean, square = self._moments(parameter, parameter.grad)
                change = square.sqrt().clamp_(min=_TINY).reciprocal_().mul_(mean)
                unit = self._units.get(parameter)
                if unit is not None:
                    change.mul_(unit())
                parameter.sub_(change, alpha=rate * correction)

    def _moments(self, parameter: nn.Parameter, gradient: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = cast(Tensor, state["mean"]), cast(Tensor, state["square"])
        mean.lerp_(gradient, 1 - self._momentum)
        square.mul_(self._memory).addcmul_(gradient, gradient, value=1 - self._memory)
        return mean, square
