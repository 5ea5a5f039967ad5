"""TDMPQ against plain autograd, finite differences and the oracle."""

import math

import pytest
import torch
from oracles import plain_sensitivity as oracle
from torch import nn

from cptquant.core.layout import Site
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.perturbation import original_weight, perturb
from cptquant.sensitivity.taylor import Tdmpq, backward


def test_backward_agrees_with_finite_differences_in_double_precision():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    sites = {name: Site(name=name, out_features=1, in_features=1) for name in ("0", "2")}
    modules = {name: block.get_submodule(name) for name in sites}
    hidden, direction = torch.randn(1, 3, 5).double(), torch.randn(1, 3, 5).double()

    def loss() -> float:
        with torch.no_grad():
            return float((block(hidden) * direction).sum())

    weights, at_input = backward(block, modules, sites, hidden, direction)
    step = 1e-6
    for name, found in weights.items():
        parameter = modules[name].weight.data
        for spot in [(0, 0), (3, 2), (4, 4)]:
            parameter[spot] += step
            up = loss()
            parameter[spot] -= 2 * step
            down = loss()
            parameter[spot] += step
            assert float(found[spot]) == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)
    hidden[0, 1, 2] += step
    up = loss()
    hidden[0, 1, 2] -= 2 * step
    assert float(at_input[0, 1, 2]) == pytest.approx((up - loss()) / (2 * step), rel=1e-6)
    assert not any(parameter.requires_grad for parameter in (module.weight for module in modules.values()) if False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier"])
def test_terms_equal_plain_autograd_sequence_by_sequence(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(model.layout.task, sequences=3), candidates(model, ("int4-g16",))
    kinds = [
        ("first", "diagonal"),
        ("second", "diagonal"),
        ("second", "rows"),
        ("second", "projected"),
        ("sum", "rows"),
    ]
    tables = {
        (order, curvature): measure_sensitivity(
            model,
            tokens,
            formats,
            Tdmpq(order=order, curvature=curvature, fisher="empirical", coarse_products=False),
        )
        for order, curvature in kinds
    }
    count = sum(oracle.scored_count(tokens, row) for row in range(3))
    for site in model.layout.block_sites[::5]:
        fmt = formats[site.name][0]
        change = perturb(original_weight(model, site), fmt, model.layout, Rtn())
        gradients = [oracle.weight_gradient(model.module, tokens, row, site.parameter_name) for row in range(3)]
        gradients = [part.t() if site.transposed else part for part in gradients]
        inner = [float((part * change).sum()) for part in gradients]
        expected = {
            ("first", "diagonal"): abs(sum(inner)) / count,
            ("second", "diagonal"): sum(float((part * change).square().sum()) for part in gradients) / 2 / count,
            ("second", "rows"): sum(float((part * change).sum(1).square().sum()) for part in gradients) / 2 / count,
            ("second", "projected"): sum(value**2 for value in inner) / 2 / count,
        }
        expected["sum", "rows"] = expected["first", "diagonal"] + expected["second", "rows"]
        for key, value in expected.items():
            found = tables[key].damages[site.name][fmt.name].value
            assert found == pytest.approx(value, rel=2e-3, abs=1e-7)


def test_first_order_predicts_a_small_step_of_the_loss(toy, text, candidates):
    model = toy("llama")
    tokens, formats = text(), candidates(model, ("int4-g16",))
    table = measure_sensitivity(model, tokens, formats, Tdmpq(order="first", coarse_products=False))
    site = model.layout.block_sites[3]
    weight = original_weight(model, site).float()
    change = 0.02 * perturb(weight, formats[site.name][0], model.layout, Rtn())
    losses = []
    for sign in (1, -1):
        changed = oracle.with_weight(model.module, site.parameter_name, weight + sign * change).double()
        with torch.no_grad():
            losses.append(sum(float(oracle.summed_loss(changed, tokens, row)) for row in range(6)))
    count = sum(oracle.scored_count(tokens, row) for row in range(6))
    slope = abs(losses[0] - losses[1]) / 2 / 0.02 / count
    assert table.damages[site.name]["int4-g16"].value == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize(("name", "curvature"), [("llama", "rows"), ("opt", "diagonal"), ("encoder", "projected")])
def test_second_order_with_the_true_fisher_approaches_the_oracle_at_8_bits(toy, text, candidates, name, curvature):
    model = toy(name)
    tokens, formats = text(model.layout.task, sequences=40), candidates(model, ("int8-g16",))
    exact = measure_sensitivity(model, tokens, formats, Ablation(sequences=40)).damages
    found = measure_sensitivity(model, tokens, formats, Tdmpq(curvature=curvature)).damages
    names = [site.name for site in model.layout.block_sites]
    ratios = torch.tensor([found[site]["int8-g16"].value / exact[site]["int8-g16"].value for site in names])
    assert 0.7 < float(ratios.log().mean().exp()) < 1.4
    assert float(ratios.log().std()) < math.log(2)


@pytest.mark.parametrize("order", ["first", "second", "sum"])
def test_a_planted_fragile_block_ranks_first(toy, text, candidates, fragile, order):
    model = fragile(toy("opt"), 2)
    formats = candidates(model, ("int4-channel",))
    table = measure_sensitivity(model, text(), formats, Tdmpq(order=order))
    values = [score.value for score in table.block_scores]
    assert values.index(max(values)) == 2
    assert min(values) >= 0


def test_input_variant_equals_its_own_monte_carlo(toy, text, candidates):
    model = toy("opt")
    tokens = text(sequences=1)
    table = measure_sensitivity(
        model, tokens, candidates(model), Tdmpq(variant="input", noise=0.1, coarse_products=False)
    )
    # The gradient at the first block's input is that at the embeddings' output plus positions.
    module = model.module.float()
    seen = {}
    handle = module.model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=(args or (kwargs["hidden_states"],))[0].requires_grad_(True)),
        with_kwargs=True,
    )
    try:
        with torch.enable_grad():
            loss = oracle.summed_loss(module, tokens, 0)
            gradient = torch.autograd.grad(loss, seen["hidden"])[0]
    finally:
        handle.remove()
    generator = torch.Generator().manual_seed(0)
    rms = seen["hidden"].detach().square().mean().sqrt()
    noise = 0.1 * rms * torch.randn(4000, *gradient.shape[1:], generator=generator)
    expected = float((noise * gradient).flatten(1).sum(1).abs().mean()) / oracle.scored_count(tokens, 0)
    assert table.block_scores[0].value == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["opt-projected", "masked", "encoder"])
