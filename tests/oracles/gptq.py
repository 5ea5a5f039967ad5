"""GPTQ the slow way: float64, column by column, the inverse Hessian kept explicitly (arXiv 2210.17323, eq. 2 and 3).

After rounding column i with error e, the remaining columns move by -e / [H^-1]_ii * [H^-1]_i,: and column i is removed
from the inverse by one step of Gaussian elimination. No factorisation, no blocks, nothing shared with the code tested.
"""

import numpy as np


def minmax_scale(group, low: int, high: int, symmetric: bool):
    """Scale and zero point of one group of weights, without clipping; scale in float16 as it is stored."""
    if not symmetric:
        top, bottom = max(group.max(), 0.0), min(group.min(), 0.0)
        scale = float(np.float16((top - bottom) / (high - low))) or 1.0
        zero = np.clip(np.round(low - bottom / ((top - bottom) / (high - low))), low, high) if top > bottom else 0.0
        return scale, zero
    upright = max(group.max() / high, group.min() / low, 0.0)
    turned = max(group.max() / -low, -group.min() / high, 0.0)
    scale = -turned if turned < upright else upright
    return float(np.float16(scale)) or 1.0, 0.0


def gptq(weight, hessian, code_bits: int, group_size: int, damping: float, *, symmetric: bool = True, order=None):
    """Quantize `weight` (out, in) under `hessian` (in, in), both float64.

    With `order` given, columns are rounded in that order and every group's scale is fitted beforehand on the original
    weights; without, columns go from left to right and a group is fitted when the loop enters it.

    Returns:
        codes (out, in), values (out, in).
    """
    rows, columns = weight.shape
    low, high = -(2 ** (code_bits - 1)), 2 ** (code_bits - 1) - 1
    current = weight.astype(np.float64).copy()
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns))
    codes, values = np.zeros_like(current), np.zeros_like(current)
    grids: dict[int, list] = {}
    if order is not None:
        for group in range(-(-columns // group_size)):
            part = current[:, group * group_size : (group + 1) * group_size]
            grids[group] = [minmax_scale(row, low, high, symmetric) for row in part]
    remaining = list(range(columns)) if order is None else list(order)
    while remaining:
        i = remaining.pop(0)
        group = i // group_size
        if group not in grids:
            part = current[:, i : i + group_size]
            grids[group] = [minmax_scale(row, low, high, symmetric) for row in part]
        for row in range(rows):
            scale, zero = grids[group][row]
            codes[row, i] = np.clip(np.round(current[row, i] / scale + zero), low, high)
            values[row, i] = (codes[row, i] - zero) * scale
        error = (current[:, i] - values[:, i]) / inverse[i, i]
        current[:, remaining] -= np.outer(error, inverse[i, remaining])
        inverse = inverse - np.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return codes, values
