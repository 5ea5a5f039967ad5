"""Sketches against the exact quadratic form, the exact divergence and the oracle."""

import copy
import dataclasses

import pytest
import torch
from oracles import plain_sensitivity as oracle

from cptquant.core.errors import ModelError
from cptquant.core.progress import ignore_progress
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.perturbation import original_weight, perturb
from cptquant.sensitivity.sketch import Sketch, count_sketch

ROOMY = Sketch(width=20 * 96, sequences=6)
"""A place for every entry of a toy's sequence: nothing is lost."""


def changed_logits(model, formats, site, bits, tokens):
    """Logits of the original and of the model with one site rounded, float64 (n, T, V)."""
    fmt = next(fmt for fmt in formats[site.name] if fmt.code_bits == bits)
    weight = original_weight(model, site).float()
    weight = weight + perturb(weight, fmt, model.layout, Rtn())
    changed = oracle.with_weight(model.module, site.parameter_name, weight.t() if site.transposed else weight)
    with torch.no_grad():
        return oracle.logits_of(model.module, tokens).double(), oracle.logits_of(changed, tokens).double()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_products_of_sketches_are_the_exact_quadratic_form(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(sequences=3), candidates(model, ("int3-g16", "int4-g16"))
    sketches = ROOMY.measure(model, tokens, formats, ignore_progress)
    first, second = model.layout.block_sites[2], model.layout.block_sites[-1]
    before, after = changed_logits(model, formats, first, 3, tokens)
    _, other = changed_logits(model, formats, second, 4, tokens)
    p = before.softmax(-1)
    total = 0.0
    for row in range(3):
        for position in range(oracle.scored_count(tokens, row)):
            fisher = p[row, position].diag() - p[row, position].outer(p[row, position])
            total += float((after - before)[row, position] @ fisher @ (other - before)[row, position])
    expected = total / sum(oracle.scored_count(tokens, row) for row in range(3))
    found = sketches.interactions(shrunk=False)[
        sketches.place[first.name, "int3-g16"], sketches.place[second.name, "int4-g16"]
    ]
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_narrow_sketches_are_unbiased_with_the_stated_error():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 30, 50, generator=generator).unbind()
    second = second + 0.5 * first
    exact, found = float((first * second).sum()), []
    for _ in range(400):
        signs = torch.randint(0, 2, first.shape, generator=generator) * 2.0 - 1
        found.append(float((count_sketch(first * signs, 64) * count_sketch(second * signs, 64)).sum()))
    values = torch.tensor(found)
    scale = float(first.norm() * second.norm())
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 20
    assert float(values.std()) < (2 / 64) ** 0.5 * scale


def test_the_score_of_an_option_is_the_oracles_on_the_same_positions(toy, text, candidates):
    model = toy("opt-projected")
    tokens, formats = text(), candidates(model)
    table = measure_sensitivity(model, tokens, formats, Sketch(sequences=6))
    exact = measure_sensitivity(model, tokens, formats, Ablation())
    assert table.unit == exact.unit
    for site, row in exact.damages.items():
        for fmt, wanted in row.items():
            assert table.damages[site][fmt].value == pytest.approx(wanted.value, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["llama", "classifier", "masked", "encoder"])
def test_half_the_squared_length_is_the_divergence_where_changes_are_small(toy, text, candidates, name):
    model = toy(name)
    tokens = text(model.layout.task)
    formats = candidates(model, ("int8-g16",))
    exact = measure_sensitivity(model, tokens, formats, Ablation())
    method = dataclasses.replace(ROOMY, diagonal="sketch")
    table = measure_sensitivity(model, tokens, formats, method)
    for site in model.layout.sites:
        wanted = exact.damages[site.name].get("int8-g16")
        if wanted is not None:
            assert table.damages[site.name]["int8-g16"].value == pytest.approx(wanted.value, rel=0.03)


