"""Corrected columns: the greedy choice by brute force, the least-squares correction, and what outliers no longer do."""

import itertools

import pytest
import torch
from quantizers.test_gptq import output_error, problem

from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteOutcome
from cptquant.packing.quantized_weight import CorrectedWeight
from cptquant.quantizers.corrected import rank_columns, round_correction
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.rtn import Rtn


def left_over(error: torch.Tensor, hessian: torch.Tensor, columns: list[int]) -> float:
    """tr(E H E') once the columns are corrected as well as they can be, in float64, from the definition."""
    error, hessian = error.double(), hessian.double()
    corrected = error.clone()
    if columns:
        system = hessian[columns][:, columns]
        corrected[:, columns] -= torch.linalg.solve(system, (error @ hessian)[:, columns].t()).t()
    return float(torch.trace(corrected @ hessian @ corrected.t()))


@pytest.mark.parametrize("seed", range(4))
def test_each_further_column_is_the_best_one(seed: int) -> None:
    weight, hessian = problem(5, 24, seed)
    hessian = factor_hessian(hessian, 0.01, by_activation=False).damped
    error = weight - weight.round()
    chosen: list[int] = []
    for _ in range(6):
        rest = [column for column in range(24) if column not in chosen]
        chosen.append(min(rest, key=lambda column: left_over(error, hessian, [*chosen, column])))
        assert rank_columns(error, hessian, len(chosen)).tolist() == chosen
        assert rank_columns(error, hessian, len(chosen), given=chosen[:1]).tolist() == chosen
    pairs = itertools.combinations(range(24), 2)
    best = min(left_over(error, hessian, list(pair)) for pair in pairs)
    assert left_over(error, hessian, rank_columns(error, hessian, 2).tolist()) < 1.1 * best


def test_columns_that_say_the_same_are_not_both_chosen() -> None:
    inputs = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double()
    inputs[:, 7] = 3 * inputs[:, 2]
    hessian = (inputs.t() @ inputs / 200).float()
    hessian.diagonal().add_(1e-7)
    error = torch.zeros(3, 12)
    error[:, [2, 7]] = 1.0
    error[:, 9] = 0.01
    assert len({2, 7} & set(rank_columns(error, hessian, 2).tolist())) == 1
    assert rank_columns(torch.zeros(3, 12), hessian, 3).tolist() == [0, 1, 2]  # nothing to gain: still three


@pytest.mark.parametrize("name", ["int2-g16-c5", "int3-g32-asym-c10", "int4-channel-c2", "int3-tensor-c4"])
def test_the_correction_is_the_least_squares_one(name: str) -> None:
    """No change of a corrected column lowers the error: the gradient there is what 8 bits leave of it."""
    weight, hessian = problem(12, 96, seed=2)
    weight[:, 40] *= 12
    fmt = QuantFormat.parse(name)
    result = Gptq()(weight, hessian, fmt, torch.float16)
    found = result.weight
    assert isinstance(found, CorrectedWeight) and result.outcome is SiteOutcome.NOMINAL and result.damping == 0.01
    damped = factor_hessian(hessian, 0.01, by_activation=False).damped
    columns = found.correction.columns.tolist()
    assert float(found.base.dequantize()[:, columns].abs().max()) == 0
    others = found.base.dequantize() - weight
    best = left_over(others, damped, columns)
    error = (found.dequantize() - weight).double()
    reached = float(torch.trace(error @ damped.double() @ error.t()))
    steps = found.correction.scales.double().abs()
    rounding = float((damped.diagonal()[columns].double() * steps.square()).sum()) * len(weight)
    assert best * (1 - 1e-4) <= reached <= best + rounding
    assert result.relative_output_error == pytest.approx(output_error(weight, found.dequantize(), hessian), rel=1e-3)
    plain = Gptq()(weight, hessian, fmt.base, torch.float16)
    assert result.relative_output_error < 0.8 * plain.relative_output_error


def test_a_column_of_outliers_stretches_no_scale() -> None:
    weight, hessian = problem(8, 64, seed=5)
    quiet = weight.clone()
    weight[:, 20] *= 100
    fmt = QuantFormat.parse("int3-g32-c1")
    found = Gptq()(weight, hessian, fmt, torch.float16).weight
    assert found.correction.columns.tolist() == [20]
    largest = Gptq()(quiet, hessian, fmt.base, torch.float16).weight.scales.float().abs()
    assert bool((found.base.scales.float().abs() < 1.5 * largest + 1e-3).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sites_of_one_input_choose_their_own_columns(dtype: torch.dtype) -> None:
    first, hessian = problem(6, 64, seed=1)
    second = first.clone()
    first[:, 10] *= 50
    second[:, 50] *= 50
    fmt = QuantFormat.parse("int2-g32-c1")
    both = Gptq().quantize_together([first, second], hessian, fmt, dtype)
    assert [result.weight.correction.columns.tolist() for result in both] == [[10], [50]]
    alone = Gptq()(second, hessian, fmt, dtype)
    assert torch.equal(both[1].weight.dequantize(), alone.weight.dequantize())


def test_a_rank_deficient_hessian_is_damped_and_dead_inputs_are_said() -> None:
    weight, hessian = problem(6, 32)
    fmt = QuantFormat.parse("int3-g16-c5")
    dead = hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    assert Gptq()(weight, dead, fmt, torch.float16).outcome is SiteOutcome.DEAD_INPUTS
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    result = Gptq(damping=0.0)(weight, row.t() @ row, fmt, torch.float16)
    assert result.outcome is SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED and result.damping > 0


def test_rounding_corrects_the_columns_of_the_largest_weighted_error() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 5] *= 30
    fmt = QuantFormat.parse("int3-g32-c2")
    importance = torch.ones(64)
    found = Rtn()(weight, fmt, torch.float16, importance=importance)
    assert isinstance(found, CorrectedWeight) and found.correction.columns.tolist() == [5]
    importance[50] = 1e6
    moved = Rtn()(weight, fmt, torch.float16, importance=importance)
    assert moved.correction.columns.tolist() == [50]
    torch.testing.assert_close(moved.dequantize()[:, 50], weight[:, 50], rtol=0, atol=0.02)
    plain = Rtn()(weight, fmt.base, torch.float16)
    errors = [(kept.dequantize() - weight).square().sum() for kept in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_eight_bits_reach_every_value_of_a_column() -> None:
    wanted = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 300.0])
    found = round_correction(wanted, torch.tensor([1, 4, 6]), torch.bfloat16, clip_search=False)
    assert bool(((found.values() - wanted).abs() <= 0.51 * found.scales.float().abs()).all())
