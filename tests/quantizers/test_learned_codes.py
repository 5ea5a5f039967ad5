"""Codes and scales as variables: exact start, true gradients, bounds."""

import pytest
import torch

from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import decode, encode
from cptquant.quantizers.learned_codes import LearnedWeight
from cptquant.quantizers.rtn import Rtn

FORMATS = (
    "int2-g16", "int3-g16-asym", "int4-g24", "int4-g24-asym", "int8-channel", "int5-channel-asym", "int3-tensor",
    "int4-tensor-asym", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
)  # fmt: skip


def start(name: str, seed: int = 0):
    fmt = QuantFormat.parse(name)
    weight = torch.randn(6, 256 if fmt.block_layout else 40, generator=torch.Generator().manual_seed(seed))
    return Rtn()(weight, fmt, torch.bfloat16), weight


def soft_value(learned: LearnedWeight, offsets: torch.Tensor, log_scales: torch.Tensor | None) -> torch.Tensor:
    """The surrogate that straight-through rounding differentiates, written from its formula, in float64.

    round(v) is replaced by round(v0) + v - v0, and s by the stored s times exp(log change).
    """
    stored = learned.stored()
    codes = stored.codes.double() + offsets - learned.offsets.double()
    if learned.scales is None:
        step = stored.sub_scales().double() if hasattr(stored, "sub_scales") else stored.scales.double()
        spread = step.repeat_interleave(learned.start.shape[1] // step.shape[1], dim=1)
        base = stored.dequantize().double()
        return base + (codes - stored.codes.double()) * spread
    groups = stored.scales.double().reshape(log_scales.shape) * log_scales.exp()
    zeros = torch.zeros_like(groups) if stored.zeros is None else stored.zeros.double().reshape(groups.shape)
    width = stored.format.granularity if isinstance(stored.format.granularity, int) else codes.shape[1]

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(width, dim=1)[:, : codes.shape[1]]

    return (codes - spread(zeros)) * spread(groups)


@pytest.mark.parametrize("name", FORMATS)
def test_learning_starts_at_the_start_bit_for_bit(name: str) -> None:
    stored, weight = start(name)
    learned = LearnedWeight(stored, weight, reach=1.0)
    assert torch.equal(learned.codes(), stored.codes)
    assert torch.equal(learned.value(), stored.dequantize())
    moved = LearnedWeight(stored, weight, reach=1.0)
    moved.move_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), None)
    changed = moved.stored()
    assert not torch.equal(changed.codes, stored.codes)
    assert int((changed.codes.int() - stored.codes.int()).abs().max()) == 1
    assert torch.equal(moved.value(), changed.dequantize())
    again = decode(encode(changed), stored.format, stored.shape)
    assert torch.equal(again.codes, changed.codes) and torch.equal(again.dequantize(), changed.dequantize())