@pytest.mark.parametrize("name", ["llama", "masked", "classifier", "encoder"])
def test_interactions_bring_the_divergence_of_a_whole_plan_near(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(model.layout.task), candidates(model, ("int8-g16",))
    sketches = ROOMY.measure(model, tokens, formats, ignore_progress)
    exact = measure_sensitivity(model, tokens, formats, Ablation()).block_scores
    table = measure_sensitivity(model, tokens, formats, ROOMY)
    for found, wanted in zip(table.block_scores, exact, strict=True):
        assert found.value == pytest.approx(wanted.value, rel=0.25)
    plan = {site.name: "int8-g16" for site in model.layout.block_sites}
    rows = [sketches.place[option] for option in plan.items()]
    assert sketches.plan(plan).value == pytest.approx(float(sketches.interactions()[rows][:, rows].sum()) / 2, rel=1e-5)
    assert sketches.plan({**plan, "nothing": "float16"}) == sketches.plan(plan)


def test_two_sites_that_make_the_same_change_cost_four_times_one(toy, text, candidates):
    model = toy("opt")
    sketches = ROOMY.measure(model, text(), candidates(model), ignore_progress)
    doubled = dataclasses.replace(
        sketches,
        options=(("a", "int8-g16"), ("b", "int8-g16")),
        vectors=sketches.vectors[:1].repeat(2, 1, 1),
        divergences=0.5 * sketches.vectors[:1].double().square().sum(-1).repeat(2, 1),
    )
    one, both = (doubled.plan(dict.fromkeys(names, "int8-g16"), shrunk=False).value for names in ("a", "ab"))
    assert both == pytest.approx(4 * one, rel=1e-6)


def test_pairs_are_believed_as_far_as_two_texts_agree_on_them(toy, text, candidates):
    sketches = ROOMY.measure(toy("llama"), text(), candidates(toy("llama"), ("int4-g16",)), ignore_progress)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sketches.vectors.shape, generator=generator)
    common = torch.randn(sketches.vectors[:, :1].shape, generator=generator).expand_as(noise)
    agreed, unrelated, mixed = (
        dataclasses.replace(sketches, vectors=vectors).reliability for vectors in (common, noise, common + noise)
    )
    assert agreed == pytest.approx(1, abs=1e-6)
    assert unrelated < 0.3
    assert unrelated < mixed < agreed
    assert dataclasses.replace(sketches, vectors=noise[:, :1], counts=sketches.counts[:1]).reliability == 0
    products = sketches.interactions(shrunk=False)
    believed = sketches.interactions()
    assert torch.equal(products.diagonal(), believed.diagonal())
    off = ~torch.eye(len(products), dtype=torch.bool)
    torch.testing.assert_close(believed[off], products[off] * sketches.reliability)


def test_windows_are_read_whole_and_a_classifier_reads_more_texts(toy, text, candidates):
    model, other, labelled = toy("llama"), toy("classifier"), text("sequence_classification")
    assert Sketch().measure(model, text(), candidates(model), ignore_progress).counts.tolist() == [19, 19]
    assert Sketch().measure(other, labelled, candidates(other), ignore_progress).counts.tolist() == [1] * 6


def test_repeats_agree_and_another_seed_only_moves_the_interactions(toy, text, candidates):
    model, formats = toy("llama"), candidates(toy("llama"), ("int4-g16",))
    first, again, other = (
        method.measure(model, text(), formats, ignore_progress)
        for method in (Sketch(width=64), Sketch(width=64), Sketch(width=64, seed=1))
    )
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.divergences, other.divergences)
    assert not torch.equal(first.vectors, other.vectors)


def test_a_large_vocabulary_is_looked_at_at_fewer_positions(toy, text, candidates, monkeypatch):
    monkeypatch.setattr("cptquant.sensitivity.sketch.OUTPUT_ENTRIES", 6 * 20 * 96 // 4)
    sketches = ROOMY.measure(toy("llama"), text(), candidates(toy("llama")), ignore_progress)
    assert sketches.counts.tolist() == [5, 5, 5, 3, 5, 5]


def test_a_weight_that_is_not_a_number_is_named(toy, text, candidates):
    model = toy("opt")
    broken = copy.deepcopy(model.module)
    broken.model.decoder.layers[1].fc1.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match="a weight to quantize is NaN or infinite; repair the model"):
        measure_sensitivity(dataclasses.replace(model, module=broken), text(), candidates(model), Sketch())


def test_changes_too_large_for_an_exponential_are_measured_too(toy, text, candidates, monkeypatch):
    model, formats = toy("llama"), candidates(toy("llama"), ("int2-g16",))
    ordinary = Sketch().measure(model, text(), formats, ignore_progress).divergences
    monkeypatch.setattr("cptquant.sensitivity.sketch._FAR_NATS", 0.5)
    far = Sketch().measure(model, text(), formats, ignore_progress).divergences
    assert not torch.equal(far, ordinary)  # the other way was taken
    torch.testing.assert_close(far, ordinary, rtol=1e-4, atol=1e-9)
