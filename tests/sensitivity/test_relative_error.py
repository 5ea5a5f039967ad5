"""Relative errors against running the layer, for every kind of site."""

import pytest
import torch

from cptquant.core.progress import ignore_progress
from cptquant.models.stream import ModelStream, read_weight, site_modules
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import integer_formats, original_weight
from cptquant.sensitivity.relative_error import relative_errors


def changed_and_original(model, site, fmt):
    weight = original_weight(model, site).float()
    return Rtn()(weight, fmt, torch.float16).dequantize(), weight


@pytest.mark.parametrize("name", ["llama", "gpt2", "classifier"])
def test_output_error_is_that_of_the_layers_own_outputs(toy, text, candidates, name):
    model = toy(name)
    tokens, formats = text(model.layout.task), integer_formats(candidates(model), model.layout)
    found = relative_errors(model, tokens, formats, "output", ignore_progress)
    stream = ModelStream(model, tokens, batch_size=4)
    stream.advance(stream.load_block())
    block = stream.load_block()
    inputs = {}
    for site_name, module in site_modules(block, model.layout, 1).items():
        module.register_forward_pre_hook(lambda _, args, key=site_name: inputs.setdefault(key, []).append(args[0]))
    for index, hidden in enumerate(stream.hidden):
        stream.run_block(block, index, hidden)
    masks = [batch.attention_mask.bool() for batch in stream.batches]
    for site_name, seen in inputs.items():
        site = model.layout.site_by_name[site_name]
        assert torch.equal(original_weight(model, site).float(), read_weight(block.get_submodule(
            site_name.split(".1.", 1)[1]), site))  # fmt: skip
        vectors = torch.cat([part[mask] for part, mask in zip(seen, masks, strict=True)])
        for fmt in formats[site_name]:
            changed, weight = changed_and_original(model, site, fmt)
            expected = (vectors @ (changed - weight).t()).square().sum() / (vectors @ weight.t()).square().sum()
            assert found[site_name][fmt.name] == pytest.approx(float(expected), rel=1e-3)


def test_an_embeddings_rows_count_as_often_as_they_occur(toy, text, candidates):
    model, tokens = toy("opt"), text()
    formats = integer_formats(candidates(model), model.layout)
    name = next(site.name for site in model.layout.sites if site.kind == "embedding")
    found = relative_errors(model, tokens, {name: formats[name]}, "output", ignore_progress)
    changed, weight = changed_and_original(model, model.layout.site_by_name[name], formats[name][0])
    ids = tokens.input_ids[tokens.attention_mask.bool()]
    expected = (changed - weight)[ids].square().sum() / weight[ids].square().sum()
    assert found[name][formats[name][0].name] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["opt", "opt-projected", "masked"])
def test_sites_outside_the_blocks_have_an_error_too(toy, text, candidates, name):
    model = toy(name)
    formats = integer_formats(candidates(model), model.layout)
    outside = {site.name for site in model.layout.sites if site.block_index is None}
    found = relative_errors(model, text(model.layout.task), formats, "output", ignore_progress)
    assert outside
    assert set(found) == set(formats)
    for site_name in outside & set(formats):
        assert all(0 < error < 1 for error in found[site_name].values())


def test_weight_rule_needs_no_text(toy, candidates):
    model = toy("opt")
    formats = integer_formats(candidates(model), model.layout)
    found = relative_errors(model, None, formats, "weight", ignore_progress)
    site = model.layout.block_sites[0]
    changed, weight = changed_and_original(model, site, formats[site.name][1])
    expected = (changed - weight).square().sum() / weight.square().sum()
    assert found[site.name][formats[site.name][1].name] == pytest.approx(float(expected), rel=1e-4)
