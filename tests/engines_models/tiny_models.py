"""Small random models of every family that has a graph, and codes for all their sites."""

import shutil
from pathlib import Path

import torch
import transformers

from cptquant.core.formats import QuantFormat
from cptquant.core.targets import find_target
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.models.load import LoadedModel
from cptquant.quantizers.rtn import Rtn

EMBEDDED = Path(__file__).parents[2] / "src/cptquant/models/embedded_data"
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_GATED = {**_SIZES, "vocab_size": 2048, "intermediate_size": 96, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "opt": ("OPTForCausalLM", {**_SIZES, "vocab_size": 2048, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-post-norm": (
        "OPTForCausalLM",
        {**_SIZES, "vocab_size": 2048, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "llama": ("LlamaForCausalLM", {**_GATED, "rope_parameters": _LLAMA3, "tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", {**_GATED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", _GATED),
    "qwen3": ("Qwen3ForCausalLM", {**_GATED, "head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 2048, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**_SIZES, "vocab_size": 2048, "intermediate_size": 96, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
    "bert-encoder": ("BertModel", {**_SIZES, "vocab_size": 2048, "intermediate_size": 96}),
    "bert-masked": ("BertForMaskedLM", {**_SIZES, "vocab_size": 2048, "intermediate_size": 96}),
    "bert-classifier": (
        "BertForSequenceClassification", {**_SIZES, "vocab_size": 2048, "intermediate_size": 96, "num_labels": 3}
    ),
}  # fmt: skip


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Random weights, norms and biases away from 1 and 0 so that a forgotten one shows."""
    architecture, fields = MODELS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(7)
    model = model_class(model_class.config_class(**fields))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(3)
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "opt-mini" / file, folder / file)
    return folder


def quantize(model: LoadedModel, names: list[str]) -> tuple[dict[str, QuantFormat], MemoryWeights]:
    """Codes for every site, formats in turn; an embedding that is the head has one tensor."""
    layout, state = model.layout, model.module.state_dict()
    scale_dtype = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    formats, weights = {}, {}
    for index, site in enumerate(layout.sites):
        fmt = QuantFormat.parse(names[index % len(names)])
        if fmt.is_float or (site.role == "pooler" and layout.task == "encoder"):  # an encoder's file has no pooler
            formats[site.name] = layout.keep_format
            continue
        if layout.shared_head is not None and site.name == layout.shared_head[1]:
            formats[site.name], weights[site.name] = (found[layout.shared_head[0]] for found in (formats, weights))
            continue
        if fmt.storage == "segments" or fmt.is_corrected:
            fmt = find_target("onnx").fit(site, fmt)
        weight = state[site.parameter_name].float()
        codes = Rtn(clip_search=index % 2 == 0)(weight.t() if site.transposed else weight, fmt, scale_dtype)
        formats[site.name], weights[site.name] = fmt, codes
    return formats, MemoryWeights(weights)
