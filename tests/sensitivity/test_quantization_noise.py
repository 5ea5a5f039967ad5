"""Noise of a site, and what GPTQ leaves of it, against regression, brute force and GPTQ itself."""

import numpy as np
import pytest
import torch

from cptquant.core.formats import QuantFormat
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.perturbation import original_weight, perturb
from cptquant.sensitivity.quantization_noise import conditional_moments, measure_noise
from cptquant.sensitivity.taylor import Tdmpq


def correlated_inputs(count: int, width: int, strength: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, width, generator=generator)
    return own + strength * torch.randn(count, 1, generator=generator)


def test_conditional_moments_are_residuals_of_regressions():
    inputs = correlated_inputs(400, 7, 1.5).double().numpy()
    moment = inputs.T @ inputs / len(inputs)
    found = conditional_moments(torch.tensor(moment, dtype=torch.float32), damping=0.0)
    for column in range(7):
        later = inputs[:, column + 1 :]
        factors = np.linalg.lstsq(later, inputs[:, column], rcond=None)[0]
        residual = np.mean((inputs[:, column] - later @ factors) ** 2)
        assert float(found[column]) == pytest.approx(residual, rel=1e-4)


def test_dead_inputs_have_nothing_left():
    moment = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    assert conditional_moments(moment, 0.0).tolist() == pytest.approx([1.0, 0.0, 2.0])
    assert conditional_moments(torch.zeros(3, 3), 0.01).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_expected_ratio_is_what_gptq_reaches(strength):
    """Without clipping and descent, at 6 bits. The expectation counts damping as input, which the error does not."""
    torch.manual_seed(1)
    weight, inputs = torch.randn(256, 64), correlated_inputs(4000, 64, strength)
    moment, fmt = inputs.T @ inputs / len(inputs), QuantFormat.parse("int6-channel")
    gptq = Gptq(clip_search=False, descent_rounds=0, damping=0.01)
    change = Rtn(clip_search=False)(weight, fmt, torch.float16).dequantize() - weight
    rounded = float(((change @ moment) * change).sum())
    expected = float((change.square().sum(0) * conditional_moments(moment, 0.01)).sum()) / rounded
    left = gptq(weight, moment, fmt, torch.float16).weight.dequantize() - weight
    reached = float(((left @ moment) * left).sum()) / rounded
    assert reached == pytest.approx(expected, rel=0.06 if strength < 2 else 0.1)
    assert (expected < 0.9) == (strength > 0)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_noise_of_every_site(toy, text, candidates, name):
    model, tokens = toy(name), text()
    formats = candidates(model)
    noise = measure_noise(model, tokens, formats, sequences=6)
    taylor = measure_sensitivity(model, tokens, formats, Tdmpq(sequences=6, outside_sequences=6))
    for site in model.layout.sites:
        for fmt in formats[site.name]:
            if fmt.is_float:
                continue
            found, weight = noise[site.name][fmt.name], original_weight(model, site)
            change = perturb(weight, fmt, model.layout, Rtn())
            expected = float(change.square().sum() / weight.float().square().sum())
            assert found.weight_error == pytest.approx(expected, rel=1e-4)
            assert found.taylor_kl_nats == taylor.damages[site.name][fmt.name].value
            assert 0 < found.gptq_ratio <= 1
            assert (found.gptq_ratio == 1) or site.kind == "linear"


def test_known_second_order_is_taken_as_it_is(toy, text, candidates):
    model, formats = toy("opt"), candidates(toy("opt"), ("int4-g16",))
    known = {name: {fmt.name: 0.125 for fmt in row} for name, row in formats.items()}
    noise = measure_noise(model, text(), formats, known_taylor=known)
    assert {found.taylor_kl_nats for row in noise.values() for found in row.values()} == {0.125}
