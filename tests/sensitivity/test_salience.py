"""Salience of groups: from the model's own inputs, by the definition."""

from pathlib import Path

import torch
import transformers as hf

import cptquant
from cptquant.models.load import load_model
from cptquant.models.text import TokenSet


def test_salience_is_that_of_the_inputs_the_layer_sees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    ids = torch.randint(0, 60, (16, 20))
    tokens = TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(16), "random tokens")
    found = cptquant.measure_group_salience(model, tokens, 16)
    assert len(found) == 14 and {len(groups) for groups in found.values()} == {2, 3}
    name = "model.layers.1.mlp.down_proj"
    layer, seen = model.module.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model.module(ids)
    handle.remove()
    inputs = seen[0].reshape(-1, 48).double()
    hessian = inputs.t() @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    saliences = layer.weight.double().square() / upper.diagonal().square()
    expected = torch.stack([part.mean() for part in saliences.split(16, dim=1)])
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-2, atol=0)
