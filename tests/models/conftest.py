"""Small random models of every family, and folders of them as `save_pretrained` writes them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from cptquant.models.load import quiet_transformers

_GPT_NEOX = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
_LLAMA = dict(_GPT_NEOX, num_key_value_heads=1, head_dim=16)
_OPT = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=32)
_GPT2 = dict(n_embd=32, n_layer=3, n_head=2, n_positions=64)
_COMMON = dict(vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)

TOYS: dict[str, tuple[str, str, dict]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt-350m": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(_OPT, hidden_size=64, word_embed_proj_dim=48, do_layer_norm_before=False),
    ),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", dict(_GPT_NEOX, hidden_size=48)),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", dict(_GPT_NEOX, hidden_size=48, num_labels=3)),
    "bert-encoder": ("BertModel", "BertConfig", dict(_GPT_NEOX, hidden_size=48)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(_LLAMA, tie_word_embeddings=True)),
    "llama-untied": ("LlamaForCausalLM", "LlamaConfig", dict(_LLAMA, tie_word_embeddings=False)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _GPT_NEOX),
    # not in the table of families: discovered
    "phi": ("PhiForCausalLM", "PhiConfig", _GPT_NEOX),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", dict(_GPT_NEOX, num_key_value_heads=1)),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=32, n_layer=3, n_head=2)),
    "falcon": ("FalconForCausalLM", "FalconConfig", dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2)),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", dict(_GPT2, rotary_dim=8)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", dict(dim=48, hidden_dim=64, n_layers=3, n_heads=2)),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", dict(_GPT_NEOX, hidden_size=48, num_labels=3)),
    # refused
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(_LLAMA, num_local_experts=4)),
    "albert": ("AlbertModel", "AlbertConfig", dict(_GPT_NEOX, embedding_size=32)),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
    ),
    "vit": ("ViTModel", "ViTConfig", dict(_GPT_NEOX, image_size=16, patch_size=8)),
    "token-classifier": ("BertForTokenClassification", "BertConfig", dict(_GPT_NEOX)),
}


def make_toy(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A small random model; weights large enough that a wrong one shows in the logits."""
    class_name, config_name, options = TOYS[name]
    config = getattr(transformers, config_name)(**{**_COMMON, **options, **changes})
    torch.manual_seed(0)
    with quiet_transformers():
        model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    return model.to(dtype).eval()


@pytest.fixture
def toy() -> Callable[..., PreTrainedModel]:
    return make_toy


@pytest.fixture
def save_toy(tmp_path: Path) -> Callable[..., Path]:
    """Save a small model under tmp_path/NAME with the real `save_pretrained`."""

    def save(name: str, dtype: torch.dtype = torch.float32, *, max_shard_size: str = "5GB", **changes: object) -> Path:
        folder = tmp_path / name
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_toy(name, dtype, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save
