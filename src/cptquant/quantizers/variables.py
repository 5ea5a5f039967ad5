"""A quantized site as a variable inside a block that runs: its module, its codes, its gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cptquant.core.layout import Site
from cptquant.models.stream import read_weight, write_weight_
from cptquant.quantizers.learned_codes import LearnedWeight


@dataclass
class Variable:
    """One learned site.

    Attributes:
        module: in a private float32 copy of the block. weight: codes and scales.
    """

    site: Site
    module: nn.Module
    weight: LearnedWeight

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight, as the framework stores it."""
        return cast(nn.Parameter, self.module.weight)

    def value(self) -> Tensor:
        """What stands in the module, float32 (out_features, in_features)."""
        return read_weight(self.module, self.site).detach()

    def write_(self) -> None:
        """Put the present codes and scales into the module."""
        write_weight_(self.module, self.site, self.weight.value())


def gradients_of(
    output: Tensor, variables: Sequence[Variable], inputs: Tensor | None = None, seed: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of <seed, output> with respect to the sites' values, (out_features, in_features), and to the inputs."""
    wanted = [variable.parameter for variable in variables] + ([] if inputs is None else [inputs])
    found = list(torch.autograd.grad(output, wanted, seed))
    by_input = None if inputs is None else found.pop()
    turned = [g.t() if v.site.transposed else g for g, v in zip(found, variables, strict=True)]
    return turned, by_input


@contextmanager
def learning_of(variables: Sequence[Variable]) -> Iterator[None]:
    """Within a `with`, the sites' parameters take part in autograd."""
    for variable in variables:
        variable.parameter.requires_grad_(True)
    try:
        yield
    finally:
        for variable in variables:
            variable.parameter.requires_grad_(False)
