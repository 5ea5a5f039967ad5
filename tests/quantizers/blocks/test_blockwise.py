"""Training block by block: never worse, what is written is what was trained, the same bits again, and what stops it."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from quantizers.blocks.toys import PACE, Changed, rounded, slow_errors, toy, train
from quantizers.test_kl_rounding import planted
from quantizers.test_quantize import make_tokens

from cptquant.core.errors import DataError, UserError
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_ap import BlockAp
from cptquant.quantizers.blocks.block_training import BlockLook, Pace, Targets
from cptquant.quantizers.blocks.blockwise import Start
from cptquant.recovery.clipping import LearnedClipping
from cptquant.recovery.norm_tweaking import NormTweaking
from cptquant.recovery.student import frozen_sites

QUICK = BlockAp(PACE, latent_rate=0.02, step_rate=2e-3, other_rate=1e-3)


def same(one: StoredWeight, other: StoredWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize("name", ("llama", "opt-projected", "bert-classifier", "gpt2"))
def test_no_block_is_worse_and_what_is_written_has_the_error_that_chose_it(name: str, tmp_path: Path) -> None:
    model, tokens = toy(name, tmp_path), make_tokens()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    weights = rounded(model, k_proj="int4-g16-asym", o_proj="Q4_1", v_proj="bfloat16", query="int3-channel")
    trained = train(model, Start(MemoryWeights(weights), {}), QUICK, tokens)
    assert [look.block_index for look in trained.looks] == list(range(model.layout.block_count))
    # Streams with the written weights and norms in them, nothing of the training: every block's input is the one it
    # was trained on, every error the one that chose.
    errors = slow_errors(model, Changed(weights | trained.weights, trained.norms), tokens, PACE)
    for look, error in zip(trained.looks, errors, strict=True):
        assert error == pytest.approx(look.held_out_end, rel=1e-4)
        assert look.held_out_end <= look.held_out_start and look.held_out[0] == pytest.approx(look.held_out_start)
        assert look.stopped == "" and set(look.held_out) == {0, 5, 10, 15, 20} and look.moved > 0
    assert any(look.best_step for look in trained.looks)
    assert trained.looks[0].held_out_start == pytest.approx(slow_errors(model, Changed(weights, {}), tokens, PACE)[0])
    assert {site: weight.format for site, weight in trained.weights.items()} == {
        site.name: weights[site.name].format for site in model.layout.block_sites if site.name in weights
    }
    assert trained.norms and all(norm.dtype is torch.bfloat16 for norm in trained.norms.values())
    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())


@pytest.mark.parametrize(
    "method",
    (QUICK, LearnedClipping(PACE, rate=0.1, alike=1.0), NormTweaking(PACE, objective="error")),
    ids=("blockwise", "clipping", "norms"),
)
def test_a_run_that_goes_on_gives_the_same_bits(method: BlockAp, tmp_path: Path) -> None:
    model, steps = toy("gpt2", tmp_path), []
    start = Start(MemoryWeights(rounded(model)), {})
    whole = train(model, start, method, progress=lambda done, total: steps.append((done, total)))
    again = train(model, start, method, resume={0: whole.blocks[0]})
    assert sorted(again.blocks) == [1] and steps[-1] == (40, 40) and steps == sorted(steps)
    assert any(look.best_step for look in whole.looks)
    assert again.looks[0] == whole.looks[1]
    for site, weight in again.blocks[1].weights.items():
        assert same(weight, whole.blocks[1].weights[site])
    for norm, tensor in again.blocks[1].kept.items():
        assert torch.equal(tensor, whole.blocks[1].kept[norm])


def test_planted_codes_come_back(tmp_path: Path) -> None:
    model, first = planted(tmp_path)
    pace = replace(PACE, epochs=6, batch_sequences=4)
    trained = train(model, Start(first, {}), BlockAp(pace, latent_rate=0.02), make_tokens(sequences=32))
    for look in trained.looks:
        assert look.held_out_end < 0.2 * look.held_out_start
    wrong = {True: 0, False: 0}
    for site, weight in trained.weights.items():
        target = model.module.get_submodule(site).weight.detach().float()
        step = float(weight.scales.float().abs().mean())
        for after, stored in ((True, weight), (False, first.quantized(site))):
            wrong[after] += int(((stored.dequantize() - target).abs() > 0.4 * step).sum())
    assert wrong[True] < 0.5 * wrong[False]


@pytest.mark.parametrize("method", (QUICK, LearnedClipping(PACE, rate=0.1)), ids=("blockwise", "clipping"))
def test_frozen_sites_keep_what_they_have(method: BlockAp, tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    weights = rounded(model)
    frozen = frozen_sites(model.layout, ("v_proj", "*.o_proj"))
    trained = train(model, Start(MemoryWeights(weights), {}, frozen), method)
    assert len(frozen) == 6
    moved = {site for site, weight in trained.weights.items() if weight is not weights[site]}
    assert moved and not moved & frozen


def test_norms_of_an_earlier_training_are_where_it_starts(tmp_path: Path) -> None:
    model, tokens = toy("llama", tmp_path), make_tokens()
    weights, name = rounded(model), "model.layers.1.input_layernorm.weight"
    norms = {name: torch.full((32,), 1.25, dtype=torch.bfloat16)}
    unmoved = train(model, Start(MemoryWeights(weights), norms), replace(QUICK, other_rate=0.0, pace=PACE), tokens)
    expected = slow_errors(model, Changed(weights, norms), tokens, PACE)
    assert unmoved.looks[0].held_out_start == pytest.approx(expected[0]) and not unmoved.norms
    found = slow_errors(model, Changed(weights | unmoved.weights, norms), tokens, PACE)
    assert [look.held_out_end for look in unmoved.looks] == pytest.approx(found, rel=1e-4)


@dataclass(frozen=True)
class Breaks(BlockAp):
    """Gives no number on its fourth batch."""

    seen: tuple[list[int], ...] = ((),)

    def loss(self, output: torch.Tensor, targets: Targets) -> torch.Tensor:
        self.seen[0].append(1)
        loss = super().loss(output, targets)
        return loss * float("nan") if len(self.seen[0]) == 4 else loss


def test_a_loss_that_is_no_number_keeps_the_best_before_it(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    weights = rounded(model)
    method = Breaks(replace(PACE, checks=20), latent_rate=0.02, step_rate=2e-3, seen=([],))
    trained = train(model, Start(MemoryWeights(weights), {}), method)
    broken, *others = trained.looks
    assert broken.stopped == "training stopped at step 4 of 20: the loss is nan"
    assert set(broken.held_out) == {0, 1, 2, 3}
    assert broken.held_out_end == min(broken.held_out_start, *broken.held_out.values())
    assert all(look.stopped == "" and 20 in look.held_out for look in others)


def test_norms_that_run_away_leave_the_start(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    weights = rounded(model)
    trained = train(model, Start(MemoryWeights(weights), {}), replace(QUICK, other_rate=1e36))
    for look in trained.looks:
        assert look.best_step is None
        assert look.stopped == "training stopped at step 2 of 20: the loss is nan"
    assert all(weight is weights[site] for site, weight in trained.weights.items())
    for name, norm in trained.norms.items():
        assert torch.equal(norm, model.module.state_dict()[name])


def test_outcomes_in_words() -> None:
    look = BlockLook(3, 20, 100, 0.5, {0: 0.6, 10: 0.4}, 10, "")
    assert look.sentence == "block 3: error on held-out text 0.5 -> 0.4 at step 10 of 20"
    kept = replace(look, best_step=None, stopped="training stopped at step 3 of 20: the loss is nan")
    assert kept.sentence == (
        "block 3: error on held-out text 0.5; no step was better, the start was kept; "
        "training stopped at step 3 of 20: the loss is nan"
    )
    assert kept.held_out_end == 0.5
    assert replace(kept, steps=0, stopped="").sentence == "block 3: error on held-out text 0.5; nothing to train"


def test_a_block_in_16_bits_has_nothing_to_train(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    trained = train(model, Start(MemoryWeights({}), {}), replace(QUICK, other_rate=0.0))
    assert not trained.weights and all(look.steps == 0 and look.held_out_start < 1e-9 for look in trained.looks)


def test_rates_rise_then_fall_along_a_cosine() -> None:
    pace = Pace(warm_up=0.1, last_rate=0.1)
    factors = [pace.factor(step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[54] == pytest.approx(0.55) and factors[99] == pytest.approx(0.1)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_one_sequence_is_refused(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    start = Start(MemoryWeights(rounded(model)), {})
    with pytest.raises(DataError, match=r"--method blockwise needs at least 2 training .*, got 1: .*--data FILE"):
        train(model, start, QUICK, make_tokens().subset([0]))


def test_gguf_blocks_are_refused_by_clipping(tmp_path: Path) -> None:
    model = toy("llama", tmp_path)
    start = Start(MemoryWeights(rounded(model, o_proj="Q4_1")), {})
    with pytest.raises(UserError, match=r"--method clipping learns.* those of Q4_1 \(model\.layers\.0\..*o_proj\)"):
        train(model, start, LearnedClipping())
    frozen = frozen_sites(model.layout, ("o_proj",))
    assert train(model, replace(start, frozen=frozen), LearnedClipping(PACE)).looks
