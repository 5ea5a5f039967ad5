"""The trunk and its branches against a plain loop; resuming; the ladder's shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cptquant.adaptation.ladder import build_ladder, new_model, read_config
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.token_files import TokenSource
from cptquant.adaptation.trunk import Trunk, TrunkSettings, run_trunk
from cptquant.core.errors import ModelError, UserError
from cptquant.core.sweep import EvaluationPoint, SizeSpec, learning_rate
from cptquant.models.training_checkpoints import Diverged

SETTINGS = TrunkSettings(batch=4, peak_rate=3e-3, warm_up=2, weight_decay=0.1)
POINTS = tuple(
    EvaluationPoint(tokens=last * 128, branch_step=branch, last_step=last) for branch, last in ((3, 4), (6, 8))
)
RUNG = build_ladder("embedded:opt-mini", (SizeSpec(name="t", hidden=32, layers=1),))[0]


def mixture() -> Mixture:
    rng = np.random.default_rng(0)
    sources = [
        TokenSource.build(name, rng.integers(0, 2048, 3000).astype(np.int32), np.array([0, 3000]))
        for name in ("general", "law")
    ]
    return Mixture(sources, [0.5, 0.5], window_tokens=32, total_tokens=32 * 4 * 8, seed=0)


def fresh() -> Trunk:
    return Trunk(new_model(RUNG, 0).eval(), mixture(), SETTINGS)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def plain_run(branch: int, last: int) -> torch.Tensor:
    """A run of `last` steps whose rate falls from `branch` on, written out; float32 products as the trunk has them."""
    from cptquant.models.arithmetic import coarse_products

    model, data = new_model(RUNG, 0).eval(), mixture()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)
    for step in range(last):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3e-3, 2, branch, last)
        ids = torch.stack([torch.from_numpy(data[index].input_ids) for index in range(4 * step, 4 * step + 4)])
        with coarse_products():
            logits = model(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_every_point_is_the_end_of_a_run_of_its_own(tmp_path: Path) -> None:
    found: dict[int, torch.Tensor] = {}
    run_trunk(fresh(), POINTS, tmp_path, lambda index, model: found.update({index: weights(model)}))
    for index, point in enumerate(POINTS):
        assert torch.allclose(found[index], plain_run(point.branch_step, point.last_step), atol=1e-6, rtol=0)
    assert not list(tmp_path.glob("trunk*"))


@pytest.mark.parametrize("killed_at", [2, 4, 5, 8])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, killed_at: int) -> None:
    whole: dict[int, torch.Tensor] = {}
    run_trunk(fresh(), POINTS, tmp_path / "whole", lambda index, model: whole.update({index: weights(model)}))
    found: dict[int, torch.Tensor] = {}
    steps = iter(range(100))

    def tick(_: int) -> None:
        if next(steps) == killed_at:
            raise KeyboardInterrupt

    def judge(index: int, model: torch.nn.Module) -> None:
        found[index] = weights(model)

    with pytest.raises(KeyboardInterrupt):
        run_trunk(fresh(), POINTS, tmp_path / "cut", judge, told=tick)
    assert len(found) == (killed_at > 3)
    run_trunk(fresh(), POINTS, tmp_path / "cut", judge, finished=lambda index: index in found)
    assert all(torch.equal(found[index], whole[index]) for index in whole)


def test_a_damaged_state_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "trunk.safetensors").write_bytes(b"cut")
    found: dict[int, torch.Tensor] = {}
    run_trunk(fresh(), POINTS[:1], tmp_path, lambda index, model: found.update({index: weights(model)}))
    assert torch.allclose(found[0], plain_run(3, 4), atol=1e-6, rtol=0)


def test_a_loss_that_is_no_number() -> None:
    trunk = fresh()
    with torch.no_grad():
        next(trunk.model.parameters())[0] = float("nan")
    with pytest.raises(
        Diverged, match=r"training stopped at step 1: loss nan, gradient norm nan at rate 0\.0015; lower"
    ):
        trunk.run_to(1)


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other: what each would send adds up to the gradient of the whole batch."""
    whole = fresh()
    loss = whole._backward()
    expected = torch.cat([p.grad.flatten() for p in whole.model.parameters() if p.grad is not None])
    sent: list[torch.Tensor] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(flat.clone()))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        fresh()._backward()
    total = sent[0] + sent[1]
    assert torch.allclose(total[0], loss, atol=1e-5)
    assert float((total[1:] - expected).norm() / expected.norm()) < 0.01  # products of bfloat16 in another order


def test_shapes_of_a_ladder() -> None:
    wanted = (SizeSpec(name="a", parameters=600_000), SizeSpec(name="b", parameters=4_000_000))
    small, large = build_ladder("embedded:opt-mini", wanted)
    for rung, parameters in ((small, 600_000), (large, 4_000_000)):
        config = read_config(rung)
        assert abs(rung.block_parameters / parameters - 1) < 0.2
        assert config.hidden_size % 32 == 0 and config.ffn_dim % 64 == 0 and config.vocab_size == 2048
        assert config.num_attention_heads * 32 == config.hidden_size
        assert sum(p.numel() for p in new_model(rung, 0).parameters()) == rung.parameters
    assert small.parameters < large.parameters


def test_ladders_that_cannot_be(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"sizes\[0\]\.hidden is 40; the heads of embedded:opt-mini are 32 wide"):
        build_ladder("embedded:opt-mini", (SizeSpec(name="t", hidden=40, layers=1),))
    with pytest.raises(UserError, match="no shape of this family has about 100 parameters in its blocks"):
        build_ladder("embedded:opt-mini", (SizeSpec(name="t", parameters=100),))
    with pytest.raises(
        ModelError, match="family: embedded:bert-mini is for sequence_classification; a sweep continues"
    ):
        build_ladder("embedded:bert-mini", (SizeSpec(name="t", hidden=32, layers=1),))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 2048', '"vocab_size": 2050'))
    with pytest.raises(ModelError, match="knows 2,050 tokens, the family embedded:opt-mini 2,048; losses compare only"):
        build_ladder("embedded:opt-mini", (SizeSpec(name="t", path=str(folder)),))
    (folder / "config.json").write_text(config)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["other"] = tokenizer["model"]["vocab"].pop("a")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="has another tokenizer than the family embedded:opt-mini, of the same size"):
        build_ladder("embedded:opt-mini", (SizeSpec(name="t", path=str(folder)),))
