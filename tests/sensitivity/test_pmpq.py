"""PMPQ against deep copies of the whole model."""

import pytest
import torch
from oracles import plain_sensitivity as oracle

from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.pruning import Pmpq, prune


def test_pruning_cuts_exactly_the_smallest():
    weight = torch.tensor([[0.1, -3.0, 0.5], [-0.2, 2.0, 0.5]])
    assert prune(weight, 0.34).tolist() == [[0, -3.0, 0.5], [0, 2.0, 0.5]]
    assert int((prune(weight, 0.5) == 0).sum()) == 3  # a tie is cut only as far as the share goes
    assert torch.equal(prune(weight, 0.0), weight)
    assert weight[0, 0] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["opt", "gpt2", "classifier"])
def test_increase_equals_pruning_the_whole_model(toy, text, candidates, name):
    model = toy(name)
    tokens = text(model.layout.task)
    table = measure_sensitivity(model, tokens, candidates(model), Pmpq(curve=(0.5,)))
    original, rows = model.module.float(), range(tokens.sequence_count)
    count = sum(oracle.scored_count(tokens, row) for row in rows)
    with torch.no_grad():
        before = sum(float(oracle.summed_loss(original, tokens, row)) for row in rows)
        changed = original
        for site in model.layout.block_sites:
            if site.block_index == 2:
                parameter = dict(changed.named_parameters())[site.parameter_name]
                changed = oracle.with_weight(changed, site.parameter_name, prune(parameter.detach(), 0.5))
        after = sum(float(oracle.summed_loss(changed, tokens, row)) for row in rows)
    assert table.curves["loss_increase_at_sparsity_0.5"]["2"] == pytest.approx((after - before) / count, abs=2e-6)
    at_score = table.curves["loss_increase_at_sparsity_0.3"]
    assert [score.value for score in table.block_scores] == [max(0.0, at_score[str(index)]) for index in range(4)]


def test_norms_and_biases_are_left_alone(toy, text, candidates):
    model = toy("classifier")
    table = measure_sensitivity(model, text("sequence_classification"), candidates(model), Pmpq(curve=(0.0, 0.3)))
    assert set(table.curves["loss_increase_at_sparsity_0"].values()) == {0.0}
    assert "accuracy_drop_at_sparsity_0.3" in table.curves
    assert all(-1 <= drop <= 1 for drop in table.curves["accuracy_drop_at_sparsity_0.3"].values())


def test_a_block_that_carries_everything_ranks_first(toy, text, candidates, fragile):
    model = toy("opt")
    odd = fragile(model, 1, size=1.0)
    with torch.no_grad():  # every other block hardly writes to the residual stream, so cutting it costs little
        for site in model.layout.block_sites:
            if site.block_index != 1:
                odd.module.get_submodule(site.name).weight.mul_(0.05)
    # Predictions that the model itself holds true are what pruning can spoil: random text has nothing to lose.
    tokens = text(sequences=8)
    with torch.no_grad():
        for _ in range(20):
            guess = odd.module.float()(input_ids=tokens.input_ids).logits.argmax(-1)
            tokens.input_ids[:, 1:] = guess[:, :-1]
    table = measure_sensitivity(odd, tokens, candidates(odd), Pmpq())
    values = [score.value for score in table.block_scores]
    assert values.index(max(values)) == 1
    assert min(values) >= 0
    assert table.block_scores[1].value > 2 * table.block_scores[1].stderr


@pytest.mark.parametrize("name", ["masked", "encoder"])
def test_models_without_next_tokens_have_a_loss_of_their_own(toy, text, candidates, name):
    model = toy(name)
    table = measure_sensitivity(model, text(model.layout.task), candidates(model), Pmpq(curve=()))
    expected = {"masked": "NLL of masked tokens", "encoder": "1 - cosine"}[name]
    assert expected in table.metadata["loss"]
    assert table.block_scores[0].n == 6
    if name == "encoder":
        assert all(score.value > 0 for score in table.block_scores)


def test_sites_can_have_scores_of_their_own(toy, text, candidates):
    model = toy("opt")
    tokens, formats = text(), candidates(model)
    by_block = measure_sensitivity(model, tokens, formats, Pmpq(curve=(), rule="bare"))
    by_site = measure_sensitivity(model, tokens, formats, Pmpq(curve=(), rule="bare", granularity="site"))
    assert by_site.block_scores == by_block.block_scores
    names = [site.name for site in model.layout.block_sites if site.block_index == 0]
    assert len({by_block.damages[name]["int4-g16"].value for name in names}) == 1
    assert len({by_site.damages[name]["int4-g16"].value for name in names}) > 1
