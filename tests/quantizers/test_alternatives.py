"""A site in another format is what `quantize_sites` would have made of it, had the plan said so."""

import pytest
import torch
from engines_models.tiny_models import save_model
from quantizers.test_quantize import make_model, make_plan, make_tokens

from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.models.load import load_model
from cptquant.quantizers.alternatives import quantize_alternatives
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.rtn import Rtn


class Kept:
    def __init__(self):
        self.found = {}

    def keep(self, _index, weights, _records):
        self.found.update(weights)

    def weight(self, name):
        return self.found[name].dequantize() if name in self.found else None


@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
@pytest.mark.parametrize("quantizer", [Gptq(coarse_products=False), Rtn()], ids=["gptq", "rtn"])
def test_equals_the_plan_with_that_format(name, quantizer, tmp_path):
    model, tokens = make_model(name, tmp_path), make_tokens()
    start = Kept()
    quantize_sites(model, make_plan(model), quantizer, tokens, start.keep)
    sites = [site.name for site in model.layout.block_sites]
    chosen = [sites[1], sites[-1]]
    names = ("int2-g16", "int6-g16", "int2-g16-c5", "bfloat16")
    formats = {site: [QuantFormat.parse(text) for text in names] for site in chosen}
    steps = []
    found = quantize_alternatives(
        model, start, formats, quantizer, tokens, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)] and set(found) == set(chosen)
    for site in chosen:
        assert list(found[site]) == ["int2-g16", "int6-g16", "int2-g16-c5"]
        for fmt, weight in found[site].items():
            other = Kept()
            plan = make_plan(model)
            plan = plan.model_copy(update={"formats": {**plan.formats, site: fmt}})
            quantize_sites(model, plan, quantizer, tokens, other.keep)
            assert torch.equal(weight.dequantize(), other.found[site].dequantize()), (site, fmt)


@pytest.mark.parametrize("quantizer", [Gptq(coarse_products=False), Rtn()], ids=["gptq", "rtn"])
def test_halves_equal_the_plan_with_them(quantizer, tmp_path):
    model, tokens = load_model(save_model("opt", tmp_path / "model")), make_tokens()
    start, halves = Kept(), QuantFormat.parse("slim3-g32-sorted-halves")
    quantize_sites(model, make_plan(model), quantizer, tokens, start.keep)
    site = model.layout.block_sites[3].name
    found = quantize_alternatives(model, start, {site: [halves]}, quantizer, tokens)
    other, plan = Kept(), make_plan(model)
    plan = plan.model_copy(update={"formats": {**plan.formats, site: halves.name}})
    quantize_sites(model, plan, quantizer, tokens, other.keep)
    assert torch.equal(found[site][halves.name].dequantize(), other.found[site].dequantize())


def test_groups_of_mixed_width_are_refused(tmp_path):
    model, tokens = make_model("llama", tmp_path), make_tokens()
    site = model.layout.block_sites[3].name
    with pytest.raises(UserError, match=f"--refine-swaps cannot judge groups of mixed width \\(at {site}\\)"):
        quantize_alternatives(model, Kept(), {site: [QuantFormat.parse("slim3-g32")]}, Gptq(), tokens)
