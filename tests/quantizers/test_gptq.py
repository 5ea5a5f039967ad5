"""GPTQ against a slow oracle, against round-to-nearest, and on Hessians that are no good."""

import numpy as np
import pytest
import torch

from cptquant.core.errors import DataError, ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.manifest import SiteOutcome
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.rtn import Rtn
from tests.oracles import gptq as oracle


def correlated_inputs(count: int, columns: int, seed: int) -> torch.Tensor:
    """(count, columns): a few strong common directions, columns of unequal size, some noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(count, columns // 4, generator=generator) @ mixing / (columns // 4) ** 0.5
    inputs += 0.3 * torch.randn(count, columns, generator=generator)
    return inputs * torch.rand(columns, generator=generator).add(0.2)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = correlated_inputs(8 * columns, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return weight, inputs.t() @ inputs / len(inputs)


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    error, weight, hessian = (values - weight).double(), weight.double(), hessian.double()
    return float(torch.trace(error @ hessian @ error.t()) / torch.trace(weight @ hessian @ weight.t()))


@pytest.mark.parametrize("by_activation", [False, True], ids=["left to right", "activation order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("code_bits", "group", "columns"), [(2, 16, 96), (3, 32, 80), (4, 24, 75), (4, 8, 40), (5, 96, 96), (8, 5, 33)]
)
def test_codes_are_those_of_the_oracle(code_bits, group, columns, symmetric, by_activation) -> None:
    weight, hessian = problem(12, columns, seed=code_bits)
    granularity = "channel" if group == columns else group
    fmt = QuantFormat(code_bits=code_bits, granularity=granularity, symmetric=symmetric)
    result = Gptq(clip_search=False, activation_order=by_activation, descent_rounds=0)(
        weight, hessian, fmt, torch.float16
    )
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if by_activation else None
    codes, values = oracle.gptq(
        weight.double().numpy(), hessian.double().numpy(), code_bits, group, 0.01, symmetric=symmetric, order=order
    )
    assert np.array_equal(result.weight.codes.numpy(), codes)
    np.testing.assert_allclose(result.weight.dequantize().numpy(), values, rtol=1e-6, atol=1e-7)
    expected = output_error(weight, torch.from_numpy(values), hessian)
    assert result.relative_output_error == pytest.approx(expected, rel=1e-4)
    assert result.outcome is SiteOutcome.NOMINAL and result.damping == 0.01


@pytest.mark.parametrize("granularity", [16, "channel", "tensor"])
@pytest.mark.parametrize(("code_bits", "factor"), [(2, 0.75), (3, 0.6), (4, 0.6), (8, 0.7)])
def test_beats_round_to_nearest_by_a_margin(code_bits: int, factor: float, granularity: int | str) -> None:
    weight, hessian = problem(64, 128)
    fmt = QuantFormat(code_bits=code_bits, granularity=granularity)
    ours = Gptq()(weight, hessian, fmt, torch.bfloat16)
    rounded = Rtn()(weight, fmt, torch.bfloat16).dequantize()
    assert ours.relative_output_error is not None
    assert ours.relative_output_error < factor * output_error(weight, rounded, hessian)
    assert ours.relative_output_error == pytest.approx(
        output_error(weight, ours.weight.dequantize(), hessian), rel=1e-4
    )


def test_matrices_that_share_an_input_do_not_disturb_each_other() -> None:
    weight, hessian = problem(24, 64)
    parts = [weight[:8], weight[8:9], weight[9:]]
    for fmt in (
        QuantFormat.parse("int3-g16"),
        QuantFormat.parse("int4-channel-asym"),
        QuantFormat.parse("int4-tensor"),
    ):
        together = Gptq().quantize_together(parts, hessian, fmt, torch.float16)
        for part, result in zip(parts, together, strict=True):
            alone = Gptq()(part, hessian, fmt, torch.float16)
            assert torch.equal(alone.weight.codes, result.weight.codes)
            assert torch.equal(alone.weight.scales, result.weight.scales)
            assert alone.relative_output_error == pytest.approx(result.relative_output_error, rel=1e-5)


@pytest.mark.parametrize("name", ["int3-g16-asym", "int4-channel", "int4-tensor"])
def test_tall_matrices_go_through_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(40, 64)
    fmt, parts = QuantFormat.parse(name), [weight[:7], weight[7:39], weight[39:]]
    whole = Gptq().quantize_together(parts, hessian, fmt, torch.float16)
    rounded = Rtn()(weight, fmt, torch.float16)
    monkeypatch.setattr("cptquant.quantizers.gptq.ROWS_ENTRIES", 64 * 11)
    monkeypatch.setattr("cptquant.quantizers.grid.ROWS_ENTRIES", 64 * 11)
    for part, one, other in zip(
        parts, whole, Gptq().quantize_together(parts, hessian, fmt, torch.float16), strict=True
    ):
        assert one.weight.codes.shape == part.shape
        assert torch.equal(one.weight.codes, other.weight.codes) and torch.equal(one.weight.scales, other.weight.scales)
        assert one.relative_output_error == pytest.approx(other.relative_output_error, rel=1e-5)
    assert torch.equal(Rtn()(weight, fmt, torch.float16).codes, rounded.codes)


def test_rows_may_be_permuted() -> None:
    weight, hessian = problem(16, 64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    fmt = QuantFormat.parse("int3-g16")
    plain = Gptq()(weight, hessian, fmt, torch.float16).weight
    permuted = Gptq()(weight[order], hessian, fmt, torch.float16).weight
    assert torch.equal(permuted.codes, plain.codes[order]) and torch.equal(permuted.scales, plain.scales[order])


def test_activation_order_does_not_care_how_columns_are_numbered() -> None:
    weight, hessian = problem(16, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    fmt = QuantFormat.parse("int3-channel")
    gptq = Gptq(activation_order=True, descent_rounds=0)
    plain = gptq(weight, hessian, fmt, torch.float16).weight
    permuted = gptq(weight[:, order], hessian[order][:, order], fmt, torch.float16).weight
    assert torch.equal(permuted.codes, plain.codes[:, order])


@pytest.mark.parametrize("by_activation", [False, True])
def test_weights_on_the_grid_come_back_unchanged(by_activation: bool) -> None:
    _, hessian = problem(1, 48)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (10, 48), generator=generator)
    codes[:, ::16] = -8  # every group uses its whole range, so that its scale can be recognised
    scales = torch.rand(10, 3, generator=generator).add(0.5).half().float()
    weight = codes * scales.repeat_interleave(16, dim=1)
    gptq = Gptq(activation_order=by_activation)
    result = gptq(weight, hessian, QuantFormat.parse("int4-g16"), torch.float16)
    assert torch.equal(result.weight.dequantize(), weight)
    assert result.relative_output_error == 0.0


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    fmt = QuantFormat.parse("int3-g8")
    result = Gptq(diagonal_importance=False, descent_rounds=0)(weight, torch.eye(32), fmt, torch.float16)
    assert torch.equal(result.weight.codes, Rtn()(weight, fmt, torch.float16).codes)


@pytest.mark.parametrize("case", ["few samples", "duplicated columns", "all inputs alike"])
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_rank_deficient_hessian(case: str, damping: float) -> None:
    inputs = correlated_inputs(512, 64, seed=2)
    if case == "few samples":
        inputs = inputs[:20]
    elif case == "duplicated columns":
        inputs[:, 32:] = inputs[:, :32]
    else:
        inputs = inputs[:, :1].expand(-1, 64)
    hessian = inputs.t() @ inputs / len(inputs)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    fmt = QuantFormat.parse("int4-g16")
    result = Gptq(damping=damping)(weight, hessian, fmt, torch.float16)
    if damping == 0:
        assert result.outcome is SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED
        assert 0 < result.damping <= 0.01
    else:
        assert result.outcome is SiteOutcome.NOMINAL and result.damping == damping
    rounded = Rtn()(weight, fmt, torch.float16).dequantize()
    assert result.relative_output_error is not None
    assert result.relative_output_error < 0.5 * output_error(weight, rounded, hessian)


def test_indefinite_hessian_ends_with_more_damping() -> None:
    hessian = torch.eye(32) - 0.2  # smallest eigenvalue -5.4, mean diagonal 0.8
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    result = Gptq()(weight, hessian, QuantFormat.parse("int4-channel"), torch.float16)
    assert result.outcome is SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED
    assert result.damping == pytest.approx(10.0)


def test_dead_inputs_are_rounded_and_reported() -> None:
    weight, hessian = problem(16, 64)
    dead = torch.tensor([3, 17, 18, 60])
    hessian[dead] = 0
    hessian[:, dead] = 0
    fmt = QuantFormat.parse("int4-g16")
    result = Gptq()(weight, hessian, fmt, torch.float16)
    assert result.outcome is SiteOutcome.DEAD_INPUTS
    values = result.weight.dequantize()
    steps = result.weight.scales.float().abs().repeat_interleave(16, dim=1)
    assert ((values - weight)[:, dead].abs() <= 3 * steps[:, dead]).all()  # rounded (perhaps clipped), not set to 0
    assert values[:, dead].abs().mean() > 0.5 * weight[:, dead].abs().mean()


def test_no_live_input_at_all_is_plain_rounding() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    fmt = QuantFormat.parse("int3-g8")
    result = Gptq()(weight, torch.zeros(32, 32), fmt, torch.float16)
    assert result.outcome is SiteOutcome.DEAD_INPUTS and result.relative_output_error is None
    assert torch.equal(result.weight.codes, Rtn()(weight, fmt, torch.float16).codes)


def test_the_hessian_is_not_changed() -> None:
    weight, hessian = problem(8, 32)
    hessian[4] = hessian[:, 4] = 0
    before = hessian.clone()
    Gptq(activation_order=True)(weight, hessian, QuantFormat.parse("int4-g16"), torch.float16)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    weight, hessian = problem(8, 32)
    fmt = QuantFormat.parse("int4-g16")
    broken = weight.clone()
    broken[2, 5] = value
    with pytest.raises(ModelError, match="a weight to quantize is NaN or infinite"):
        Gptq()(broken, hessian, fmt, torch.float16)
    hessian[3, 3] = value
    with pytest.raises(DataError, match="calibration inputs of a layer are NaN or infinite"):
        Gptq()(weight, hessian, fmt, torch.float16)


def test_factor_rebuilds_the_damped_hessian() -> None:
    _, hessian = problem(1, 48)
    factor = factor_hessian(hessian, 0.02, by_activation=True)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(48)
    ordered = damped[factor.order][:, factor.order].double()
    unit = factor.feedback.double() + torch.eye(48)
    assert torch.equal(factor.feedback, factor.feedback.triu(1))
    # H^-1 = U' U and U = D (N + I) make (N + I) H (N + I)' diagonal.
    product = unit @ ordered @ unit.t()
    assert (product.diagonal() > 0).all()
    assert (product - torch.diag(product.diagonal())).abs().max() < 1e-5 * product.diagonal().max()
