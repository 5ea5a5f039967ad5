"""The layer that is trained: exact way in and out for every stored form, gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cptquant.core.formats import QuantFormat, block_format
from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight
from cptquant.packing.segments import SegmentedWeight
from cptquant.quantizers.block_grid import round_to_blocks
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_grid import TrainedGrid, start_latent
from cptquant.quantizers.blocks.trained_layer import TrainedLinear, Trains, quantize_tokens
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.slim_round import round_to_segments

FORMATS = ("int2-g16", "int3-g32", "int4-channel", "int4-g16-asym", "int8-tensor", "int3-g24")
CODES_ONLY = Trains(latent=False)


def weight_of(rows: int = 6, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def rounded(name: str, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    """Rounded to nearest, with some scales below zero, as our GPTQ gives them."""
    fmt = QuantFormat.parse(name)
    columns = weight.shape[1]
    width = fmt.granularity if isinstance(fmt.granularity, int) else columns
    low, high = -(2 ** (fmt.code_bits - 1)), 2 ** (fmt.code_bits - 1) - 1
    pieces = weight.split(width, dim=1)
    if fmt.granularity == "tensor":
        steps = (weight.abs().max() / high).reshape(1, 1).to(dtype)
    else:
        steps = torch.stack([piece.abs().amax(dim=1) / high for piece in pieces], dim=1).to(dtype)
        steps[:, ::2] *= -1
    wide = steps.float().repeat_interleave(width, dim=1)[:, :columns]
    zeros = None if fmt.symmetric else torch.full(steps.shape, 1, dtype=torch.int8)
    shift = 0 if zeros is None else 1
    codes = (weight / wide + shift).round().clamp(low, high).to(torch.int8)
    scales = steps.view(-1) if fmt.granularity == "tensor" else steps
    return QuantizedWeight(fmt, codes, scales, zeros)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("trains", [Trains(), CODES_ONLY, Trains(latent=False, multipliers=True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_starts_as_what_it_was_made_from_bit_for_bit(fmt: str, trains: Trains, dtype: torch.dtype) -> None:
    weight = weight_of()
    stored = rounded(fmt, weight, dtype)
    layer = TrainedLinear(stored, weight, torch.ones(6), trains, Surrogate())
    assert torch.equal(layer.weight, stored.dequantize())
    back = layer.stored()
    assert isinstance(back, QuantizedWeight) and isinstance(stored, QuantizedWeight)
    assert torch.equal(back.codes, stored.codes) and torch.equal(back.scales, stored.scales)
    assert (back.zeros is None) == (stored.zeros is None)
    assert back.zeros is None or torch.equal(back.zeros, stored.zeros)
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(inputs), inputs @ stored.dequantize().t() + 1)


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    latent=st.booleans(),
    seed=st.integers(0, 1000),
    size=st.floats(1e-3, 3.0),
)
def test_what_is_trained_is_what_is_written(fmt: str, latent: bool, seed: int, size: float) -> None:
    """However far everything has moved, steps out of range of 16 bits and zero points beyond the codes included."""
    weight = weight_of(seed=seed)
    layer = TrainedLinear(rounded(fmt, weight), weight, None, Trains(latent=latent), Surrogate())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size * (30 if seed % 7 == 0 else 1))
    assert torch.equal(layer.weight, layer.stored().dequantize())


def test_a_latent_starts_at_the_original_where_that_rounds_to_the_code() -> None:
    weight = weight_of()
    stored = rounded("int4-g16", weight)
    latent = start_latent(TrainedGrid.of(stored), weight)
    near = (stored.dequantize() - weight).abs() < 0.49 * stored.scales.float().abs().repeat_interleave(16, dim=1)
    assert 0.9 < float(near.float().mean()) < 1
    torch.testing.assert_close(latent[near], weight[near])
    moved = QuantizedWeight(stored.format, stored.codes.roll(1, dims=1), stored.scales)  # as GPTQ's: seldom the nearest
    layer = TrainedLinear(moved, weight, None, Trains(), Surrogate())
    assert torch.equal(layer.stored().codes, moved.codes)


@pytest.mark.parametrize("fmt", ["int2-g16", "int4-g16-asym", "int4-channel", "int3-g24"])
def test_gradients_of_fixed_codes_are_the_exact_ones(fmt: str) -> None:
    """Against finite differences of the dequantized weight in float64, steps taken unrounded."""
    weight = weight_of(4, 60)
    stored = rounded(fmt, weight)
    layer = TrainedLinear(stored, None, None, CODES_ONLY, Surrogate())
    seed = torch.randn(4, 60, generator=torch.Generator().manual_seed(2))
    (layer.weight * seed).sum().backward()
    grid = TrainedGrid.of(stored)
    codes = grid.codes.double()
    wide = grid.steps.double().repeat_interleave(grid.width, dim=1)[:, :60]
    zeros = 0 if grid.zeros is None else grid.zeros.double().repeat_interleave(grid.width, dim=1)[:, :60]
    by_log = (seed.double() * (codes - zeros) * wide).split(grid.width, dim=1)
    expected = torch.stack([piece.sum(dim=1) for piece in by_log], dim=1)
    factor = (grid.width * max(1.0, float(grid.high))) ** -0.5  # LSQ's
    torch.testing.assert_close(layer.log_steps.grad, (expected * factor).float(), rtol=1e-4, atol=1e-6)
    if grid.zeros is not None:
        by_zero = torch.stack([piece.sum(dim=1) for piece in (-seed.double() * wide).split(grid.width, dim=1)], dim=1)
        torch.testing.assert_close(layer.zeros.grad, by_zero.float(), rtol=1e-4, atol=1e-6)


def test_multipliers_are_ratios_to_the_first_steps() -> None:
    stored = rounded("int4-g16", weight_of())
    layer = TrainedLinear(stored, None, None, Trains(latent=False, multipliers=True), Surrogate())
    with torch.no_grad():
        layer.log_steps.fill_(2.0)
    assert torch.equal(layer.stored().scales, stored.scales * 2)


def test_steps_never_change_sign_or_vanish() -> None:
    stored = rounded("int3-g32", weight_of(), torch.float16)
    layer = TrainedLinear(stored, None, None, CODES_ONLY, Surrogate())
    with torch.no_grad():
        layer.log_steps[0].fill_(-80.0)  # below the smallest float16
        layer.log_steps[1].fill_(80.0)  # above the largest
        layer.log_steps[2].sub_(1.0)
    scales = layer.stored().scales
    assert torch.equal(scales[:2], stored.scales[:2])
    assert torch.equal(scales.sign(), stored.scales.sign())
    assert bool((scales[2].abs() < stored.scales[2].abs()).all())


def test_blocks_of_gguf_keep_their_steps_and_move_their_codes() -> None:
    weight = weight_of(4, 256)
    weight[0] = 0.0  # blocks whose step is zero
    stored = round_to_blocks(weight, block_format("Q4_K"))
    layer = TrainedLinear(stored, weight, None, Trains(), Surrogate())
    assert layer.log_steps is None and layer.zeros is None
    torch.testing.assert_close(layer.weight, stored.dequantize(), rtol=0, atol=1e-6)
    with torch.no_grad():
        layer.latent.add_(weight.std())
    back = layer.stored()
    assert isinstance(back, BlockWeight) and not torch.equal(back.codes, stored.codes)
    torch.testing.assert_close(layer.weight, back.dequantize(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fmt", ["slim2-g32", "slim2-g32-sorted", "slim3-g32"])
def test_mixed_widths_stay_inside_the_limits_of_their_groups(fmt: str) -> None:
    weight = weight_of(8, 128)
    weight[:, 32:64] *= 0.01
    weight[:, 96:] *= 5
    stored = round_to_segments(weight, QuantFormat.parse(fmt), torch.float16)
    assert len(stored.widths.unique()) > 1
    layer = TrainedLinear(stored, weight, None, Trains(), Surrogate())
    assert torch.equal(layer.weight, stored.dequantize())
    with torch.no_grad():
        layer.latent.mul_(50)
        layer.log_steps.add_(0.5)
    back = layer.stored()
    one_bit = stored.widths == 1
    assert torch.equal(back.scales[:, one_bit], stored.scales[:, one_bit])
    assert not torch.equal(back.scales, stored.scales)
    assert isinstance(back, SegmentedWeight) and torch.equal(back.widths, stored.widths)
    for group, width in enumerate(stored.widths.tolist()):
        codes = back.codes[:, group * 32 : group * 32 + 32]
        assert int(codes.min()) >= -(2 ** (width - 1)) and int(codes.max()) <= 2 ** (width - 1) - 1
    assert torch.equal(layer.weight, back.dequantize())


def test_tokens_are_quantized_each_with_a_step_of_its_own() -> None:
    hidden = torch.tensor([[1.0, -127.0, 63.4], [0.0125, 0.0, -0.02]])
    found = quantize_tokens(hidden.requires_grad_(True), 8)
    torch.testing.assert_close(found[0], torch.tensor([1.0, -127.0, 63.0]))
    torch.testing.assert_close(found[1], torch.tensor([79 * 0.02 / 127, 0.0, -0.02]), rtol=1e-5, atol=1e-8)
    found.sum().backward()
    assert torch.equal(hidden.grad, torch.ones(2, 3))
    assert torch.equal(quantize_tokens(torch.zeros(1, 3), 8), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_left_factor_of_a_product_moves_inside_its_bits(dtype: torch.dtype) -> None:
    """Its gradient is the weight's times the right factor; what is stored is what was run, at the codes' ends too."""
    weight = weight_of(8, 64)
    weight += torch.outer(torch.linspace(-1, 1, 8), torch.linspace(1, 2, 64))
    start = Rtn()(weight, QuantFormat.parse("int3-g32-r2"), dtype)
    assert isinstance(start, CorrectedWeight) and isinstance(start.correction, LowRankCorrection)
    layer = TrainedLinear(start, weight, None, Trains(), Surrogate())
    assert layer.left is not None and torch.equal(layer.weight, start.dequantize())
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    layer.weight.backward(gradient)
    expected = gradient @ (start.correction.right.float() / 128).t()
    torch.testing.assert_close(layer.left.grad, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.left += 3.4 * start.correction.scales.float()
        layer.left[0] = -1e6
    stored = layer.stored()
    assert isinstance(stored, CorrectedWeight) and isinstance(stored.correction, LowRankCorrection)
    moved = stored.correction.left.int() - start.correction.left.int()
    assert bool((stored.correction.left[0] == torch.where(start.correction.scales > 0, -128, 127)).all())
    assert bool((moved[1:] == torch.minimum(torch.tensor(3), 127 - start.correction.left[1:].int())).all())
    assert torch.equal(layer.weight, stored.dequantize())
    fixed = TrainedLinear(start, weight, None, CODES_ONLY, Surrogate())
    assert fixed.left is None and torch.equal(fixed.weight, start.dequantize())
