"""The stand-ins for rounding and clamping, against published tables, finite differences and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cptquant.core.errors import UserError
from cptquant.quantizers.blocks.clamp_gradient import through_clamp
from cptquant.quantizers.blocks.surrogates import (
    Surrogate,
    round_slope,
    rounded_surrogate,
    soft_clamp,
    soft_clamp_slopes,
)

GATES = {
    "phi": Surrogate(clamp="soft", gate="phi"),
    "sigmoid1": Surrogate(clamp="soft", beta=1.0),
    "sigmoid4": Surrogate(clamp="soft", beta=4.0),
}


def _stair(sharpness: float, normalised: bool = True) -> Surrogate:
    return Surrogate(rounding="sigmoid", sharpness=sharpness, normalised=normalised)


def _limits(bits: int) -> tuple[float, float]:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


# Slope at a threshold, at an integer, mass over a period, jump of the literal reading (2 sig(-T)).
@pytest.mark.parametrize(
    ("sharpness", "at_threshold", "at_integer", "mass", "jump"),
    [
        (1, 0.447, 0.470, 0.462, 0.538),
        (2, 0.710, 0.786, 0.762, 0.238),
        (4, 1.071, 0.840, 0.964, 0.036),
        (6, 1.515, 0.542, 0.995, 0.005),
        (8, 2.003, 0.283, 0.999, 0.001),
        (10, 2.500, 0.133, 1.000, 0.0),
        (20, 5.000, 0.002, 1.000, 0.0),
    ],
)
def test_table_of_slopes(sharpness: float, at_threshold: float, at_integer: float, mass: float, jump: float) -> None:
    raw = _stair(sharpness, normalised=False)
    where = torch.tensor([2.5, 3.0], dtype=torch.float64)
    assert round_slope(where, raw).tolist() == pytest.approx([at_threshold, at_integer], abs=6e-4)
    period = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert round_slope(period, raw).mean().item() == pytest.approx(math.tanh(sharpness / 2), abs=1e-8)
    assert round_slope(period, _stair(sharpness)).mean().item() == pytest.approx(1, abs=1e-8)
    assert math.tanh(sharpness / 2) == pytest.approx(mass, abs=6e-4)
    sides = torch.tensor([2.5 - 1e-9, 2.5 + 1e-9], dtype=torch.float64)
    below, above = rounded_surrogate(sides, raw).tolist()
    assert above - below == pytest.approx(jump, abs=6e-4)
    below, above = rounded_surrogate(sides, _stair(sharpness)).tolist()
    assert above == pytest.approx(below, abs=1e-7)


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 4.0, 6.0, 74.9, 75.1, 1000.0])
@pytest.mark.parametrize("normalised", [True, False])
def test_stair_equals_the_printed_sum_of_two_logistic_curves(sharpness: float, normalised: bool) -> None:
    x = torch.linspace(-3.3, 3.3, 1001, dtype=torch.float64)
    v = x + 0.5
    u = v - v.floor()
    mass = math.tanh(sharpness / 2) if normalised else 1.0
    curves = torch.sigmoid(sharpness * u), torch.sigmoid(sharpness * (u - 1))
    printed = v.floor() + (curves[0] + curves[1] - 1) / mass
    slope = sharpness * sum(curve * (1 - curve) for curve in curves) / mass
    surrogate = _stair(sharpness, normalised)
    torch.testing.assert_close(rounded_surrogate(x, surrogate), printed, atol=1e-11, rtol=0)
    torch.testing.assert_close(round_slope(x, surrogate), slope, atol=1e-9, rtol=1e-9)
    single = round_slope(x.float(), surrogate)
    torch.testing.assert_close(single.double(), slope, atol=2e-4 * max(1.0, sharpness), rtol=1e-3)


def test_slope_is_larger_at_a_threshold_only_from_sharpness_3_06() -> None:
    where = torch.tensor([0.5, 0.0], dtype=torch.float64)
    for sharpness, larger in ((3.05, False), (3.07, True)):
        at_threshold, at_integer = round_slope(where, _stair(sharpness)).tolist()
        assert (at_threshold > at_integer) is larger


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("normalised", [True, False])
def test_gradcheck_of_the_stair_away_from_thresholds(sharpness: float, normalised: bool) -> None:
    surrogate = _stair(sharpness, normalised)
    x = torch.tensor([-2.4, -0.3, 0.0, 0.49, 0.51, 7.2], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: rounded_surrogate(x, surrogate), x)
    (slope,) = torch.autograd.grad(rounded_surrogate(x, surrogate).sum(), x)
    torch.testing.assert_close(round_slope(x, surrogate), slope, atol=1e-12, rtol=1e-10)


def test_straight_through_is_the_identity() -> None:
    x = torch.randn(9, requires_grad=True)
    assert torch.equal(rounded_surrogate(x, Surrogate()), x)
    assert torch.equal(round_slope(x, Surrogate()), torch.ones(9))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("limits", [(-2.0, 1.0), (0.0, 3.0), (-8.0, 7.0)])
def test_gradcheck_of_the_soft_clamp_in_x_and_both_limits(gate: str, limits: tuple[float, float]) -> None:
    x = torch.linspace(limits[0] - 3, limits[1] + 3, 23, dtype=torch.float64, requires_grad=True)
    low, high = (torch.full_like(x, limit, requires_grad=True) for limit in limits)
    assert gradcheck(lambda x, a, b: soft_clamp(x, a, b, GATES[gate]), (x, low, high))
    expected = torch.autograd.grad(soft_clamp(x, low, high, GATES[gate]).sum(), (x, low, high))
    for slope, wanted in zip(soft_clamp_slopes(x, *limits, GATES[gate]), expected, strict=True):
        torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("gate", "overshoot"), [("phi", 0.170), ("sigmoid1", 0.278), ("sigmoid4", 0.070)])
def test_overshoot_of_a_limit(gate: str, overshoot: float) -> None:
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    f = soft_clamp(x, *_limits(4), GATES[gate])
    assert max(f.max().item() - 7, -8 - f.min().item()) == pytest.approx(overshoot, abs=6e-4)
    for bits in (2, 3, 8):
        low, high = _limits(bits)
        wide = torch.linspace(low - 20, high + 20, 100_001, dtype=torch.float64)
        f = soft_clamp(wide, low, high, GATES[gate])
        assert max(f.max().item() - high, low - f.min().item()) < 0.5, bits


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_range_of_the_slope(gate: str, bits: int) -> None:
    low, high = _limits(bits)
    slope = soft_clamp_slopes(torch.linspace(low - 9, high + 9, 200_001, dtype=torch.float64), low, high, GATES[gate]).x
    largest = {"phi": 1.129, "sigmoid1": 1.100, "sigmoid4": 1.100}[gate]
    if bits <= 3:  # the two ends overlap
        largest = {("phi", 2): 1.259, ("sigmoid1", 2): 1.116, ("sigmoid1", 3): 1.142}.get((gate, bits), largest)
    assert slope.max().item() == pytest.approx(largest, abs=6e-4)
    smallest = -0.129 if gate == "phi" else -0.0930 if (gate, bits) == ("sigmoid1", 2) else -0.0998
    assert slope.min().item() == pytest.approx(smallest, abs=6e-4)


# Per cent of points in [a - 4, b + 4] whose code changes under a soft forward pass, and of those in [a, b].
@pytest.mark.parametrize(
    ("bits", "gate", "anywhere", "inside"),
    [
        (2, "phi", 2.7, 9.9), (2, "sigmoid1", 0.7, 2.6), (2, "sigmoid4", 1.0, 3.6),
        (3, "phi", 3.6, 7.8), (3, "sigmoid1", 7.8, 16.7), (3, "sigmoid4", 0.8, 1.7),
        (4, "phi", 2.4, 3.6), (4, "sigmoid1", 7.3, 11.2), (4, "sigmoid4", 0.5, 0.8),
        (6, "phi", 0.8, 0.9), (6, "sigmoid1", 2.4, 2.7), (6, "sigmoid4", 0.2, 0.2),
        (8, "phi", 0.2, 0.2), (8, "sigmoid1", 0.6, 0.7),
    ],
)  # fmt: skip
def test_share_of_codes_that_a_soft_forward_changes(bits: int, gate: str, anywhere: float, inside: float) -> None:
    low, high = _limits(bits)
    x = torch.linspace(low - 4, high + 4, 200_001, dtype=torch.float64)
    soft = soft_clamp(x, low, high, GATES[gate]).round().clamp(low, high)
    changed = soft != x.clamp(low, high).round()
    assert 100 * changed.double().mean().item() == pytest.approx(anywhere, abs=0.06)
    assert 100 * changed[(x >= low) & (x <= high)].double().mean().item() == pytest.approx(inside, abs=0.06)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "limits", [*(_limits(bits) for bits in (2, 3, 4, 6, 8)), (0.0, 3.0), (0.0, 255.0), (-1.0, 0.0)]
)
def test_gradient_through_the_clamp_equals_the_readable_slopes(
    gate: str, dtype: torch.dtype, limits: tuple[float, float]
) -> None:
    low, high = limits
    x = torch.cat([torch.linspace(low - 9, high + 9, 3001), torch.tensor([-1e6, -700.0, 700.0, 1e6])]).to(dtype)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = soft_clamp_slopes(x.double(), low, high, GATES[gate]).x * gradient.double()
    as_tensors = torch.full_like(x, low), torch.full_like(x, high)
    for a, b in ((low, high), as_tensors):
        found = through_clamp(gradient, x, a, b, GATES[gate])
        tolerance = 1e-10 if dtype is torch.float64 else 1e-5 + 5e-7 * (high - low)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=1e-5)


@given(st.integers(-9, 0), st.integers(1, 15), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=30, deadline=None)
def test_gradient_through_the_hard_clamp_equals_torchs(low: int, width: int, dtype: torch.dtype) -> None:
    x = torch.linspace(-16, 16, 129, dtype=dtype, requires_grad=True)
    (expected,) = torch.autograd.grad(x.clamp(low, low + width).sum(), x)
    ones = torch.ones_like(x)
    for a, b in ((float(low), float(low + width)), (torch.full_like(x, low), torch.full_like(x, low + width))):
        assert torch.equal(through_clamp(ones, x.detach(), a, b, Surrogate()), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rounding": "tanh"}, "--rounding 'tanh' is not known; use one of ste, sigmoid"),
        ({"clamp": "none"}, "--clamp 'none' is not known; use one of hard, soft"),
        ({"gate": "gelu"}, "--gate 'gelu' is not known; use one of phi, sigmoid"),
        ({"sharpness": 0.0}, "--sharpness 0 is not a finite number above 0; 4 to 8 is the useful range"),
        ({"sharpness": math.nan}, "--sharpness nan is not a finite number above 0; 4 to 8 is the useful range"),
        ({"beta": -1.0}, "--gate-beta -1 is not a finite number above 0; 1 is Swish, 4 changes the fewest codes"),
        ({"beta": math.inf}, "--gate-beta inf is not a finite number above 0; 1 is Swish, 4 changes the fewest codes"),
        (
            {"soft_forward": True},
            "the soft forward pass is the soft clamp's, but --clamp is 'hard'; "
            "use --clamp soft, or leave the soft forward pass out",
        ),
    ],
)
def test_values_that_are_not_allowed(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as raised:
        Surrogate(**arguments)  # pyright: ignore[reportArgumentType]
    assert str(raised.value) == text
