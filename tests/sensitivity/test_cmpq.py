"""CMPQ: pooling, scores, the planted odd block, and what turns scores into damages."""

import math

import pytest
import torch

from cptquant.core.progress import ignore_progress
from cptquant.models.stream import ModelStream
from cptquant.sensitivity.correlation import Cmpq, pool_spans
from cptquant.sensitivity.measure import measure_sensitivity


def test_pooling_averages_real_tokens_of_each_span():
    hidden = torch.arange(24.0).view(2, 6, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    means, owners = pool_spans(hidden, mask, 4)
    torch.testing.assert_close(means[0], hidden[0, :4].mean(0))
    torch.testing.assert_close(means[1], hidden[0, 4:].mean(0))  # the last span is short but half real
    torch.testing.assert_close(means[2], hidden[1, :3].mean(0))
    assert owners.tolist() == [0, 0, 1]


def test_every_sequence_gives_a_sample_and_whole_sequences_can_be_pooled():
    hidden, mask = torch.randn(2, 8, 3), torch.zeros(2, 8, dtype=torch.int64)
    mask[0], mask[1, 4] = 1, 1
    means, owners = pool_spans(hidden, mask, 4)
    assert owners.tolist() == [0, 0, 1]
    torch.testing.assert_close(means[2], hidden[1, 4])
    whole, owners = pool_spans(hidden, mask, None)
    assert owners.tolist() == [0, 1]
    torch.testing.assert_close(whole[0], hidden[0].mean(0))


def test_pooled_outputs_are_the_models_own_hidden_states(toy, text):
    model, tokens = toy("llama"), text()
    pooled, _ = Cmpq(pool_tokens=None).pool_outputs(model, tokens, ignore_progress)
    stream = ModelStream(model, tokens, batch_size=len(tokens.input_ids))
    stream.advance(stream.load_block())
    mask = tokens.attention_mask.unsqueeze(-1)
    torch.testing.assert_close(pooled[0], (stream.hidden[0] * mask).sum(1) / mask.sum(1))
    assert len(pooled) == model.layout.block_count


@pytest.mark.parametrize("weighting", ["mean", "first", "svcca", "pwcca"])
def test_a_block_that_moves_unlike_the_others_ranks_first(weighting):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 4, generator=generator)
    outputs = [
        shared @ torch.randn(4, 12, generator=generator) + 0.1 * torch.randn(200, 12, generator=generator)
        for _ in range(5)
    ]
    outputs[2] = torch.randn(200, 12, generator=generator)
    scores = Cmpq(weighting=weighting).score_blocks(outputs, torch.arange(200) // 4)
    values = [score.value for score in scores]
    assert values.index(max(values)) == 2
    assert all(0 <= value <= 1 for value in values)
    assert scores[2].n == 50


def test_the_standard_error_is_of_the_size_of_the_spread_over_fresh_texts():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        maps = [torch.randn(4, 10, generator=torch.Generator().manual_seed(index)) for index in range(3)]
        shared = torch.randn(160, 4, generator=generator)
        outputs = [shared @ part + torch.randn(160, 10, generator=generator) for part in maps]
        return Cmpq(energy=1.0, directions_per_sample=1.0).score_blocks(outputs, torch.arange(160))[0]

    found = [draw(seed) for seed in range(100, 140)]
    spread = torch.tensor([score.value for score in found]).std()
    claimed = torch.tensor([score.stderr for score in found]).mean()
    assert 0.6 < float(claimed / spread) < 1.7


@pytest.mark.parametrize("name", ["opt", "opt-projected", "gpt2", "classifier", "masked", "encoder"])
def test_damages_follow_the_stated_rule_on_every_family(toy, text, candidates, name):
    model = toy(name)
    formats = candidates(model)
    table = measure_sensitivity(model, text(model.layout.task), formats, Cmpq(pool_tokens=5, jackknife_groups=3))
    assert table.method == "cmpq"
    assert len(table.block_scores) == 4
    assert "score of the site's block x relative error" in table.metadata["damage_rule"]
    for site in model.layout.block_sites:
        row = table.damages[site.name]
        assert row["float16"].value == 0
        assert row["int2-g16"].value > row["int4-g16"].value > row["int8-g16"].value > 0
        score = table.block_scores[site.block_index]
        ratio = row["int4-g16"].value / score.value
        assert 0 < ratio < 0.2
        assert row["int4-g16"].stderr == pytest.approx(score.stderr * ratio)
        assert row["int4-g16"].n == score.n


def test_bare_rule_leaves_the_block_score_alone_to_decide(toy, text, candidates):
    model = toy("opt")
    table = measure_sensitivity(model, text(), candidates(model), Cmpq(pool_tokens=5, rule="bare"))
    for site in model.layout.block_sites:
        score = table.block_scores[site.block_index].value
        assert table.damages[site.name]["int4-g16"].value == pytest.approx(score / 4**4)


def test_same_text_same_table_and_too_few_samples_are_safe(toy, text, candidates):
    model = toy("opt")
    tokens, formats = text(sequences=2), candidates(model)
    first, second = (measure_sensitivity(model, tokens, formats, Cmpq(pool_tokens=None)) for _ in range(2))
    assert first.damages == second.damages
    assert all(math.isfinite(score.value) for score in first.block_scores)
