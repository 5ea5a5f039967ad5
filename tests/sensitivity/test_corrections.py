"""Damages of corrected formats: those of the codes, times what the inputs say the correction leaves."""

import pytest
import torch

from cptquant.core.formats import QuantFormat
from cptquant.models.stream import ModelStream, site_modules
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import collect_block_hessians
from cptquant.sensitivity.corrections import correction_ratios, without_corrections
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method
from cptquant.sensitivity.perturbation import original_weight


@pytest.mark.parametrize("method", ["tdmpq", "cmpq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_corrected_format_has_the_damage_of_its_codes_times_a_ratio(toy, text, name, method):
    model, tokens = toy(name), text()
    keep = model.layout.keep_format
    row = tuple(
        QuantFormat.parse(fmt) for fmt in ("int3-g16", "int3-g16-c5", "int2-g16-c10", "int3-g16-r2", "int2-g16-r1")
    )
    formats = {site.name: (*row, keep) if site.kind == "linear" else (row[0], keep) for site in model.layout.sites}
    table = measure_sensitivity(model, tokens, formats, find_method(method))
    alone = measure_sensitivity(model, tokens, without_corrections(formats), find_method(method))
    lower = dict.fromkeys((fmt.name for fmt in row[1:]), 0)
    for site, damages in table.damages.items():
        assert list(damages) == [fmt.name for fmt in formats[site]]
        assert damages["int3-g16"] == alone.damages[site]["int3-g16"]
        if len(damages) > 2:
            for fmt in row[1:]:
                base = alone.damages[site][fmt.base.name]
                assert 0 < damages[fmt.name].value <= base.value and damages[fmt.name].n == base.n
                assert fmt.storage == "low-rank" or damages[fmt.name].value < base.value
                lower[fmt.name] += damages[fmt.name].value < base.value
    assert min(lower.values()) > len(table.damages) // 2
    assert table.metadata["corrections_sequences"] == tokens.sequence_count
    assert "corrections" not in alone.metadata and table.block_scores == alone.block_scores


def test_sites_whose_inputs_have_outliers_gain_most(toy, text):
    """Inputs of one column ten times as large: GPTQ's own error falls there as the ratio says, and little elsewhere."""
    model, tokens = toy("llama"), text(sequences=12)
    layout = model.layout
    fmt = QuantFormat.parse("int3-g16-c3")
    ratios = correction_ratios(model, tokens, {site.name: (fmt,) for site in layout.block_sites}, lambda *_: None)
    stream = ModelStream(model, tokens)
    block = stream.load_block()
    modules = site_modules(block, layout, 0)
    hessians = collect_block_hessians(stream, block, modules)
    site = layout.block_sites[0]
    weight, hessian = original_weight(model, site).float(), hessians.hessian(site.name)
    spread = torch.ones(len(hessian))
    spread[3] = 10.0
    for moments, limit in ((hessian, 1.0), (hessian * spread[:, None] * spread, 0.6)):
        corrected, plain = (
            Gptq()(weight, moments, wanted, torch.bfloat16).relative_output_error for wanted in (fmt, fmt.base)
        )
        assert corrected / plain < limit
        if limit == 1.0:
            assert ratios[site.name][fmt.name] == pytest.approx(corrected / plain, rel=0.25)
