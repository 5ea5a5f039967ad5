"""Grids of GGUF blocks against brute force and ggml's own rounding; GPTQ and descent against plain references."""

import gguf
import numpy as np
import pytest
import torch

from cptquant.core.errors import ModelError
from cptquant.core.formats import block_format
from cptquant.core.gguf_types import BLOCK_LAYOUTS
from cptquant.quantizers.block_affine import fit_affine
from cptquant.quantizers.block_descent import descend_blocks_, empty_placed
from cptquant.quantizers.block_gptq import BlockLoop
from cptquant.quantizers.block_grid import fit_blocks, round_to_blocks
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.rtn import Rtn

NAMES = sorted(BLOCK_LAYOUTS)


def problem(rows=12, columns=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05 * (0.5 + torch.rand(rows, 1, generator=generator))
    mixing = torch.randn(columns, columns, generator=generator) * (0.95 ** torch.arange(columns).float())
    inputs = torch.randn(600, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    return weight, inputs.t() @ inputs / 600


def squared_error(weight, stored, hessian):
    error = stored.dequantize() - weight
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_are_found_again(name):
    """A matrix that already lies on a grid of the type loses next to nothing."""
    planted = round_to_blocks(problem(seed=3)[0], block_format(name))
    again = round_to_blocks(planted.dequantize(), block_format(name))
    error = (again.dequantize() - planted.dequantize()).square().sum() / planted.dequantize().square().sum()
    assert float(error) < {2: 2e-2, 3: 3e-3}.get(BLOCK_LAYOUTS[name].code_bits, 2e-4)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_search_beats_ggmls_own_rounding(name):
    weight, _ = problem(rows=32)
    kind = gguf.GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    ours = round_to_blocks(weight, block_format(name)).dequantize()
    assert (ours - weight).square().sum() < 0.98 * (theirs - weight).square().sum()


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K", "Q4_1"])
def test_affine_fits_come_near_brute_force(name):
    layout = BLOCK_LAYOUTS[name]
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(20, layout.sub_block, generator=generator)
    importance = 0.2 + torch.rand(20, layout.sub_block, generator=generator)
    step, offset = fit_affine(rows, importance, layout)
    found = affine_error(rows, importance, step[:, None], offset[:, None], layout.highest_code)[:, 0]
    best = brute_force_affine(rows, importance, layout)
    assert float((found / best).mean()) < 1.06
    assert bool((found < 1.6 * best).all())


def affine_error(rows, importance, step, offset, top):
    """(n, candidates)."""
    shifted = (rows[:, None] - offset[..., None]) / step.clamp(min=1e-9)[..., None]
    values = shifted.round().clamp(0, top) * step[..., None] + offset[..., None]
    return ((values - rows[:, None]).square() * importance[:, None]).sum(-1)


def brute_force_affine(rows, importance, layout):
    low, high = rows.amin(1), rows.amax(1)
    if layout.minimum == "integer":
        low = low.clamp(max=0)
    least = torch.full((len(rows),), torch.inf)
    for down in np.linspace(0.35, 1.05, 48):
        start = low * down if layout.minimum == "integer" else low + (1 - down) * (high - low) / 2
        ups = torch.linspace(0.35, 1.05, 48)
        step = ((high[:, None] * ups) - start[:, None]).clamp(min=0) / layout.highest_code
        error = affine_error(rows, importance, step, start[:, None].expand_as(step), layout.highest_code)
        least = torch.minimum(least, error.amin(1))
    return least


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_weighted_error(name):
    weight, _ = problem(rows=24)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3
    plain, weighted = (
        (round_to_blocks(weight, block_format(name), importance=h).dequantize() - weight).square() @ importance
        for h in (None, importance)
    )
    assert float(weighted.sum()) < float(plain.sum())


@pytest.mark.parametrize("name", NAMES)
def test_gptq_beats_rounding_and_descent_beats_gptq(name):
    weight, hessian = problem()
    fmt = block_format(name)
    rounded = squared_error(weight, Rtn()(weight, fmt, torch.float16, importance=hessian.diagonal()), hessian)
    once = squared_error(weight, Gptq(descent_rounds=0)(weight, hessian, fmt, torch.float16).weight, hessian)
    more = squared_error(weight, Gptq(descent_rounds=3)(weight, hessian, fmt, torch.float16).weight, hessian)
    assert once < 0.8 * rounded
    assert more < once


@pytest.mark.parametrize(("name", "count"), [("Q2_K", 512), ("Q4_0", 96), ("Q4_1", 96)])
def test_the_loop_is_gptq_column_by_column(name, count):
    """Against a plain loop over columns with explicit inverses, on the grids that the loop chose."""
    weight, hessian = problem(rows=5, columns=count, seed=2)
    layout = BLOCK_LAYOUTS[name]
    factor = factor_hessian(hessian, 0.01, by_activation=False)
    columns = weight.t().contiguous()
    placed = BlockLoop(columns, factor.feedback, layout, factor.importance, search=True).run()
    steps = placed.layout.sub_block
    left = columns.double().clone()
    damped = factor.damped.double()
    differing = 0
    for index in range(count):
        remaining = torch.linalg.inv(damped[index:, index:])
        step, offset = placed.step(index // steps).double(), placed.offset(index // steps)
        shifted = left[index] if offset is None else left[index] - offset.double()
        safe = torch.where(step == 0, torch.ones_like(step), step)
        codes = (shifted / safe).round().clamp(layout.lowest_code, layout.highest_code)
        differing += int((codes != placed.codes[index].double()).sum())
        taken = placed.codes[index].double()  # go on from the loop's own, so that one tie does not spoil the rest
        value = taken * step + (0 if offset is None else offset.double())
        error = (left[index] - value) / remaining[0, 0]
        left[index:] -= remaining[:, :1] * error
    assert differing <= 5 * count * 0.002  # ties that float32 and float64 break differently


@pytest.mark.parametrize("name", NAMES)
def test_descent_never_raises_the_error_of_a_row(name):
    weight, hessian = problem(rows=9, seed=4)
    layout = BLOCK_LAYOUTS[name]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)
    columns = weight.t().contiguous()
    placed = empty_placed(256, 9, layout)
    for block in range(256 // layout.block_columns):
        part = slice(block * layout.block_columns, (block + 1) * layout.block_columns)
        grid = fit_blocks(weight[:, part], layout)
        placed.set_grid(block, grid)
        placed.codes[part] = grid.round(weight[:, part].contiguous()).t()
    before = row_errors(placed, columns, damped)
    for _ in range(3):
        descend_blocks_(placed, columns, damped, 1)
        after = row_errors(placed, columns, damped)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    stored = placed.weight(slice(0, 9), block_format(name))
    assert torch.equal(stored.dequantize().t(), placed.values())


def row_errors(placed, columns, hessian):
    error = placed.values() - columns
    return ((hessian @ error) * error).sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name):
    weight, hessian = problem(rows=4)
    weight[1] = 0
    for stored in (
        round_to_blocks(weight, block_format(name)),
        Gptq()(weight, hessian, block_format(name), torch.float16).weight,
    ):
        assert float(stored.dequantize()[1].abs().max()) == 0
        assert bool(torch.isfinite(stored.dequantize()).all())


def test_bad_weights_are_refused():
    weight, _ = problem(rows=2)
    weight[0, 7] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        round_to_blocks(weight, block_format("Q4_K"))
    weight[0, 7] = 1e9
    with pytest.raises(ModelError, match=r"beyond (float16's 65504|the 6.55e\+04 of float16)"):
        round_to_blocks(weight, block_format("Q4_0"))


def test_matrices_that_go_together_give_what_they_give_alone():
    weight, hessian = problem(rows=20)
    fmt = block_format("Q3_K")
    together = Gptq().quantize_together([weight[:7], weight[7:]], hessian, fmt, torch.float16)
    alone = Gptq()(weight, hessian, fmt, torch.float16)
    assert torch.equal(torch.cat([part.weight.codes for part in together]), alone.weight.codes)
