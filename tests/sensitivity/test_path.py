"""Path integrals against the KL they share out, finite differences and the oracle."""

import dataclasses

import pytest
import torch
from oracles import plain_sensitivity as oracle

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.models.stream import ModelStream
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.loss import Objective, pose_question
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.path_integral import PathIntegral, gauss_legendre, list_paths
from cptquant.sensitivity.perturbation import original_weight, perturb, run_to_end

WIDTHS = ("int3-g16", "int4-g16", "int8-g16")


def with_all_sites(model, formats, bits, *, only=None):
    """A copy of the model with every site of the blocks (or one) rounded to that width."""
    changed = model.module
    for site in model.layout.block_sites:
        if only is None or site.name == only:
            fmt = next(fmt for fmt in formats[site.name] if fmt.code_bits == bits)
            weight = original_weight(model, site).float()
            weight = weight + perturb(weight, fmt, model.layout, Rtn())
            changed = oracle.with_weight(changed, site.parameter_name, weight.t() if site.transposed else weight)
    return changed


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "classifier"])
def test_shares_of_a_path_add_up_to_the_divergence_of_the_whole_model(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(model.layout.task, sequences=3, length=12), candidates(model, ("int4-g16", "int8-g16"))
    table = measure_sensitivity(model, tokens, formats, PathIntegral(points=6, outside_sequences=1))
    for bits in (4, 8):
        whole = oracle.kl_per_token(model.module, with_all_sites(model, formats, bits), tokens)
        # OPT's ReLUs have corners, over which a quadrature of any order is as good as its spacing only.
        assert table.metadata[f"sum of the shares at {bits} bits"] == pytest.approx(whole, rel=0.02)


def test_the_quadrature_converges_to_the_divergence(toy, text, candidates):
    model = toy("llama")
    tokens, formats = text(sequences=3, length=12), candidates(model, ("int4-g16",))
    whole = oracle.kl_per_token(model.module, with_all_sites(model, formats, 4), tokens)
    misses = []
    for points in (1, 5):
        table = measure_sensitivity(model, tokens, formats, PathIntegral(points=points, outside_sequences=1))
        misses.append(abs(table.metadata["sum of the shares at 4 bits"] / whole - 1))
    assert misses[1] < 0.02 < misses[0] < 0.5


def test_one_site_that_moves_alone_gets_its_own_divergence(toy, text, candidates):
    model = toy("llama")
    site = model.layout.block_sites[9]
    formats = candidates(model, ("int3-g16",))
    alone = {name: row if name == site.name else (model.layout.keep_format,) for name, row in formats.items()}
    tokens = text(sequences=3, length=12)
    table = measure_sensitivity(model, tokens, alone, PathIntegral(points=5))
    exact = oracle.kl_per_token(model.module, with_all_sites(model, formats, 3, only=site.name), tokens)
    found = table.damages[site.name]["int3-g16"]
    assert found.value == pytest.approx(exact, rel=2e-3)
    assert found.n == 3


@pytest.mark.parametrize("name", ["llama", "classifier", "masked", "encoder"])
def test_the_divergence_and_its_gradient_agree_with_finite_differences(toy, text, name):
    model = toy(name)
    question = pose_question(model, text(model.layout.task, sequences=2))
    stream = ModelStream(model, question.tokens, batch_size=2)
    ends = [list(stream.hidden)]
    run_to_end(stream, 0, ends)
    objective, reference = Objective(stream, question), ends[0][0]
    torch.manual_seed(2)
    hidden, direction = reference + 0.3 * torch.randn_like(reference), torch.randn_like(reference)
    gradient, totals = objective.divergence_gradient(0, hidden, reference)
    assert torch.equal(totals.sums, objective.divergences([hidden], [reference]).sums)
    step = 0.01
    up, down = (
        float(objective.divergences([hidden + sign * step * direction], [reference]).sums.sum()) for sign in (1, -1)
    )
    assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=0.01)
    still, nothing = objective.divergence_gradient(0, reference, reference)
    assert float(still.abs().max()) < 1e-6
    assert float(nothing.sums.abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["opt-projected", "masked", "encoder", "gpt2"])
@pytest.mark.parametrize("variant", ["together", "curvature"])
def test_at_8_bits_the_shares_are_near_the_oracle(toy, text, candidates, name, variant):
    model = toy(name)
    tokens, formats = text(model.layout.task, sequences=12), candidates(model, ("int8-g16",))
    method = PathIntegral(variant=variant, sequences=12, outside_sequences=12)
    table = measure_sensitivity(model, tokens, formats, method)
    exact = measure_sensitivity(model, tokens, formats, Ablation(sequences=12))
    assert table.unit == exact.unit
    names = [site.name for site in model.layout.block_sites]
    found, wanted = (sum(part.damages[name]["int8-g16"].value for name in names) for part in (table, exact))
    assert 0.6 < found / wanted < 1.6  # interactions are in the one and not in the other
    for site in set(model.layout.site_by_name) - set(names):
        assert table.damages[site] == exact.damages[site]


def test_negative_shares_become_zero_and_the_sum_is_kept(toy, text, candidates):
    model = toy("classifier")
    table = measure_sensitivity(model, text("sequence_classification"), candidates(model, WIDTHS), PathIntegral())
    values = [table.damages[site.name]["int3-g16"].value for site in model.layout.block_sites]
    assert 0.0 in values
    assert sum(values) > table.metadata["sum of the shares at 3 bits"]


def test_repeats_and_groups_of_sequences_change_nothing(toy, text, candidates, monkeypatch):
    model, method, tokens = toy("llama"), PathIntegral(outside_sequences=1), text(sequences=3, length=8)
    formats = candidates(model, ("int4-g16",))
    first = measure_sensitivity(model, tokens, formats, method)
    assert measure_sensitivity(model, tokens, formats, method) == first
    monkeypatch.setattr("cptquant.sensitivity.path_integral._HIDDEN_BYTES", 1)  # one sequence at a time
    apart = measure_sensitivity(model, tokens, formats, method)
    assert apart.damages == first.damages


def test_every_format_is_scored_on_one_path_and_no_site_stands_still():
    formats = {
        "a": [QuantFormat.parse(name) for name in ("int2-g16", "int4-g16", "int4-g32", "int8-g16")],
        "b": [QuantFormat.parse(name) for name in ("int4-g16", "int8-g16")],
    }
    paths = list_paths(formats)
    assert [path.label for path in paths] == ["2 bits", "4 bits", "4 bits, 2", "8 bits"]
    assert [{name: fmt.name for name, fmt in path.moved.items()} for path in paths] == [
        {"a": "int2-g16", "b": "int4-g16"},
        {"a": "int4-g16", "b": "int4-g16"},
        {"a": "int4-g32", "b": "int4-g16"},
        {"a": "int8-g16", "b": "int8-g16"},
    ]
    assert [sorted(path.scored) for path in paths] == [["a"], ["a", "b"], ["a"], ["a", "b"]]


def test_the_quadrature_is_exact_for_polynomials():
    for degree in range(6):
        total = sum(weight * step**degree for step, weight in gauss_legendre(3))
        assert total == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_a_weight_that_is_not_a_number_is_named(toy, text, candidates):
    import copy

    model = toy("opt")
    broken = copy.deepcopy(model.module)
    broken.model.decoder.layers[1].fc1.weight.data[3, 4] = float("nan")
    broken = dataclasses.replace(model, module=broken)
    with pytest.raises(ModelError, match="a weight to quantize is NaN or infinite; repair the model"):
        measure_sensitivity(broken, text(), candidates(model), PathIntegral())
