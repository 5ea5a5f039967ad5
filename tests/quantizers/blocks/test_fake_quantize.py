"""fake_quantize: its forward pass against the codec, its backward pass against autograd on a readable composite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.blocks.fake_quantize import fake_quantize, nearest_codes
from cptquant.quantizers.blocks.surrogates import Limit, Surrogate, rounded_surrogate, soft_clamp

SURROGATES = {
    "ste-hard": Surrogate(),
    "sigmoid-hard": Surrogate(rounding="sigmoid", sharpness=6.0),
    "raw-hard": Surrogate(rounding="sigmoid", sharpness=2.0, normalised=False),
    "ste-phi": Surrogate(clamp="soft", gate="phi"),
    "sigmoid-phi": Surrogate(rounding="sigmoid", clamp="soft", gate="phi"),
    "sigmoid-swish": Surrogate(rounding="sigmoid", sharpness=8.0, clamp="soft", beta=1.0),
    "sigmoid-beta4": Surrogate(rounding="sigmoid", sharpness=100.0, clamp="soft"),
    "ste-soft-forward": Surrogate(clamp="soft", soft_forward=True),
    "sigmoid-soft-forward": Surrogate(rounding="sigmoid", clamp="soft", gate="phi", soft_forward=True),
}


def _with_value(value: Tensor, slope_of: Tensor) -> Tensor:
    """`value` on the way forward, the gradient of `slope_of` on the way back."""
    return value.detach() + (slope_of - slope_of.detach())


def _composite(
    weight: Tensor, scale: Tensor, zero: Tensor | None, low: Limit, high: Limit, surrogate: Surrogate
) -> Tensor:
    """The same function from differentiable pieces, its gradient left to autograd."""
    shift = torch.zeros_like(scale) if zero is None else zero
    x = weight / scale + shift
    low, high = (torch.as_tensor(limit, dtype=weight.dtype).expand_as(x) for limit in (low, high))
    hard = x.clamp(low, high)
    soft = soft_clamp(x, low, high, surrogate) if surrogate.clamp == "soft" else hard
    clamped = soft if surrogate.soft_forward else _with_value(hard, soft)
    codes = clamped.detach().round().clamp(low, high)
    return scale * (_with_value(codes, rounded_surrogate(clamped, surrogate)) - shift)


def _planted(
    shape: tuple[int, int, int], bits: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """A weight of which about a tenth lies outside the grid, scales of both signs, zeros that are not whole."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    scale = torch.rand((*shape[:2], 1), generator=generator, dtype=torch.float64) + 0.1
    scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.3, -1.0, 1.0)
    zero = torch.rand(scale.shape, generator=generator, dtype=torch.float64) * 2 - 1
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) * 1.1 + low * 1.05
    return ((x - zero) * scale).to(dtype), scale.to(dtype), zero.to(dtype), low, high


def _gradients(function, arguments: tuple, incoming: Tensor) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments[:3]]
    value = function(*leaves, *arguments[3:])
    return [value.detach(), *torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], incoming)]


def _assert_equals_composite(arguments: tuple, tolerance: float = 1e-10) -> None:
    generator = torch.Generator().manual_seed(7)
    incoming = torch.randn(arguments[0].shape, generator=generator, dtype=torch.float64).to(arguments[0].dtype)
    found = _gradients(fake_quantize, arguments, incoming)
    expected = _gradients(_composite, arguments, incoming)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype is wanted.dtype
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_zero", [True, False])
def test_gradients_equal_autograds_on_the_composite(name: str, bits: int, with_zero: bool) -> None:
    weight, scale, zero, low, high = _planted((5, 3, 16), bits, seed=bits)
    _assert_equals_composite((weight, scale, zero if with_zero else None, low, high, SURROGATES[name]))


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("shared", [(1, 3), (5, 1), (1, 1)])
def test_shared_scales_get_the_sum_of_their_groups_gradients(name: str, shared: tuple[int, int]) -> None:
    weight, scale, zero, low, high = _planted((5, 3, 16), 3, seed=1)
    scale, zero = (t[: shared[0], : shared[1]].contiguous() for t in (scale, zero))
    _assert_equals_composite((weight, scale, zero, low, high, SURROGATES[name]))


@pytest.mark.parametrize("name", SURROGATES)
def test_limits_may_differ_between_groups(name: str) -> None:
    weight, scale, zero, _, _ = _planted((5, 3, 16), 3, seed=2)
    bits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).reshape(1, 3, 1)
    _assert_equals_composite((weight, scale, zero, -(2**bits), 2**bits - 1, SURROGATES[name]))
    per_row = torch.arange(5, dtype=torch.float64).reshape(5, 1, 1)
    _assert_equals_composite((weight, scale, zero, -1 - per_row, 2.0, SURROGATES[name]))
    _assert_equals_composite((weight, scale, zero, -2.0, torch.tensor(3.0), SURROGATES[name]))


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 33)),
    st.integers(2, 8),
    st.sampled_from(sorted(SURROGATES)),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(shape: tuple[int, int, int], bits: int, name: str, seed: int) -> None:
    _assert_equals_composite((*_planted(shape, bits, seed), SURROGATES[name]))


