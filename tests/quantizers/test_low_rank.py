"""Products of low rank: what they leave by definition, planted products found, and when the codes do not matter."""

import pytest
import torch
from quantizers.test_gptq import output_error, problem

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteOutcome
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.low_rank import LowRankSearch, quantize_with_low_rank
from cptquant.quantizers.rtn import Rtn


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return factor_hessian(hessian, 0.01, by_activation=False).damped


def best_left(error: torch.Tensor, hessian: torch.Tensor, rank: int) -> float:
    """What the best product of that rank leaves of tr(E H E'), from the singular values of E H^(1/2), in float64."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    return float(torch.linalg.svdvals(error.double() @ root)[rank:].square().sum())


def power(error: torch.Tensor, hessian: torch.Tensor) -> float:
    error, hessian = error.double(), hessian.double()
    return float(torch.trace(error @ hessian @ error.t()))


@pytest.mark.parametrize("name", ["int2-g16-r1", "int3-g32-asym-r3", "int4-channel-r2", "int3-tensor-r4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_the_best_of_its_rank_for_the_codes(name: str, dtype: torch.dtype) -> None:
    """Without descent afterwards: eight bits are all that stands between it and the truncated SVD."""
    weight, hessian = problem(24, 96, seed=2)
    fmt = QuantFormat.parse(name)
    found = Gptq(descent_rounds=0)(weight, hessian, fmt, dtype).weight
    assert isinstance(found, CorrectedWeight) and found.format == fmt
    moments = damped(hessian)
    best = best_left(weight - found.base.dequantize(), moments, fmt.rank)
    reached = power(weight - found.dequantize(), moments)
    assert best * (1 - 1e-4) <= reached <= 1.05 * best


@pytest.mark.parametrize("name", ["int2-g16-r2", "int3-g32-asym-r2", "int4-channel-r2"])
def test_descent_afterwards_only_helps(name: str) -> None:
    weight, hessian = problem(16, 96, seed=3)
    fmt, moments = QuantFormat.parse(name), damped(hessian)
    result = Gptq(descent_rounds=4)(weight, hessian, fmt, torch.float16)
    assert result.outcome is SiteOutcome.NOMINAL and result.damping == 0.01
    assert result.relative_output_error == pytest.approx(
        output_error(weight, result.weight.dequantize(), hessian), 1e-3
    )

    def codes(values: torch.Tensor, left: torch.Tensor):
        return Gptq(descent_rounds=4)(values, left, fmt.base, torch.float16).weight

    before = quantize_with_low_rank(weight, moments, fmt, torch.float16, codes)
    assert torch.equal(before.correction.left, result.weight.correction.left)
    assert power(weight - result.weight.dequantize(), moments) < power(weight - before.dequantize(), moments)


def test_codes_are_asked_for_what_the_product_cannot_hold() -> None:
    """Neither the weights that the codes stand for nor the metric they are judged in has anything along the rows."""
    weight, hessian = problem(12, 64, seed=4)
    moments, fmt = damped(hessian), QuantFormat.parse("int3-g16-r3")
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def codes(values: torch.Tensor, left: torch.Tensor):
        asked.append((values, left))
        return Rtn()(values, fmt.base, torch.float16)

    quantize_with_low_rank(weight, moments, fmt, torch.float16, codes)
    values, left = asked[0]
    kept = torch.linalg.svd(weight.double() @ torch.linalg.cholesky(moments.double())).Vh[:3]
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(moments.double()), kept, upper=False, left=False)
    scale = float((rows @ moments.double() @ rows.t()).diagonal().mean())
    assert float((rows @ left.double() @ rows.t()).abs().max()) < 1e-3 * scale  # B is rounded to eight bits
    part = (values.double() @ moments.double() @ rows.t()).abs().max()
    assert float(part) < 0.02 * float((weight.double() @ moments.double() @ rows.t()).abs().max())


def test_a_planted_product_is_taken_out() -> None:
    """Weights on a grid plus large outer products: without them the grid would have to stretch."""
    generator = torch.Generator().manual_seed(0)
    hessian = problem(8, 128, seed=1)[1]
    grid = 0.01 * torch.randint(-4, 4, (64, 128), generator=generator).float()
    planted = torch.randn(64, 2, generator=generator) @ torch.randn(2, 128, generator=generator)
    fmt = QuantFormat.parse("int3-g32-r2")
    weight = grid + 0.3 * planted
    found = Gptq()(weight, hessian, fmt, torch.bfloat16)
    plain = Gptq()(weight, hessian, fmt.base, torch.bfloat16)
    assert found.relative_output_error < 0.02 * plain.relative_output_error
    rounded = power(weight - Rtn()(weight, fmt, torch.bfloat16).dequantize(), torch.eye(128))
    assert rounded < 0.02 * power(weight - Rtn()(weight, fmt.base, torch.bfloat16).dequantize(), torch.eye(128))


def test_sites_of_one_input_have_products_of_their_own() -> None:
    first, hessian = problem(12, 64, seed=1)
    second = problem(20, 64, seed=9)[0]
    fmt = QuantFormat.parse("int2-g32-r2")
    both = Gptq().quantize_together([first, second], hessian, fmt, torch.float16)
    for result, weight in zip(both, (first, second), strict=True):
        assert torch.equal(result.weight.dequantize(), Gptq()(weight, hessian, fmt, torch.float16).weight.dequantize())
    assert not torch.equal(both[0].weight.correction.right, both[1].weight.correction.right)


def test_the_same_bits_whatever_was_drawn_before() -> None:
    weight, hessian = problem(12, 64, seed=1)
    fmt = QuantFormat.parse("int2-g32-r2")
    torch.manual_seed(1)
    first, drawn = Gptq()(weight, hessian, fmt, torch.float16).weight, torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # the global generator is left as it was
    torch.manual_seed(2)
    assert torch.equal(Gptq()(weight, hessian, fmt, torch.float16).weight.dequantize(), first.dequantize())


def test_dead_inputs_zero_weights_and_broken_ones() -> None:
    weight, hessian = problem(6, 32)
    fmt = QuantFormat.parse("int3-g16-r2")
    dead = hessian.clone()
    dead[3], dead[:, 3] = 0, 0
    assert Gptq()(weight, dead, fmt, torch.float16).outcome is SiteOutcome.DEAD_INPUTS
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    result = Gptq(damping=0.0)(weight, row.t() @ row, fmt, torch.float16)
    assert result.outcome is SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED and result.damping > 0
    for method in (Gptq(), Rtn()):
        call = (hessian,) if isinstance(method, Gptq) else ()
        nothing = method(torch.zeros(6, 32), *call, fmt, torch.float16)
        stored = nothing if isinstance(method, Rtn) else nothing.weight
        assert isinstance(stored.correction, LowRankCorrection) and not bool(stored.dequantize().any())
        broken = weight.clone()
        broken[2, 5] = float("nan")
        with pytest.raises(ModelError, match="NaN or infinite"):
            method(broken, *call, fmt, torch.float16)


def test_what_is_left_falls_with_the_rank_and_says_what_gptq_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, hessian = problem(48, 96, seed=6)
    weight += 0.5 * torch.randn(48, 2, generator=generator) @ torch.randn(2, 96, generator=generator)
    moments = damped(hessian)
    search = LowRankSearch(weight, moments, torch.float16)
    ratios = {rank: search.ratio(rank) for rank in (1, 2, 4)}
    assert 1 > ratios[1] > ratios[2] > ratios[4] > 0
    widest_first = LowRankSearch(weight, moments, torch.float16)
    assert {rank: widest_first.ratio(rank) for rank in (4, 2, 1)} == pytest.approx(ratios, rel=0.02)
    some = LowRankSearch(weight, moments, torch.float16, torch.arange(0, 48, 2))
    assert some.ratio(2) == pytest.approx(ratios[2], rel=0.2)
    plain = Gptq()(weight, hessian, QuantFormat.parse("int3-g64"), torch.float16).relative_output_error
    for rank, ratio in ratios.items():
        found = Gptq()(weight, hessian, QuantFormat.parse(f"int3-g64-r{rank}"), torch.float16)
        assert found.relative_output_error / plain == pytest.approx(ratio, rel=0.5)
    assert LowRankSearch(torch.zeros(8, 96), moments, torch.float16).ratio(1) == 1.0
