"""What GPTQ's loop needs of a Hessian: damped, and its Cholesky factor in the order of the columns.

U with H^-1 = U' U is found as R^-1 with H = R R', R upper triangular (the Cholesky factor of H with its axes reversed):
H itself is never inverted and factored again, which is cheaper and loses fewer digits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.errors import DataError
from cptquant.core.manifest import SiteOutcome

_LEAST_DAMPING = 1e-6
"""First damping tried when the asked one is 0 and fails."""
_PIVOT_TOLERANCE = 8.0
"""A pivot below this many float32 roundings of the mean diagonal, per column, counts as zero."""


@dataclass(frozen=True)
class HessianFactor:
    """What the loop needs of the damped Hessian, in the order in which the columns are rounded.

    Attributes:
        order: int64 (in_features,), a permutation of the columns.
        feedback: U_kj / U_kk - I, float32 (in_features, in_features), strictly upper triangular.
        damped: float32 (in_features, in_features), the damped Hessian, in original order.
        importance: float32 (in_features,), its diagonal.
        pivots: float32 (in_features,), 1 / U_kk^2: what column k alone adds to the error once all later columns have
            made up for it as well as they can.
        damping: fraction of the mean diagonal really added. outcome: how the factorisation went.
    """

    order: Tensor
    feedback: Tensor
    damped: Tensor
    importance: Tensor
    pivots: Tensor
    damping: float
    outcome: SiteOutcome


def factor_hessian(
    hessian: Tensor,  # (in_features, in_features) float32
    damping: float,
    *,
    by_activation: bool,
) -> HessianFactor:
    """Damp a copy of the Hessian and factor it, raising the damping until that works.

    Raises:
        DataError: the Hessian is NaN or infinite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise DataError(
            "the calibration inputs of a layer are NaN or infinite: the model overflows on this text; "
            "use other --calibration text or a model in a wider dtype"
        )
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else torch.arange(len(diagonal))
    tried = damping
    while True:
        damped = hessian[order][:, order] if by_activation else hessian.clone()
        damped.diagonal().add_(tried * mean)
        damped.diagonal()[dead[order]] = mean
        upper = _upper_factor(damped, mean)
        if upper is not None:
            break
        # Diagonal dominance is reached at damping = in_features, so this ends.
        tried = max(10 * tried, _LEAST_DAMPING)
    outcome = SiteOutcome.DEAD_INPUTS if bool(dead.any()) else SiteOutcome.NOMINAL
    if tried > damping:
        outcome = SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED
    pivots = upper.diagonal().square()
    # In place from here on: a Hessian of 10,000 inputs is 400 MB.
    feedback = torch.linalg.solve_triangular(upper, torch.eye(len(diagonal), device=hessian.device), upper=True)
    del upper
    feedback.div_(feedback.diagonal().clone()[:, None]).triu_(1)
    if by_activation:
        inverse = torch.argsort(order)
        damped = damped[inverse][:, inverse]
    return HessianFactor(order, feedback, damped, damped.diagonal(), pivots, tried, outcome)


def _upper_factor(damped: Tensor, mean: float) -> Tensor | None:
    """Upper triangular R with R R' = damped, or None if that is not safely positive definite."""
    least = _PIVOT_TOLERANCE * torch.finfo(torch.float32).eps * damped.shape[0] * mean
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) or float(lower.diagonal().square().min()) < least:
        return None
    return lower.flip(0, 1)