@pytest.mark.parametrize("name", SURROGATES)
def test_rows_in_several_blocks_and_strides_of_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptquant.quantizers.blocks.fake_quantize._BLOCK_ELEMENTS", 100)
    weight, scale, zero, low, high = _planted((7, 3, 16), 3, seed=3)
    turned = weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned.is_contiguous()
    arguments = (turned, scale, zero, low, high, SURROGATES[name])
    _assert_equals_composite(arguments)
    expanded = torch.ones((), dtype=torch.float64).expand(weight.shape)
    for got, wanted in zip(
        _gradients(fake_quantize, arguments, expanded), _gradients(_composite, arguments, expanded), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", SURROGATES)
def test_float32_is_close_to_float64(name: str) -> None:
    arguments = _planted((5, 3, 64), 3, seed=4, dtype=torch.float32)
    _assert_equals_composite((*arguments, SURROGATES[name]), tolerance=2e-4)


@pytest.mark.parametrize("name", SURROGATES)
def test_bfloat16_is_float32_rounded_once(name: str) -> None:
    weight, scale, zero, low, high = _planted((5, 3, 64), 4, seed=5, dtype=torch.bfloat16)
    incoming = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = _gradients(fake_quantize, (weight, scale, zero, low, high, SURROGATES[name]), incoming)
    wide = (weight.float(), scale.float(), zero.float(), low, high, SURROGATES[name])
    for got, wanted in zip(found, _gradients(fake_quantize, wide, incoming.float()), strict=True):
        assert torch.equal(got, wanted.bfloat16())


def test_gradients_that_nobody_asked_for_are_left_out() -> None:
    weight, scale, zero, low, high = _planted((4, 2, 8), 3, seed=6)
    full = _gradients(fake_quantize, (weight, scale, zero, low, high, Surrogate()), torch.ones_like(weight))
    scale.requires_grad_()
    fake_quantize(weight, scale, zero, low, high, Surrogate()).sum().backward()
    assert weight.grad is None and zero.grad is None
    assert torch.equal(scale.grad, full[2])


@pytest.mark.parametrize("name", ["ste-hard", "sigmoid-phi"])
@pytest.mark.parametrize("granularity", [1, 16, 48, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_value_equals_the_codecs_to_the_bit(name: str, granularity: int | str, symmetric: bool, bits: int) -> None:
    rows, columns = 6, 48
    generator = torch.Generator().manual_seed(bits)
    fmt = QuantFormat(code_bits=bits, granularity=granularity, symmetric=symmetric)  # pyright: ignore
    groups = fmt.group_count(columns)
    scales = torch.randn((1, 1) if granularity == "tensor" else (rows, groups), generator=generator).half()
    limit = 2 ** (bits - 1)
    zeros = None if symmetric else torch.randint(-limit, limit, scales.shape, generator=generator).to(torch.int8)
    weight = torch.randn((rows, columns), generator=generator) * limit / 2
    shape = (*scales.shape, 1)
    arguments = (
        weight.reshape(rows, groups, -1),
        scales.float().reshape(shape),
        None if zeros is None else zeros.float().reshape(shape),
        -float(limit),
        float(limit - 1),
    )
    codes = nearest_codes(*arguments)
    assert codes.min() >= -limit and codes.max() < limit and len(codes.unique()) > 2
    flat = (1,) if granularity == "tensor" else scales.shape
    stored = QuantizedWeight(
        fmt,
        codes.reshape(rows, columns).to(torch.int8),
        scales.reshape(flat),
        None if zeros is None else zeros.reshape(flat),
    )
    value = fake_quantize(*arguments, SURROGATES[name])
    assert torch.equal(value.reshape(rows, columns), stored.dequantize())


def test_soft_forward_stays_on_the_grid_and_differs_from_the_hard_one() -> None:
    weight, scale, zero, low, high = _planted((64, 4, 16), 2, seed=8)
    soft = fake_quantize(weight, scale, zero, low, high, SURROGATES["sigmoid-soft-forward"]) / scale + zero
    hard = fake_quantize(weight, scale, zero, low, high, SURROGATES["sigmoid-phi"]) / scale + zero
    assert sorted(soft.round().unique().tolist()) == [-2, -1, 0, 1]
    torch.testing.assert_close(soft, soft.round())
    share = (soft.round() != hard.round()).double().mean().item()
    assert 0.03 < share < 0.15


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]).reshape(1, 1, 5)
    one = torch.ones(1, 1, 1)
    assert nearest_codes(weight, one, None, -4.0, 3.0).flatten().tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("weight", "scale", "zero", "text"),
    [
        ((4, 8), (4, 1, 1), None, "the weight is (rows, groups, width), got (4, 8)"),
        ((4, 2, 8), (4, 3, 1), None, "the scale is (4 or 1, 2 or 1, 1), got (4, 3, 1)"),
        ((4, 2, 8), (4, 2), None, "the scale is (4 or 1, 2 or 1, 1), got (4, 2)"),
        ((4, 2, 8), (4, 2, 1), (1, 1, 1), "the zero has the scale's shape (4, 2, 1), got (1, 1, 1)"),
    ],
)
def test_shapes_that_do_not_fit(weight: tuple, scale: tuple, zero: tuple | None, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        shift = None if zero is None else torch.ones(zero)
        fake_quantize(torch.ones(weight), torch.ones(scale), shift, 0.0, 3.0, Surrogate())
    assert str(raised.value) == text
