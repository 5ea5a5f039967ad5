"""Slow, readable references: the whole model at once, deep copies, plain autograd, textbook linear algebra."""

import copy

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def logits_of(module: torch.nn.Module, tokens, *, rows=slice(None)) -> Tensor:
    return module(input_ids=tokens.input_ids[rows], attention_mask=tokens.attention_mask[rows]).logits


def summed_loss(module, tokens, row: int) -> Tensor:
    """Sum of the next-token losses of one sequence, or the loss of its label."""
    logits = logits_of(module, tokens, rows=slice(row, row + 1))[0]
    if tokens.labels is not None:
        return functional.cross_entropy(logits, tokens.labels[row])
    real = int(tokens.attention_mask[row].sum())  # padding is on the right
    return functional.cross_entropy(logits[: real - 1], tokens.input_ids[row, 1:real], reduction="sum")


def scored_count(tokens, row: int) -> int:
    return 1 if tokens.labels is not None else int(tokens.attention_mask[row].sum()) - 1


def weight_gradient(module, tokens, row: int, parameter_name: str) -> Tensor:
    """Gradient of one sequence's summed loss, in the parameter's own layout."""
    module = copy.deepcopy(module).float().eval()
    parameter = dict(module.named_parameters())[parameter_name]
    parameter.requires_grad_(True)
    return torch.autograd.grad(summed_loss(module, tokens, row), parameter)[0]


def with_weight(module, parameter_name: str, weight: Tensor):
    changed = copy.deepcopy(module).float().eval()
    with torch.no_grad():
        dict(changed.named_parameters())[parameter_name].copy_(weight)
    return changed


@torch.no_grad()
def kl_per_token(original, changed, tokens) -> float:
    """Mean over all scored positions, in float64."""
    total, count = 0.0, 0
    for row in range(len(tokens.input_ids)):
        first = logits_of(original, tokens, rows=slice(row, row + 1))[0].double().log_softmax(-1)
        second = logits_of(changed, tokens, rows=slice(row, row + 1))[0].double().log_softmax(-1)
        positions = scored_count(tokens, row)
        if tokens.labels is None:
            first, second = first[:positions], second[:positions]
        total += float((first.exp() * (first - second)).sum())
        count += positions
    return total / count


def canonical_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Singular values between orthonormal bases of the centred column spaces (Björck and Golub 1973); no ridge."""
    bases = [np.linalg.qr(view - view.mean(0))[0] for view in (first, second)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def ridged_correlations(first: np.ndarray, second: np.ndarray, ridge: float) -> np.ndarray:
    """Whitening by explicit inverse square roots of C + lambda I, lambda relative to the mean variance."""

    def inverse_root(view: np.ndarray) -> np.ndarray:
        covariance = view.T @ view / (len(view) - 1)
        penalty = ridge * np.trace(covariance) / len(covariance)
        values, vectors = np.linalg.eigh(covariance + penalty * np.eye(len(covariance)))
        return vectors @ np.diag(values**-0.5) @ vectors.T

    first, second = first - first.mean(0), second - second.mean(0)
    cross = first.T @ second / (len(first) - 1)
    return np.linalg.svd(inverse_root(first) @ cross @ inverse_root(second), compute_uv=False)
