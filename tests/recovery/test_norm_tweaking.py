"""Norm Tweaking: the paper's loss against a slow one, a planted change of the norms, and nothing else touched."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quantizers.blocks.toys import PACE, rounded, toy, train
from quantizers.test_quantize import make_tokens

from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.quantizers.blocks.blockwise import Start
from cptquant.recovery.norm_tweaking import PUBLISHED, NormTweaking, statistics_distance


def test_the_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 4, generator=generator)
    mask = torch.ones(3, 5, 1, dtype=torch.bool)
    mask[1, 2:] = False
    real = [(row, position) for row in range(3) for position in range(5) if mask[row, position]]
    total = 0.0
    for channel in range(4):
        found = np.array([output[at][channel].item() for at in real])
        wanted = np.array([target[at][channel].item() for at in real])
        total += abs(found.mean() - wanted.mean()) + abs(found.var() - wanted.var())
    assert float(statistics_distance(output, target, mask)) == pytest.approx(total / 4, rel=1e-5)


def test_rates_grow_from_block_to_block() -> None:
    method = NormTweaking(rate=1e-4, growth=2.0)
    assert [method.rate_of(block, 4) for block in range(4)] == pytest.approx([1e-4, 1.5e-4, 2e-4, 2.5e-4])


@pytest.mark.parametrize(("objective", "left"), (("statistics", 0.7), ("error", 0.3)))
def test_a_planted_change_of_the_norms_is_undone(objective: str, left: float, tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    generator = torch.Generator().manual_seed(1)
    right = {name: norm for name, norm in model.module.state_dict().items() if "layers" in name and norm.ndim == 1}
    wrong = {name: norm * (1 + 0.2 * torch.rand(norm.shape, generator=generator)) for name, norm in right.items()}
    start = Start(MemoryWeights({}), {name: norm.to(torch.bfloat16) for name, norm in wrong.items()})
    method = NormTweaking(PACE, rate=0.02, growth=0.0, objective=objective)
    trained = train(model, start, method, make_tokens(sequences=24, length=32))
    assert not trained.weights and set(trained.norms) == set(right)
    for look in trained.looks:
        assert look.held_out_end < left * look.held_out_start

    def distance(norms: dict[str, torch.Tensor]) -> float:
        return sum(float((norms[name].float() - right[name].float()).square().sum()) for name in right)

    assert distance(trained.norms) < left * distance(wrong)


@pytest.mark.parametrize(("name", "moved"), (("llama", 2), ("opt-projected", 4), ("gpt2", 4), ("bert-classifier", 4)))
def test_only_norms_move(name: str, moved: int, tmp_path: Path) -> None:
    model = toy(name, tmp_path)
    weights = rounded(model)
    trained = train(model, Start(MemoryWeights(weights), {}), replace(PUBLISHED, pace=PACE))
    assert len(trained.norms) == moved * model.layout.block_count
    assert all("norm" in key.lower() or "ln_" in key for key in trained.norms)
    assert all(weight is weights[site] for site, weight in trained.weights.items())
    assert all(look.held_out_end <= look.held_out_start for look in trained.looks)
