"""Coordinate descent never makes the output error worse, stays on the grid, and stops where nothing is to be gained."""

import pytest
import torch

from cptquant.core.formats import QuantFormat
from cptquant.quantizers.descent import Rounded, descend_
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from tests.quantizers.test_gptq import output_error, problem


def row_errors(rounded: Rounded, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = (weight - rounded.values()).double()
    return (error * (hessian.double() @ error)).sum(dim=0)


def start(columns: int, rows: int, bits: int, group: int, seed: int) -> tuple[Rounded, torch.Tensor, torch.Tensor]:
    weight, hessian = problem(rows, columns, seed=seed)
    damped = factor_hessian(hessian, 0.01, by_activation=False).damped
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (columns, rows), generator=generator).float()
    scales = torch.rand(-(-columns // group), rows, generator=generator).add(0.2).bfloat16().float()
    limits = torch.full_like(scales, low), torch.full_like(scales, high)
    return Rounded(codes, scales, *limits, group, torch.bfloat16), weight.t().contiguous(), damped


@pytest.mark.parametrize(("columns", "group"), [(64, 16), (70, 16), (33, 33), (40, 1), (96, 64)])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_round_lowers_the_error_of_every_row(columns: int, group: int, bits: int) -> None:
    rounded, weight, hessian = start(columns, 12, bits, group, seed=columns)
    before = row_errors(rounded, weight, hessian)
    for _ in range(4):
        descend_(rounded, weight, hessian, 1)
        after = row_errors(rounded, weight, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert rounded.shifted.min() >= -(2 ** (bits - 1)) and rounded.shifted.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(rounded.shifted, rounded.shifted.round())
    assert torch.equal(rounded.scales, rounded.scales.bfloat16().float()) and (rounded.scales != 0).all()


def test_at_the_end_no_single_code_can_be_improved() -> None:
    rounded, weight, hessian = start(24, 5, bits=3, group=8, seed=1)
    descend_(rounded, weight, hessian, 40)
    best = row_errors(rounded, weight, hessian)
    for column in range(24):
        for code in range(-4, 4):
            changed = rounded.shifted.clone()
            changed[column] = code
            other = Rounded(changed, rounded.scales, rounded.low, rounded.high, rounded.group_columns, torch.bfloat16)
            assert (row_errors(other, weight, hessian) >= best * (1 - 1e-4)).all()


def test_a_scale_that_all_rows_share_is_refitted_for_all() -> None:
    weight, hessian = problem(6, 32)
    damped = factor_hessian(hessian, 0.01, by_activation=False).damped
    codes = (weight.t() / 0.5).round().clamp(-8, 7)
    one = torch.full((1, 1), 0.7)
    shared = Rounded(codes, one.half().float(), one * 0 - 8, one * 0 + 7, 32, torch.half)
    before = row_errors(shared, weight.t(), damped).sum()
    descend_(shared, weight.t().contiguous(), damped, 1)
    assert shared.scales.shape == (1, 1) and 0.4 < shared.scales.item() < 0.6
    assert row_errors(shared, weight.t(), damped).sum() < 0.2 * before


@pytest.mark.parametrize(
    "name", ["int2-g16", "int3-g16-asym", "int3-g24", "int4-channel", "int4-tensor", "int2-tensor-asym"]
)
def test_gptq_gains_by_it(name: str) -> None:
    weight, hessian = problem(32, 96)
    fmt = QuantFormat.parse(name)
    errors = []
    for rounds in (0, 1, 3):
        result = Gptq(descent_rounds=rounds)(weight, hessian, fmt, torch.bfloat16)
        assert result.relative_output_error == pytest.approx(
            output_error(weight, result.weight.dequantize(), hessian), rel=1e-3
        )
        errors.append(result.relative_output_error)
    assert errors[1] < 0.99 * errors[0] and errors[2] <= errors[1]


@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e-3])
def test_codes_stay_codes_whatever_the_size_of_a_group(size: float) -> None:
    """A scale near the smallest number has no finite inverse; zeros among tiny weights must not become NaN."""
    weight, _ = problem(8, 32)
    weight[:, 16:] *= size
    weight[0, 16:] = 0
    damped = torch.eye(32)  # so that what is left of a zero is exactly zero
    scales = torch.full((2, 8), 0.3)
    scales[1] = (0.3 * torch.tensor(size)).bfloat16().float()
    rounded = Rounded(
        (weight.t() / scales.repeat_interleave(16, 0)).round().clamp(-8, 7), scales, scales * 0 - 8, scales * 0 + 7, 16,
        torch.bfloat16,
    )  # fmt: skip
    descend_(rounded, weight.t().contiguous(), damped, 2)
    assert torch.isfinite(rounded.shifted).all() and torch.equal(rounded.shifted, rounded.shifted.round())
    assert float(rounded.shifted.abs().max()) <= 8 and torch.isfinite(rounded.scales).all()
