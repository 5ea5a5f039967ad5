"""Salience of weights (SliM-LLM, arXiv 2405.14917, definition 3.1): what setting one weight wrong costs the output.

    delta_ij = w_ij^2 / U_jj^2,   H^-1 = U' U,  U upper triangular

U_jj^2 is the conditional variance [(H_{j:,j:})^-1]_jj: what is left of column j once the later columns make up for it.
The paper writes w^2 / [H^-1]_jj^2; its code divides by the square of the Cholesky diagonal, which is the quantity of
OBS and SparseGPT, and so do we. Damping of H is relative to its mean diagonal (the code's is 0.01 absolute).
"""

import torch
from torch import Tensor


def salience(
    weight: Tensor,  # (out_features, in_features)
    pivots: Tensor,  # (in_features,) float32: 1 / U_jj^2, `HessianFactor.pivots`
) -> Tensor:
    """delta, float32 (out_features, in_features)."""
    return weight.float().square() * pivots


def group_salience(
    weight: Tensor,  # (out_features, in_features)
    pivots: Tensor,  # (in_features,) float32
    group_columns: int,
) -> Tensor:
    """Mean salience of each group of consecutive columns, float32 (groups,); the last group may be shorter."""
    columns = salience(weight, pivots).mean(dim=0)
    return torch.stack([part.mean() for part in columns.split(group_columns)])


def salient_mask(
    values: Tensor,  # (out_features, group columns) float32: saliences of one group
    sigmas: float,
) -> Tensor:
    """bool, same shape: more than so many standard deviations above the group's mean."""
    return values > values.mean() + sigmas * values.std(correction=0)
