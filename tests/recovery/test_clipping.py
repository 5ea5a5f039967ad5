"""Learned clipping: the papers' formula, the best clip by brute force, SliM's bit map, and the start as the guard."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quantizers.blocks.toys import PACE, Changed, slow_errors, toy, train
from quantizers.test_quantize import make_tokens
from torch import nn

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight, StoredWeight
from cptquant.packing.segments import SegmentedWeight
from cptquant.quantizers.blocks.block_training import Pace, Targets, relative_error, train_block
from cptquant.quantizers.blocks.blockwise import Start
from cptquant.quantizers.blocks.open_block import OpenBlock
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_layer import TrainedLinear, Trains
from cptquant.quantizers.grid import round_to_grid
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.slim_round import round_to_segments
from cptquant.recovery.clipping import PUBLISHED_FIRST, ClippedLinear, LearnedClipping

FORMATS = ("int3-g16", "int2-g16-asym", "int4-channel", "int4-channel-asym", "int4-tensor-asym", "int3-g24")


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3


def start_of(weight: torch.Tensor, name: str) -> StoredWeight:
    fmt = QuantFormat.parse(name)
    if fmt.storage == "segments":
        return round_to_segments(weight, fmt, torch.bfloat16, clip=False)
    return Rtn()(weight, fmt, torch.bfloat16)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_asymmetric_clips_are_the_papers(bits: int) -> None:
    weight = matrix(4, 48)
    layer = ClippedLinear(start_of(weight, f"int{bits}-g16-asym"), weight, None)
    generator = torch.Generator().manual_seed(1)
    for clip in layer.clips():
        clip.data = 2 * torch.randn(clip.shape, generator=generator)
    found = layer.weight.detach()
    levels = 2**bits - 1
    for row in range(4):
        for group in range(3):
            w = weight[row, 16 * group : 16 * group + 16].double().numpy()
            gamma, beta = (float(clip[row, group].detach().sigmoid()) for clip in layer.clips())
            step = (gamma * max(w.max(), 0) - beta * min(w.min(), 0)) / levels
            step = float(torch.tensor(step).to(torch.bfloat16))  # as stored
            zero = np.clip(-np.round(beta * min(w.min(), 0) / step), 0, levels)
            expected = (np.clip(np.round(w / step) + zero, 0, levels) - zero) * step
            # A code may differ where float32 and float64 fall on either side of a threshold.
            away = np.abs(found[row, 16 * group : 16 * group + 16].double().numpy() - expected) > 1e-5
            assert away.sum() <= 1, (row, group)


def test_a_symmetric_clip_scales_the_step_that_clips_nothing() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.5, -1.0], [0.3, 0.2, 1.0, -0.4], [0.1, 0.2, -0.7, 0.7]])
    scales = torch.tensor([[0.5], [-0.5], [0.5]], dtype=torch.bfloat16)
    start = QuantizedWeight(QuantFormat.parse("int2-g4"), torch.zeros(3, 4, dtype=torch.int8), scales)
    layer = ClippedLinear(start, weight, None, PUBLISHED_FIRST)
    share = float(torch.sigmoid(torch.tensor(4.0)))
    # Levels -2 .. 1 times the step: -1.0 needs 1/2, 1.0 on a grid turned over 1/2, and 0.7 upright 0.7.
    expected = (torch.tensor([[0.5], [-0.5], [0.7]]) * share).to(torch.bfloat16).float()
    assert torch.equal(layer.present_grid()[0].detach(), expected)
    layer.gamma.data.fill_(20.0)
    assert float((layer.weight.detach() - weight).abs().max()) <= 0.36  # half a step: nothing is clipped


@pytest.mark.parametrize("name", ("int3-g16", "int3-g16-asym", "int4-tensor-asym"))
def test_it_begins_where_the_start_clips(name: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    whole = start_of(weight, name)
    assert isinstance(whole, QuantizedWeight)
    start = replace(whole, scales=(0.6 * whole.scales.float()).to(torch.bfloat16))
    steps, zeros = ClippedLinear(start, weight, None).present_grid()
    wanted = start.scales.float().view_as(steps)
    assert float((steps.detach() / wanted - 1).abs().max()) < 0.01  # as stored in 16 bits
    if start.zeros is not None and zeros is not None:
        assert float((zeros.detach() - start.zeros.float().view_as(zeros)).abs().max()) <= 1
    first = ClippedLinear(start, weight, None, PUBLISHED_FIRST)
    assert all(bool((clip == 4.0).all()) for clip in first.clips())


MIXED = ("slim2-g32", "slim3-g32", "slim2-g32-sorted", "slim3-g32-sorted")
CORRECTED = ("int3-g16-c5", "int4-channel-asym-c10", "int3-g16-r2", "int4-channel-asym-r3")


@pytest.mark.parametrize("name", (*FORMATS, *MIXED, *CORRECTED))
@pytest.mark.parametrize("kind", ("clipped", "trained"))
def test_what_is_stored_is_what_was_run(name: str, kind: str) -> None:
    weight = matrix(6, 96 if "slim" in name else 64)
    start, bias = start_of(weight, name), torch.randn(6)
    layer: ClippedLinear | TrainedLinear = (
        ClippedLinear(start, weight, bias)
        if kind == "clipped"
        else TrainedLinear(start, weight, bias, Trains(), Surrogate())
    )
    if kind == "trained":
        assert torch.equal(layer.weight, start.dequantize())
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    stored = layer.stored()
    assert torch.equal(layer.weight, stored.dequantize())
    if isinstance(start, CorrectedWeight) and isinstance(stored, CorrectedWeight):
        if kind == "trained" and isinstance(start.correction, LowRankCorrection):  # the left factor moves as well
            assert torch.equal(stored.correction.right, start.correction.right)
            assert torch.equal(stored.correction.scales, start.correction.scales)
            assert not torch.equal(stored.correction.left, start.correction.left)
        else:
            assert stored.correction is start.correction
        assert not torch.equal(stored.codes, start.codes)
    hidden = torch.randn(2, 5, weight.shape[1], generator=generator)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, stored.dequantize(), bias))
    if isinstance(stored, SegmentedWeight) and isinstance(start, SegmentedWeight):
        assert torch.equal(stored.widths, start.widths)
        assert float(stored.widths.float().mean()) == stored.format.code_bits
        one_bit = start.widths == 1
        assert torch.equal(stored.scales[:, one_bit], start.scales[:, one_bit])
        assert not torch.equal(stored.scales[:, ~one_bit], start.scales[:, ~one_bit])


@dataclass
class OneLayer:
    """Text for a block that is one linear layer: what `train_block` asks of it."""

    inputs: list[torch.Tensor]
    weight: torch.Tensor

    @property
    def stream(self) -> SimpleNamespace:
        return SimpleNamespace(batches=self.inputs)

    def run(self, block: nn.Module, batch: int) -> tuple[torch.Tensor, Targets]:
        states = self.inputs[batch]
        return block(states), Targets(states @ self.weight.t(), None, torch.ones(*states.shape[:2], 1).bool())

    @torch.no_grad()
    def error(self, block: nn.Module) -> float:
        found = [self.run(block, batch) for batch in range(len(self.inputs))]
        return float(sum(relative_error(output, targets.followed, targets.mask) for output, targets in found))


def learn(weight: torch.Tensor, start: StoredWeight, method: LearnedClipping) -> StoredWeight:
    rows, columns = weight.shape
    site = Site(name="blocks.0.x", out_features=rows, in_features=columns, block_index=0, kind="linear")
    block = nn.Sequential()
    block.add_module("x", nn.Linear(columns, rows, bias=False).requires_grad_(False))
    block.x.weight.copy_(start.dequantize())
    layout = SimpleNamespace(sites=(site,), site_by_name={site.name: site}, storage_dtype="bfloat16", kept=())
    opened = OpenBlock(layout, "blocks.0.", 0, block, {site.name: start}, {site.name: weight})  # type: ignore[arg-type]
    inputs = [torch.randn(4, 32, columns, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    learned_on, judged = OneLayer(inputs[:8], weight), OneLayer(inputs[8:], weight)
    found, look = train_block(opened, method, learned_on, judged, 240, lambda step: None)  # type: ignore[arg-type]
    assert look.held_out_end <= look.held_out_start
    assert torch.equal(block.x.weight, found.weights[site.name].dequantize())
    return found.weights[site.name]


@pytest.mark.parametrize("first", (None, PUBLISHED_FIRST))
def test_the_best_clip_of_a_group_is_found(first: float | None) -> None:
    """Uncorrelated inputs: the output's error is the weight's, and rows do not depend on each other."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 5] = torch.linspace(2.5, 6, 12)  # an outlier that clips nothing of the rest if it is kept
    fmt = QuantFormat.parse("int3-g64")
    start = round_to_grid(weight, fmt, torch.bfloat16, clip_search=False)
    assert isinstance(start, QuantizedWeight)
    layer = ClippedLinear(start, weight, None)
    least, before = torch.full((12,), torch.inf), (start.dequantize() - weight).square().sum(dim=1)
    for share in torch.linspace(0.05, 0.999, 800):
        layer.gamma.data.fill_(float(torch.logit(share)))
        least = torch.minimum(least, (layer.weight.detach() - weight).square().sum(dim=1))
    learned = learn(weight, start, LearnedClipping(Pace(batch_sequences=4, checks=12), rate=0.05, first=first))
    error = (learned.dequantize() - weight).square().sum(dim=1)
    assert float(least.sum()) < 0.8 * float(before.sum()), "clipping has something to win"
    left = (error - least) / (before - least)
    assert float(left.mean()) < 0.15, left