def test_every_site_gets_a_damage_and_the_table_says_how(toy, text, candidates, name):
    model = toy(name)
    table = measure_sensitivity(model, text(model.layout.task), candidates(model), Tdmpq())
    for site in model.layout.sites:
        assert all(damage.value > 0 for fmt, damage in table.damages[site.name].items() if fmt != "float16")
    assert "measured" in table.metadata["sites_outside_blocks"]
    if name == "encoder":
        assert table.unit == "one_minus_cosine"
        assert "first-order terms vanish" in table.metadata["fisher"]


def test_groups_of_sequences_and_repeats_change_nothing(toy, text, candidates, monkeypatch):
    model = toy("llama")
    tokens, formats = text(), candidates(model)
    method = Tdmpq(coarse_products=False)
    first = measure_sensitivity(model, tokens, formats, method)
    assert measure_sensitivity(model, tokens, formats, method) == first
    monkeypatch.setattr("cptquant.sensitivity.taylor._CHANGE_BYTES", 1)  # a turn for each site
    turns = measure_sensitivity(model, tokens, formats, method)
    assert turns.damages == first.damages
    assert turns.block_scores == first.block_scores
    monkeypatch.setattr("cptquant.sensitivity.taylor._HIDDEN_BYTES", 1)
    apart = measure_sensitivity(model, tokens, formats, method)
    name = model.layout.block_sites[0].name
    assert apart.damages[name]["int4-g16"].value == pytest.approx(first.damages[name]["int4-g16"].value, rel=1e-4)


def test_coarse_products_change_damages_by_far_less_than_their_standard_error(toy, text, candidates):
    model = toy("llama")
    tokens, formats = text(sequences=6), candidates(model, ("int4-g16",))
    exact = measure_sensitivity(model, tokens, formats, Tdmpq(coarse_products=False))
    coarse = measure_sensitivity(model, tokens, formats, Tdmpq())
    assert exact.metadata["arithmetic"] == "float32"
    for site in model.layout.block_sites:
        wanted, found = exact.damages[site.name]["int4-g16"], coarse.damages[site.name]["int4-g16"]
        assert found.value == pytest.approx(wanted.value, rel=0.05)


@pytest.mark.parametrize("name", ["opt", "opt-projected", "llama", "gpt2", "classifier", "masked", "encoder"])
def test_large_tables_take_what_coarse_layers_hand_them(toy, text, candidates, name, monkeypatch):
    monkeypatch.setattr("cptquant.models.stream._LARGE_WEIGHT_ENTRIES", 1200)  # embeddings and heads, no projection
    model = toy(name)
    tokens, formats = text(model.layout.task, sequences=4), candidates(model, ("int4-g16",))
    exact = measure_sensitivity(model, tokens, formats, Tdmpq(coarse_products=False))
    coarse = measure_sensitivity(model, tokens, formats, Tdmpq())
    for site in model.layout.sites:
        wanted = [damage.value for fmt, damage in exact.damages[site.name].items() if fmt != "float16"]
        found = [damage.value for fmt, damage in coarse.damages[site.name].items() if fmt != "float16"]
        assert found == pytest.approx(wanted, rel=0.1)
