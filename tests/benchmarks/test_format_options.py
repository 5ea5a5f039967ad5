"""Options of the comparison of formats: each fit against a slow optimum, each rotation against the model itself."""

import math
from pathlib import Path

import pytest
import torch
from format_options import Columns, Entries, LowRank, Plain, Rotated, damped, fit_entries, output_error, rotation
from head_rotation import fold_heads, largest_logit_change
from more_formats import compare_site, interpolate, lower_hull
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from cptquant.core.formats import QuantFormat
from cptquant.models.load import load_model
from cptquant.quantizers.gptq import Gptq

INT3, INT8 = QuantFormat.parse("int3-g32"), QuantFormat.parse("int8-g32")
GPTQ = Gptq()


@pytest.fixture
def matrix() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (48, 64) with a few large entries, and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    weight[torch.randint(48, (12,), generator=generator), torch.randint(64, (12,), generator=generator)] *= 6
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    inputs[:, 5] *= 8
    return weight, inputs.t() @ inputs / 400


def test_low_rank_factors_leave_the_tail_of_the_whitened_spectrum(matrix):
    weight, hessian = matrix
    metric = damped(hessian, GPTQ)
    root = torch.linalg.cholesky(metric)
    option = LowRank(INT3, 4, 16)
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    left = error - option.fit(error, root, torch.float16)
    tail = torch.linalg.svdvals(error.double() @ root.double())[4:].square().sum()
    assert output_error(left, metric) == pytest.approx(float(tail), rel=1e-3)  # factors are rounded to 16 bits


def test_entries_solve_each_row(matrix):
    weight, hessian = matrix
    metric = damped(hessian, GPTQ)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[0, [3, 9, 40]] = mask[7, [1]] = True
    found = fit_entries(weight, mask, metric)
    assert torch.equal(found != 0, mask)
    for row in (0, 7):
        root = torch.linalg.cholesky(metric.double()).t()
        columns = mask[row].nonzero().flatten()
        best = torch.linalg.lstsq(root[:, columns], (root @ weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row, columns].double(), best, rtol=1e-3, atol=1e-4)


def test_kept_columns_make_up_for_the_others(matrix):
    weight, hessian = matrix
    metric = damped(hessian, GPTQ)
    option = Columns(INT3, 0.05, 16)
    found = option.quantize(weight, hessian, GPTQ, torch.float16)
    count = option.count(64)
    assert count == 3
    # What is kept is where the gradient of the damped error vanishes, but for its rounding to 16 bits.
    gradient = ((found - weight) @ metric).abs().amax(dim=0)
    assert int((gradient < 0.25 * gradient.median()).sum()) == count
    assert output_error(found - weight, metric) < output_error(
        Plain(INT3).quantize(weight, hessian, GPTQ, torch.float16) - weight, metric
    )


@pytest.mark.parametrize(
    "option",
    [LowRank(INT3, 2, 8), Columns(INT3, 0.05, 8), Entries(INT3, 0.02, 8, "magnitude"), Entries(INT3, 0.02, 16, "group"),
     Entries(INT3, 0.02, 8, "salience"), Entries(INT3, 0.02, 8, "correction")],
    ids=lambda option: option.name,
)  # fmt: skip
def test_what_is_kept_lowers_the_error_and_costs_bits(matrix, option):
    weight, hessian = matrix
    plain = Plain(INT3)
    error = output_error(option.quantize(weight, hessian, GPTQ, torch.float16) - weight, hessian)
    assert error < output_error(plain.quantize(weight, hessian, GPTQ, torch.float16) - weight, hessian)
    assert option.bits(48, 64) > plain.bits(48, 64)


def test_bits_count_everything():
    packed = 8 * INT3.stored_bytes(48, 64)
    assert LowRank(INT3, 2, 16).bits(48, 64) == packed + 16 * 2 * (48 + 64)
    assert LowRank(INT3, 2, 8).bits(48, 64) == packed + 8 * 2 * (48 + 64) + 16 * 4
    p = 61 / 3072  # 2 % of 3072 weights
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert Entries(INT3, 0.02, 8, "magnitude").bits(48, 64) == pytest.approx(packed + 3072 * entropy + 61 * 8 + 16)
    # 61 columns of 3 bits with two scales a row, 3 columns of 16 bits with their numbers, the shape record
    assert Columns(INT3, 0.05, 16).bits(48, 64) == 48 * 61 * 3 + 16 * 48 * 2 + 48 * 3 * 16 + 3 * 16 + 128


@pytest.mark.parametrize("side", ["columns", "rows", "both"])
def test_a_rotation_is_turned_back(matrix, side):
    weight, hessian = matrix
    found = Rotated(INT8, side, 16).quantize(weight, hessian, GPTQ, torch.float16)
    assert output_error(found - weight, hessian) < 1e-3 * output_error(weight, hessian)
    turned = rotation(64, 16, 0)
    torch.testing.assert_close(turned.t() @ turned, torch.eye(64))
    with pytest.raises(ValueError, match="must be a power of two"):
        rotation(64, 48, 0)


def test_the_hull_and_the_lines():
    hull = lower_hull([(2.0, 8.0), (3.0, 5.0), (4.0, 2.0), (5.0, 2.5), (3.5, 2.5)])
    assert hull == [(2.0, 8.0), (3.5, 2.5), (4.0, 2.0)]
    assert interpolate(hull, 3.0) == pytest.approx(8 - 5.5 / 1.5)
    plain = [{"family": "plain", "option": f"int{b}-g64", "bits": b + 0.25, "text": 4.0**-b} for b in (2, 3, 4)]
    other = {"family": "other", "option": "half", "bits": 2.75, "text": 4.0**-2.5}
    row = compare_site({"rows": [*plain, other]}, "text")[-1]
    assert row["to_plain"] == pytest.approx(1.0)
    assert row["to_chord"] == pytest.approx(4.0**-2.5 / ((4.0**-2 + 4.0**-3) / 2))
    assert row["vertex"]


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_heads_rotate_for_nothing(tmp_path: Path, family: str):
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    torch.manual_seed(0)
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32))
    else:  # two heads share a value head
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / family)
    loaded = load_model(tmp_path / family)
    change, largest = largest_logit_change(loaded, torch.randint(3, 96, (2, 20)))
    assert change < 1e-10 * largest
    with_queries, _ = largest_logit_change(loaded, torch.randint(3, 96, (2, 20)), queries=True)
    assert (with_queries < 1e-10 * largest) == (family == "opt")  # rotary embeddings do not commute with it
    turned = dict(fold_heads(loaded).named_parameters())
    moved = {name for name, old in loaded.module.named_parameters() if not torch.equal(old.double(), turned[name])}
    assert moved == {name for name in turned if "v_proj" in name or name.endswith(("o_proj.weight", "out_proj.weight"))}
