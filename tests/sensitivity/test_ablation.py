"""The oracle against deep copies of the whole model."""

import pytest
import torch
from oracles import plain_sensitivity as oracle

from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.perturbation import original_weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-projected", "classifier"])
def test_every_site_equals_swapping_its_weight_in_the_whole_model(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(model.layout.task), candidates(model)
    table = measure_sensitivity(model, tokens, formats, Ablation())
    original = model.module.float()
    shared = model.layout.shared_head or ()
    for site in model.layout.sites[::3]:
        if site.name in shared:
            continue  # one parameter in the module, two sites here
        for fmt in formats[site.name]:
            if fmt.is_float:
                continue
            weight = Rtn()(original_weight(model, site).float(), fmt, torch.float16).dequantize()
            changed = oracle.with_weight(original, site.parameter_name, weight.t() if site.transposed else weight)
            expected = oracle.kl_per_token(original, changed, tokens)
            assert table.damages[site.name][fmt.name].value == pytest.approx(
                expected, rel=0.05, abs=5e-8
            )  # float32 noise


def test_shared_embedding_and_head_part_ways(toy, text, candidates):
    model = toy("opt")
    embedding, head = model.layout.shared_head
    table = measure_sensitivity(model, text(), candidates(model), Ablation())
    first, second = table.damages[embedding]["int8-g16-plain"].value, table.damages[head]["int8-g16"].value
    assert first > 0
    assert second > 0
    assert first != pytest.approx(second, rel=0.01)


def test_sixteen_bits_cost_nothing_and_fewer_bits_cost_more(toy, text, candidates):
    model = toy("opt")
    table = measure_sensitivity(model, text(), candidates(model), Ablation())
    for row in table.damages.values():
        assert row["float16"].value == 0
    totals = [
        sum(table.damages[site.name][name].value for site in model.layout.block_sites)
        for name in ("int2-g16", "int4-g16", "int8-g16")
    ]
    assert totals[0] > 5 * totals[1] > 100 * totals[2] > 0


def test_a_block_costs_about_the_sum_of_its_sites_where_errors_are_small(toy, text, candidates):
    model = toy("opt")
    formats = candidates(model, ("int8-g16",))
    table = measure_sensitivity(model, text(), formats, Ablation())
    for index, whole in enumerate(table.block_scores):
        names = [site.name for site in model.layout.block_sites if site.block_index == index]
        added = sum(table.damages[name]["int8-g16"].value for name in names)
        assert whole.value == pytest.approx(added, rel=0.5)


def test_a_planted_fragile_block_ranks_first(toy, text, candidates, fragile):
    model = fragile(toy("opt"), 2)
    formats = candidates(model, ("int4-channel",))
    table = measure_sensitivity(model, text(), formats, Ablation(granularity="block"))
    values = [score.value for score in table.block_scores]
    assert values.index(max(values)) == 2
    assert "score of the site's block" in table.metadata["damage_rule"]


def test_an_encoder_is_judged_by_its_embedding(toy, text, candidates):
    model = toy("encoder")
    table = measure_sensitivity(model, text("encoder"), candidates(model), Ablation())
    assert table.unit == "one_minus_cosine"
    assert all(0 < score.value < 2 for score in table.block_scores)


def test_changes_carried_at_once_do_not_matter(toy, text, candidates, monkeypatch):
    model = toy("opt")
    tokens, formats = text(), candidates(model)
    first = measure_sensitivity(model, tokens, formats, Ablation())
    monkeypatch.setattr("cptquant.sensitivity.sweep._VARIANT_BYTES", 1)
    assert measure_sensitivity(model, tokens, formats, Ablation()).damages == first.damages
