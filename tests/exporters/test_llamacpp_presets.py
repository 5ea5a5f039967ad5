"""Our list of the presets' types against what llama.cpp's own quantizer writes; skipped where it is not installed."""

import subprocess
from pathlib import Path

import gguf
import pytest
from engines_models.llamacpp_here import needs_llamacpp
from gguf_toys import plan_of, save_toy

from cptquant.core.gguf_types import find_block_type
from cptquant.core.targets.gguf_names import find_place
from cptquant.core.targets.gguf_presets import PRESETS, preset_formats
from cptquant.engines.llamacpp_python import find_llamacpp
from cptquant.exporters.gguf.tensors import list_tensors
from cptquant.exporters.gguf.write import write_file
from cptquant.models.load import load_model
from cptquant.packing.shards import ShardFolder

pytestmark = [pytest.mark.engines, needs_llamacpp]

QUANTIZE = """
import sys, llama_cpp
source, output, preset = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.nthread = 1
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset}")
sys.exit(llama_cpp.llama_model_quantize(source.encode(), output.encode(), parameters))
"""
LIKE = {"IQ4_NL": "Q4_0"}
"""Of the same bytes; llama.cpp changed from one to the other in 2026."""
CASES = {
    "llama": dict(num_hidden_layers=17),
    "llama-untied": dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=352),
    "qwen3": dict(num_hidden_layers=9, layer_types=["full_attention"] * 9),
    "gpt2": dict(n_layer=10),
    "gpt_neox": dict(num_hidden_layers=8),
    "opt": dict(num_hidden_layers=12),
    "bert": dict(num_hidden_layers=8),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_the_type_that_the_engine_gives_it(name: str, tmp_path: Path) -> None:
    model = load_model(str(save_toy(name, tmp_path / "toy", **CASES[name])))
    layout = model.layout
    source = tmp_path / "original.gguf"
    plan = plan_of(model, {site.name: layout.keep_format for site in layout.sites})
    write_file(source, model, list_tensors(model, plan, ShardFolder(tmp_path / "none", {}, {})))
    for preset in PRESETS:
        output = tmp_path / f"{preset}.gguf"
        command = [find_llamacpp().python, "-c", QUANTIZE, str(source), str(output), preset]
        subprocess.run(command, check=True, capture_output=True)
        written = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output).tensors}
        for site in layout.sites:
            place = find_place(layout.model_type, site.parameter_name)
            if place is None or place.tensor not in written:
                continue  # a pooler, or a head that is the embedding
            engine = LIKE.get(written[place.tensor], written[place.tensor])
            ours = preset_formats(layout, preset)[site.name].name
            assert ours == (engine if find_block_type(engine) else layout.keep_format.name), (preset, place.tensor)
