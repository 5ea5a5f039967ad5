"""Loading beyond the families: the embedded models, quantized checkpoints, silence, and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.models.layout import entry_count
from cptquant.models.load import load_any, load_model, read_layout
from cptquant.packing.quantized_weight import QuantizedWeight, encode


@pytest.mark.parametrize(
    ("name", "task", "blocks"), [("opt-mini", "causal_lm", 12), ("bert-mini", "sequence_classification", 6)]
)
def test_embedded_models(name, task, blocks):
    loaded = load_model(f"embedded:{name}")
    assert loaded.layout.task == task
    assert loaded.layout.block_count == blocks
    assert loaded.layout.source == f"embedded:{name}"
    assert entry_count(loaded.layout) == loaded.layout.parameters
    assert loaded.layout.source_bytes < 6e6
    assert loaded.require_tokenizer().is_fast
    assert len(loaded.require_tokenizer()) <= loaded.layout.vocabulary_size


def test_loading_says_nothing_and_leaves_the_settings_alone(save_toy, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(save_toy("gpt2")))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    saved = capfd.readouterr().err  # of save_pretrained in the fixture: nothing is expected from it either
    assert saved == ""


@pytest.mark.parametrize("name", ["opt", "bert-mlm", "llama", "gpt2", "gpt-neox"])
def test_attention_equals_the_eager_one_with_padding(name, save_toy):
    fast = load_model(str(save_toy(name))).module
    slow = load_model(str(save_toy(name))).module
    slow.set_attn_implementation("eager")
    assert (fast.config._attn_implementation, slow.config._attn_implementation) == ("sdpa", "eager")
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        found, expected = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (fast, slow))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- quantized checkpoints ---


def _codes(site: Site, fmt: QuantFormat, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (fmt.code_bits - 1)
    shape = (site.out_features, site.in_features)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = {"tensor": (1,)}.get(str(fmt.granularity), (site.out_features, fmt.group_count(site.in_features)))
    scales = (torch.rand(groups, generator=generator) * 0.05 + 0.01).half()
    zeros = None if fmt.symmetric else torch.ones(groups, dtype=torch.int8)
    return QuantizedWeight(format=fmt, codes=codes, scales=scales, zeros=zeros)


def _quantize(folder: Path, formats: dict[str, str]) -> dict[str, QuantizedWeight]:
    """Turn a saved float model into a compressed-tensors checkpoint of random codes."""
    layout = read_layout(str(folder))
    tensors = load_file(folder / "model.safetensors")
    weights, groups = {}, {}
    for index, (name, text) in enumerate(formats.items()):
        fmt = QuantFormat.parse(text)
        site = layout.site_by_name[name]
        weights[name] = _codes(site, fmt, seed=index)
        tensors.pop(site.parameter_name, None)
        tensors.update({f"{name}.{local}": tensor for local, tensor in encode(weights[name]).items()})
        grouped = isinstance(fmt.granularity, int)
        groups[f"group_{index}"] = {
            "targets": [name],
            "weights": {
                "num_bits": fmt.code_bits, "type": "int", "symmetric": fmt.symmetric,
                "strategy": "group" if grouped else fmt.granularity,
                "group_size": fmt.granularity if grouped else None,
            },
            "format": "int-quantized" if fmt.storage == "plain" else "pack-quantized",
        }  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return weights


FORMATS = {
    "model.embed_tokens": "int8-channel-plain",
    "model.layers.0.self_attn.q_proj": "int4-g16",
    "model.layers.0.self_attn.k_proj": "int2-g16",
    "model.layers.1.mlp.up_proj": "int3-channel",
    "model.layers.1.mlp.down_proj": "int5-tensor-asym",
    "model.layers.2.self_attn.o_proj": "int8-channel",
    "lm_head": "int6-g32",
}


def test_quantized_checkpoint_comes_dequantized_without_rounding(save_toy):
    folder = save_toy("llama-untied", torch.float16)
    original = load_model(str(folder))
    weights = _quantize(folder, FORMATS)
    loaded = load_any(str(folder))
    assert loaded.layout.parameters == original.layout.parameters
    assert loaded.layout.source_bytes == sum(
        tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
    )
    for site in loaded.layout.sites:
        found = loaded.module.get_submodule(site.name).weight
        wanted = (
            weights[site.name].dequantize() if site.name in weights else original.module.get_submodule(site.name).weight
        )
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0)


def test_dequantized_model_gives_the_logits_of_the_packed_one(save_toy):
    from transformers import AutoModelForCausalLM

    folder = save_toy("llama-untied", torch.float16)
    _quantize(folder, FORMATS)
    loaded = load_any(str(folder))
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not [hook for part in loaded.module.modules() for hook in part._forward_pre_hooks.values()]
    assert getattr(loaded.module.config, "quantization_config", None) is None
    ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(ids).logits, packed(ids).logits, rtol=1e-5, atol=1e-5)


def test_float_model_comes_in_its_own_dtype(save_toy):
    loaded = load_any(str(save_toy("opt", torch.bfloat16)))
    assert loaded.module.dtype == torch.bfloat16


def test_other_quantization_methods_are_refused(save_toy):
    folder = save_toy("opt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_any(str(folder))
    assert str(caught.value) == (
        f"{folder} is quantized with awq; evaluate reads compressed-tensors checkpoints and float models: save it "
        "dequantized"
    )


def test_shared_embedding_stays_shared(save_toy):
    folder = save_toy("llama", torch.float16)
    _quantize(folder, {"model.layers.0.self_attn.q_proj": "int4-g16"})
    loaded = load_any(str(folder))
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight


# --- memory ---

_MEASURE = """
import resource, sys
from cptquant.models.load import load_model
import transformers.models.opt.modeling_opt
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
model = load_model(sys.argv[1])
print(model.layout.source_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def test_loading_keeps_no_second_copy(tmp_path):
    config = OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=8, num_attention_heads=16, vocab_size=96,
        word_embed_proj_dim=1024, architectures=["OPTForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        names = OPTForCausalLM(config).state_dict()
    tensors = {name: torch.ones(t.shape, dtype=torch.bfloat16) for name, t in names.items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    source_bytes, grown = map(int, found.stdout.split())
    assert source_bytes > 200e6
    assert grown < 1.4 * source_bytes  # a second copy would make it 2
