"""GPT-2 as GPT-BigCode: the same function, also when its matrices are quantized."""

import pytest
import torch
from transformers import GPT2Config, GPTBigCodeConfig, GPTBigCodeForCausalLM

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.models.gpt2 import attention_row_order, rewrite_config, rewrite_dense, rewrite_quantized
from cptquant.packing.quantized_weight import QuantizedWeight

ORDER = attention_row_order(32, 2)


def _rewritten(model) -> GPTBigCodeForCausalLM:
    config = GPTBigCodeConfig(**rewrite_config(model.config.to_dict()))
    twin = GPTBigCodeForCausalLM(config).to(model.dtype).eval()
    state = {name: rewrite_dense(name, tensor, ORDER) for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state)  # strict: every name is there, none is left over
    return twin


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "gelu"])
@pytest.mark.parametrize("scaled", [True, False])
def test_gpt_bigcode_gives_gpt2s_logits(toy, activation, scaled):
    model = toy("gpt2", activation_function=activation, scale_attn_weights=scaled)
    ids = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        expected, found = (
            m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (model, _rewritten(model))
        )
    assert expected.std() > 0.1  # the comparison is not one of zeros
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_row_order_is_a_permutation_that_goes_head_by_head():
    order = attention_row_order(hidden_size=6, head_count=3)
    assert order.tolist() == [0, 1, 6, 7, 12, 13, 2, 3, 8, 9, 14, 15, 4, 5, 10, 11, 16, 17]


@pytest.mark.parametrize("format_name", ["int4-g16", "int3-channel", "int4-tensor-asym"])
def test_quantized_rows_are_rewritten_without_loss(format_name):
    fmt = QuantFormat.parse(format_name)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-4, 4, (96, 32), generator=generator, dtype=torch.int8)
    shape = (1,) if fmt.granularity == "tensor" else (96, fmt.group_count(32))
    scales = (torch.rand(shape, generator=generator) + 0.5).half()
    zeros = None if fmt.symmetric else torch.ones(shape, dtype=torch.int8)
    weight = QuantizedWeight(format=fmt, codes=codes, scales=scales, zeros=zeros)

    fused = rewrite_quantized("transformer.h.0.attn.c_attn", weight, ORDER)
    assert torch.equal(fused.dequantize(), weight.dequantize()[ORDER])
    assert not torch.equal(fused.codes, codes)
    assert rewrite_quantized("transformer.h.0.mlp.c_fc", weight, ORDER) is weight


def test_dense_and_quantized_rewriting_agree():
    weight = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    as_stored = weight.t()  # Conv1D keeps (in, out)
    assert torch.equal(rewrite_dense("transformer.h.1.attn.c_attn.weight", as_stored, ORDER), weight[ORDER])
    assert torch.equal(rewrite_dense("transformer.h.1.mlp.c_proj.weight", as_stored, ORDER), weight)
    assert torch.equal(rewrite_dense("transformer.h.1.attn.c_attn.bias", weight[:, 0], ORDER), weight[ORDER, 0])
    assert torch.equal(rewrite_dense("transformer.wte.weight", weight, ORDER), weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "GPT-2 with scale_attn_by_inverse_layer_idx = true cannot be written",
        ),
        ({"add_cross_attention": True}, "GPT-2 with add_cross_attention = true cannot be written"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel cannot be written as GPT-BigCode"),
    ],
)
def test_what_gpt_bigcode_cannot_do_is_refused(changes, message):
    config = {**GPT2Config(architectures=["GPT2LMHeadModel"]).to_dict(), **changes}
    with pytest.raises(ModelError, match=message):
        rewrite_config(config)
