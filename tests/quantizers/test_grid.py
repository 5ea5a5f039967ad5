"""Scales: stored in 16 bits before anything is rounded, never zero, and better than covering the largest weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.quantizers.grid import fit_grid, round_scale, round_to_grid
from cptquant.quantizers.rtn import Rtn


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: torch.Tensor, quantized) -> float:
    return float((quantized.dequantize() - weight).square().sum() / weight.square().sum())


@settings(deadline=None, max_examples=100)
@given(
    st.integers(2, 8),
    st.one_of(st.sampled_from(["channel", "tensor"]), st.sampled_from([1, 7, 16, 32])),
    st.booleans(),
    st.tuples(st.integers(1, 9), st.integers(1, 80)),
    st.integers(0, 2**31),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_every_shape_gives_legal_codes_and_a_bounded_error(bits, granularity, symmetric, shape, seed, dtype) -> None:
    fmt = QuantFormat(code_bits=bits, granularity=granularity, symmetric=symmetric)
    weight = normal(*shape, seed=seed)
    for clip_search in (False, True):
        quantized = Rtn(clip_search=clip_search)(weight, fmt, dtype)
        assert quantized.codes.min() >= -(2 ** (bits - 1)) and quantized.codes.max() <= 2 ** (bits - 1) - 1
        assert quantized.scales.dtype is dtype and (quantized.scales != 0).all()
        assert torch.isfinite(quantized.dequantize()).all()
    plain, searched = (round_to_grid(weight, fmt, dtype, clip_search=search) for search in (False, True))
    # The whole range of an unclipped grid is covered: half a step, the scale's rounding and the zero point's.
    reach = plain.scales.float().abs().max() * (0.5 if symmetric else 1.0)
    slack = weight.abs().max() * torch.finfo(dtype).eps
    assert (plain.dequantize() - weight).abs().max() <= reach + slack
    assert squared_error(weight, searched) <= squared_error(weight, plain) * (1 + 1e-5)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.6), (3, 0.85), (4, 0.95)])
def test_clip_search_pays_at_few_bits(bits: int, gain: float) -> None:
    weight, fmt = normal(64, 256), QuantFormat(code_bits=bits, granularity=64)
    plain, searched = (round_to_grid(weight, fmt, torch.float16, clip_search=search) for search in (False, True))
    assert squared_error(weight, searched) < gain * squared_error(weight, plain)


def test_clip_search_comes_close_to_an_exhaustive_search() -> None:
    weight = normal(16, 64)
    for bits in (2, 3, 4):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        largest = weight.abs().amax(dim=1, keepdim=True) / -low
        best = torch.full((16,), torch.inf)
        for factor in torch.cat([torch.linspace(0.1, 2.0, 2000), -torch.linspace(0.1, 2.0, 2000)]):
            scale = (largest * factor).bfloat16().float()
            error = ((weight / scale).round().clamp(low, high) * scale - weight).square().sum(dim=1)
            best = torch.minimum(best, error)
        quantized = round_to_grid(weight, QuantFormat(code_bits=bits), torch.bfloat16)
        found = (quantized.dequantize() - weight).square().sum(dim=1)
        assert (found >= best * (1 - 1e-5)).all()
        assert found.sum() < 1.02 * best.sum()


def test_the_far_level_goes_to_the_side_that_needs_it() -> None:
    fmt = QuantFormat(code_bits=2)
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0]])
    quantized = Rtn()(weight, fmt, torch.float16)
    assert torch.equal(quantized.dequantize(), weight)
    assert quantized.scales.flatten().tolist() == [1.0, -1.0]


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    weight, fmt = normal(32, 64), QuantFormat(code_bits=2, granularity=64)
    importance = torch.ones(64)
    importance[:8] = 100
    even = Rtn()(weight, fmt, torch.float16).dequantize() - weight
    weighted = Rtn()(weight, fmt, torch.float16, importance=importance).dequantize() - weight
    assert (weighted.square() @ importance).sum() < 0.8 * (even.square() @ importance).sum()
    assert weighted.square().sum() > even.square().sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [8, "channel", "tensor"])
def test_zeros_stay_zero_with_scale_one(granularity: int | str, symmetric: bool) -> None:
    fmt = QuantFormat(code_bits=4, granularity=granularity, symmetric=symmetric)
    weight = normal(4, 24)
    weight[1] = 0
    weight[:, 8:16] = 0
    quantized = Rtn()(weight, fmt, torch.float16)
    assert torch.equal(quantized.dequantize()[weight == 0], torch.zeros(int((weight == 0).sum())))
    if granularity == 8:
        assert (quantized.scales[:, 1] == 1).all() and (quantized.scales[1] == 1).all()
    nothing = Rtn()(torch.zeros(3, 24), fmt, torch.bfloat16)
    assert (nothing.scales == 1).all() and (nothing.dequantize() == 0).all()


def test_rounded_scale_is_used_for_rounding_the_weights() -> None:
    weight = torch.tensor([[7.0, -8.0, 3.0, 1.0]]) * 1.001
    quantized = Rtn(clip_search=False)(weight, QuantFormat(code_bits=4), torch.bfloat16)
    assert quantized.scales.item() == 1.0  # bfloat16 has no 1.001
    assert torch.equal(quantized.dequantize(), torch.tensor([[7.0, -8.0, 3.0, 1.0]]))


def test_scales_at_the_ends_of_the_storage_dtype() -> None:
    tiny = round_scale(torch.tensor([1e-12, -1e-12, 0.0, 3e-8]), torch.float16)
    assert tiny.tolist() == [2.0**-24, -(2.0**-24), 1.0, 2.0**-24]
    small = normal(4, 32) * 1e-9
    assert torch.isfinite(Rtn()(small, QuantFormat(code_bits=4), torch.float16).dequantize()).all()
    with pytest.raises(ModelError, match=r"needs a scale of 1e\+06, beyond the 6.55e\+04 of float16; convert"):
        round_scale(torch.tensor([1e6, 1.0]), torch.float16)
    assert round_scale(torch.tensor([1e6]), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(value: float) -> None:
    weight = normal(2, 32)
    weight[1, 3] = value
    with pytest.raises(ModelError, match="a weight to quantize is NaN or infinite"):
        Rtn()(weight, QuantFormat(code_bits=4), torch.float16)


def test_search_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fmt = normal(50, 16), QuantFormat(code_bits=3)
    importance = normal(50, 16, seed=1).abs()
    whole = fit_grid(rows, fmt, torch.float16, importance=importance)
    monkeypatch.setattr("cptquant.quantizers.grid._CHUNK_ENTRIES", 100)
    assert torch.equal(fit_grid(rows, fmt, torch.float16, importance=importance).scales, whole.scales)
