"""The loss around a model against the evaluation of the moved model, autograd and finite differences."""

import math

import pytest
import torch

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.evaluation.evaluate import evaluate
from cptquant.laws.ptq_features import plan_features
from cptquant.models.losses import scored_targets, sequence_nll
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.landscape import LandscapeProbe
from cptquant.sensitivity.model_noise import measure_model_noise
from cptquant.sensitivity.perturbation import original_weight, perturb


class Rounded:
    """Every site rounded, as `evaluate` reads it."""

    def __init__(self, model, plan):
        self._codes = {
            name: Rtn()(original_weight(model, model.layout.site_by_name[name]), fmt, torch.float16)
            for name, fmt in plan.items()
            if not fmt.is_float
        }

    def quantized(self, name):
        return self._codes.get(name)

    def weight(self, name):
        return self._codes[name].dequantize() if name in self._codes else None


def first_plan(model, candidates, name):
    return {site: row[0] for site, row in candidates(model, (name,)).items()}


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_end_of_the_way_is_the_rounded_model(toy, text, candidates, name):
    model, tokens = toy(name), text(sequences=4)
    plan = first_plan(model, candidates, "int3-g16")
    landscape = LandscapeProbe(model, tokens).along_rounding(plan)
    measured = {
        m.name: m.value
        for m in evaluate(model, {"quantized": Rounded(model, plan)}, tokens)
        if m.subject == "quantized"
    }
    assert landscape.full_kl_nats == pytest.approx(measured["kl_nats_per_token"], rel=1e-3)
    assert landscape.full_rise_nats == pytest.approx(measured["nll_increase_nats_per_token"], rel=1e-3, abs=1e-5)


def test_slope_is_the_gradient_along_the_change(toy, text, candidates):
    model, tokens = toy("llama"), text(sequences=3)
    plan = first_plan(model, candidates, "int8-g16")
    landscape = LandscapeProbe(model, tokens).along_rounding(plan)
    module = model.module
    module.requires_grad_(True)
    try:
        nll = sequence_nll(
            module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits,
            scored_targets(tokens, "causal_lm"),
        )
        (nll.sums.sum() / nll.counts.sum()).backward()
        slope = 0.0
        for name, fmt in plan.items():
            if fmt.is_float:
                continue
            site = model.layout.site_by_name[name]
            gradient = module.get_submodule(name).weight.grad
            slope += float((gradient * perturb(original_weight(model, site), fmt, model.layout, Rtn())).sum())
    finally:
        module.requires_grad_(False)
        module.zero_grad(set_to_none=True)
    # float16 storage of kept weights shifts both ends alike, so it cancels in the slope
    assert landscape.slope == pytest.approx(slope, rel=0.05)


def test_small_changes_cost_their_square(toy, text, candidates):
    model, tokens = toy("opt"), text(sequences=4)
    probe = LandscapeProbe(model, tokens)
    along = probe.along_random((0.01, 0.02))
    assert along[0.02].kl_nats / along[0.01].kl_nats == pytest.approx(4, rel=0.1)
    again = LandscapeProbe(model, tokens).along_random((0.01,))
    assert again[0.01] == along[0.01]
    assert probe.along_random((0.01,), seeds=(1,))[0.01] != along[0.01]


def test_features_of_a_plan_are_sums_over_its_sites(toy, text, candidates):
    model, tokens = toy("llama"), text(sequences=4)
    low, high = (first_plan(model, candidates, name) for name in ("int2-g16", "int4-g16"))
    mixed = {name: (low if index % 2 else high)[name] for index, name in enumerate(low)}
    noise = measure_model_noise(model, tokens, {"low": low, "high": high}, tokens_seen=1e6)
    layout = model.layout
    for method in ("rtn", "gptq"):
        found = plan_features(noise, layout, mixed, method, "mixed")
        taylor, output, weights = 0.0, 0.0, sum(site.weight_count for site in layout.block_sites)
        for site in layout.sites:
            if mixed[site.name].is_float:
                continue
            one = noise.sites[site.name][mixed[site.name].name]
            ratio = one.gptq_ratio if method == "gptq" else 1
            taylor += one.taylor_kl_nats * ratio
            output += site.weight_count / weights * one.output_error * ratio if site.block_index is not None else 0
        assert found.taylor_kl_nats == pytest.approx(taylor)
        assert found.output_error == pytest.approx(output)
        assert found.half_kl_nats is None and found.rtn_kl_nats is None
    uniform = plan_features(noise, layout, low, "rtn", "low")
    assert uniform.code_bits == 2 and uniform.group_columns == 16 and uniform.method_ratio == 1
    assert uniform.rtn_kl_nats == noise.landscapes["low"].full_kl_nats
    assert uniform.random_growth == pytest.approx(
        math.log(noise.random_kl_nats["0.3"] / noise.random_kl_nats["0.05"]) / math.log(36)
    )
    kept = {site.name: layout.keep_format for site in layout.sites}
    assert plan_features(noise, layout, kept, "rtn", "kept").taylor_kl_nats == 0
    with pytest.raises(KeyError):
        plan_features(noise, layout, {**low, layout.block_sites[0].name: QuantFormat.parse("int7-g16")}, "rtn", "low")


def test_other_models_are_refused(toy, text, candidates):
    model = toy("classifier")
    with pytest.raises(
        ModelError, match="is a sequence classification model; the PTQ law is fitted on causal language"
    ):
        measure_model_noise(model, text("sequence_classification"), {})
