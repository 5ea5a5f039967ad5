"""Whether the tensors of one matrix are those that its format implies."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat

Expected = Mapping[str, tuple[Sequence[torch.dtype], tuple[int, ...]]]
"""Name -> (dtypes it may have, shape)."""


def check_tensors(tensors: Mapping[str, Tensor], expected: Expected, fmt: QuantFormat, shape: tuple[int, int]) -> None:
    """Compare what was read with what a matrix of that format and shape has.

    Raises:
        ArtifactError: a tensor is missing, or of another shape or dtype.
    """
    for name, (dtypes, wanted) in expected.items():
        found = tensors.get(name)
        if found is None:
            raise ArtifactError(f"tensor {name} of a {fmt.name} matrix {shape} is missing; quantize again")
        if found.dtype not in dtypes or tuple(found.shape) != wanted:
            raise ArtifactError(
                f"tensor {name} of a {fmt.name} matrix {shape} must be {dtypes[0]} {wanted}, found {found.dtype} "
                f"{tuple(found.shape)}; the file does not belong to this plan: quantize again"
            )