def test_a_start_that_is_better_than_rounding_anew_stays(tmp_path: Path) -> None:
    model, tokens = toy("llama", tmp_path), make_tokens()
    weights = {}
    for site in model.layout.block_sites:  # the originals lie on this grid; rounding under a clip can only lose
        original = model.module.get_submodule(site.name).weight
        exact = Rtn()(original.detach(), QuantFormat.parse("int4-g16"), torch.bfloat16)
        original.data.copy_(exact.dequantize())
        weights[site.name] = exact
    method = LearnedClipping(replace(PACE, epochs=1), rate=0.001)
    trained = train(model, Start(MemoryWeights(weights), {}), method, tokens)
    for look in trained.looks:
        assert look.best_step is None and look.held_out[0] > 2 * look.held_out_start
        assert look.sentence.endswith("no step was better, the start was kept")
    assert all(weight is weights[site] for site, weight in trained.weights.items())


@pytest.mark.parametrize("alike", (0.0, 1.0))
def test_mixed_widths_keep_their_bit_map(alike: float, tmp_path: Path) -> None:
    model, tokens = toy("llama-wide", tmp_path), make_tokens()
    weights = {
        site.name: start_of(model.module.get_submodule(site.name).weight.detach().float(), "slim2-g32")
        for site in model.layout.block_sites
        if site.in_features % 64 == 0
    }
    trained = train(model, Start(MemoryWeights(weights), {}), LearnedClipping(PACE, rate=0.1, alike=alike), tokens)
    moved = 0
    for site, weight in trained.weights.items():
        start = weights[site]
        assert isinstance(weight, SegmentedWeight) and isinstance(start, SegmentedWeight)
        assert torch.equal(weight.widths, start.widths)
        moved += not torch.equal(weight.scales, start.scales)
    assert moved > 0
    errors = slow_errors(model, Changed(weights | trained.weights, {}), tokens, PACE)
    assert [look.held_out_end for look in trained.looks] == pytest.approx(errors, rel=1e-4)


def test_the_second_loss_is_the_distance_from_the_original_on_the_same_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    output, followed, alike = torch.randn(3, 2, 3, 4, generator=generator)
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    method = LearnedClipping(alike=0.5)
    assert method.wants_alike and not LearnedClipping().wants_alike
    expected = sum(
        share * float((output - target).square().sum() / target.square().sum())
        for share, target in ((1.0, followed), (0.5, alike))
    )
    assert float(method.loss(output, Targets(followed, alike, mask))) == pytest.approx(expected, rel=1e-6)