@pytest.mark.parametrize(
    "name", ["int3-g16-c10", "int4-g24-asym-c5", "int2-channel-c20", "int3-g16-r2", "int4-channel-r3"]
)
def test_codes_beside_a_correction_are_learned_and_the_correction_stays(name: str) -> None:
    stored, weight = start(name)
    learned = LearnedWeight(stored, weight, reach=1.0)
    assert torch.equal(learned.value(), stored.dequantize())
    fixed = stored.correction.fixed_columns
    columns = [] if fixed is None else fixed.tolist()
    assert not bool(learned.offsets[:, columns].any())
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    _, by_scale = learned.gradients(gradient, learned.value())
    plain = LearnedWeight(stored.base, weight, reach=1.0)
    _, expected = plain.gradients(gradient, plain.value())
    torch.testing.assert_close(by_scale, expected, rtol=1e-4, atol=1e-4)
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    learned.move_(step, 0.1 * torch.ones_like(by_scale))
    changed = learned.stored()
    assert torch.equal(changed.codes[:, columns], stored.codes[:, columns])
    assert not torch.equal(changed.codes, stored.codes) and not torch.equal(changed.base.scales, stored.base.scales)
    assert changed.correction is stored.correction
    assert torch.equal(learned.value(), changed.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_offsets_say_where_the_original_weight_lies(name: str) -> None:
    stored, weight = start(name)
    learned = LearnedWeight(stored, weight, reach=1.0)
    inside = learned.offsets.abs() < 0.49
    back = soft_value(learned, 2 * learned.offsets.double(), None if learned.scales is None else torch.zeros_like(learned.scales).double())  # fmt: skip  # noqa: E501
    assert bool(inside.float().mean() > 0.6)
    assert torch.allclose(back[inside].float(), weight[inside], atol=2e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_soft_surrogate(name: str) -> None:
    stored, weight = start(name, seed=3)
    learned = LearnedWeight(stored, weight, reach=1.0)
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(weight.shape, generator=generator).double()
    hessian = torch.randn(weight.shape[1], weight.shape[1], generator=generator).double()
    hessian = hessian @ hessian.t() / len(hessian)

    def loss(offsets: torch.Tensor, log_scales: torch.Tensor | None) -> torch.Tensor:
        error = soft_value(learned, offsets, log_scales) - target
        return (error @ hessian * error).sum()

    offsets = learned.offsets.double()
    logs = None if learned.scales is None else torch.zeros_like(learned.scales).double()
    value = learned.value()
    by_value = (2 * (value.double() - target) @ hessian).float()
    by_code, by_scale = learned.gradients(by_value, value)
    assert (by_scale is None) == (stored.format.block_layout is not None)
    step = 1e-4
    for row, column in ((0, 0), (2, 17), (5, weight.shape[1] - 1)):
        bump = torch.zeros_like(offsets)
        bump[row, column] = step
        slope = (loss(offsets + bump, logs) - loss(offsets - bump, logs)) / (2 * step)
        assert float(by_code[row, column]) == pytest.approx(float(slope), rel=1e-3, abs=1e-4)
    if by_scale is not None and logs is not None:
        for index in {0, logs.numel() // 2, logs.numel() - 1}:
            bump = torch.zeros_like(logs)
            bump.view(-1)[index] = step
            slope = (loss(offsets, logs + bump) - loss(offsets, logs - bump)) / (2 * step)
            assert float(by_scale.view(-1)[index]) == pytest.approx(float(slope), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ("int2-g16", "int3-g16-asym", "Q4_K"))
def test_offsets_and_codes_stay_in_bounds(name: str) -> None:
    stored, weight = start(name)
    learned = LearnedWeight(stored, weight, reach=2.0)
    learned.move_(torch.full_like(weight, 1e9), None)
    assert bool((learned.offsets == -2).all())
    lowest = 0 if name == "Q4_K" else -(2 ** (stored.format.code_bits - 1))
    assert torch.equal(learned.codes().int(), (stored.codes.int() - 2).clamp(min=lowest))


def test_scales_never_vanish_or_overflow() -> None:
    stored, weight = start("int4-g24")
    learned = LearnedWeight(stored, weight, reach=1.0)
    learned.move_(torch.zeros_like(weight), torch.ones_like(learned.scales))  # to zero
    assert torch.equal(learned.stored().scales, stored.scales)
    learned.scales.fill_(torch.inf)
    assert torch.equal(learned.stored().scales, stored.scales)


@pytest.mark.parametrize("name", ["int3-g16-r2", "int4-channel-asym-r3"])
def test_the_left_factor_of_a_product_is_learned_inside_its_bits(name: str) -> None:
    stored, weight = start(name)
    learned = LearnedWeight(stored, weight, reach=1.0)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    product = stored.correction
    by_left = learned.left_gradient(gradient)
    assert learned.left is not None and by_left is not None
    moved = torch.zeros_like(product.columns())
    moved[1, 0] = 1.0  # one number of the factor: the value's change is a row of the right one
    change = moved @ (product.right.float() / 128)
    assert float(by_left[1, 0]) == pytest.approx(float((gradient * change).sum()), rel=1e-5)
    learned.left.add_(5.3 * product.scales.float())
    learned.left[0] = 1e6
    changed = learned.stored()
    assert torch.equal(learned.value(), changed.dequantize())
    assert torch.equal(changed.codes, stored.codes) and torch.equal(changed.correction.right, product.right)
    steps = changed.correction.left[1:].int() - product.left[1:].int()
    assert bool((steps == torch.minimum(torch.tensor(5), 127 - product.left[1:].int())).all())
    assert bool((changed.correction.left[0].int().abs() >= 127).all())
    assert torch.equal(decode(encode(changed), stored.format, stored.shape).dequantize(), changed.dequantize())
    plain, _ = start("int3-g16")
    assert LearnedWeight(plain, weight, reach=1.0).left_gradient(gradient) is None
