"""What vLLM's loader needs of the written config, and that transformers loads the same folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from cptquant.core.targets import find_target
from cptquant.models.load import load_any, quiet_transformers

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture
def written(cptquant, folder, tmp_path):
    run = tmp_path / "run"
    outcome = cptquant(
        "quantize", folder, "--target", "vllm", "--budget", "15bpw", "--output", run, "--quantizer", "rtn",
        "--allocator", "random", "--baselines", "uniform", "--calibration-sequences", 4, "--eval-sequences", 8,
        "--sequence-length", 32,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return run / "checkpoint"


def test_every_linear_layer_is_named_once(written):
    quantization = json.loads((written / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["quantization_status"] == "compressed"
    scheme_of = {name: key for key, group in quantization["config_groups"].items() for name in group["targets"]}
    with quiet_transformers():
        config = load_any(written).module.config
        plain = AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(scheme_of) | set(quantization["ignore"]) == linear
    assert not set(scheme_of) & set(quantization["ignore"])
    assert "lm_head" in quantization["ignore"]
    for group in quantization["config_groups"].values():
        arguments = group["weights"]
        assert group["format"] == "pack-quantized" and group["input_activations"] is None
        assert arguments["symmetric"] and arguments["type"] == "int" and arguments["num_bits"] in (4, 8)
        assert (arguments["strategy"], arguments["group_size"]) in {("channel", None), ("group", 32), ("group", 64)}
    for name in linear:
        for parts in FUSED:
            if name.endswith(parts[0]):
                mates = [name.removesuffix(parts[0]) + part for part in parts]
                assert len({scheme_of.get(mate) for mate in mates}) == 1


def test_the_target_is_listed(cptquant):
    assert "docs/serving.md" in find_target("vllm").description
    assert "--target vllm" in cptquant("targets").out
