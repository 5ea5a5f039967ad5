"""The metadata llama.cpp needs to build a model's graph, and the variants it cannot build."""

from collections.abc import Callable
from typing import Any

import gguf

from cptquant.core.errors import ModelError
from cptquant.core.targets.gguf_names import GGUF_FAMILIES
from cptquant.exporters.gguf.tensors import OPT_RESIDUAL_SCALE
from cptquant.models.load import LoadedModel

_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "llama": ("silu",),
    "mistral": ("silu",),
    "qwen2": ("silu",),
    "qwen3": ("silu",),
    "gpt2": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
    "gpt_neox": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "opt": ("relu",),
    "bert": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
}
"""llama.cpp has one GELU, the tanh form; the exact form differs from it by less than 5e-4."""


def check_config(model: LoadedModel) -> None:
    """Refuse, before anything is quantized, what llama.cpp would compute differently.

    Raises:
        ModelError: with the field, its value and what is possible.
    """
    config: Any = model.module.config.get_text_config()
    kind = model.layout.model_type
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation not in _ACTIVATIONS[kind]:
        raise ModelError(
            f"--target gguf: llama.cpp runs {kind} with {' or '.join(_ACTIVATIONS[kind])}, the model's config.json has "
            f"{activation!r}"
        )
    for field, wanted in _FIXED_FIELDS.get(kind, {}).items():
        found = getattr(config, field, wanted)
        if found != wanted:
            raise ModelError(f"--target gguf: llama.cpp runs {kind} with {field} = {wanted}, config.json has {found}")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ModelError(
            f"--target gguf: rotary scaling {rope['rope_type']!r} is not supported here; default, linear and llama3 are"
        )


_FIXED_FIELDS: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "scale_attn_weights": True},
    "opt": {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "enable_bias": True},
    "bert": {"is_decoder": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
}


def write_metadata(writer: gguf.GGUFWriter, model: LoadedModel) -> None:
    """All keys of the architecture; the tokenizer's are apart."""
    config: Any = model.module.config.get_text_config()
    layout = model.layout
    writer.add_name(layout.source.rstrip("/").rpartition("/")[2] or layout.architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    writer.add_context_length(context_length(model))
    writer.add_embedding_length(layout.hidden_size)
    writer.add_block_count(layout.block_count)
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_vocab_size(layout.vocabulary_size)
    _WRITERS[layout.model_type](writer, config)


def context_length(model: LoadedModel) -> int:
    """Positions the model has; a sliding window, which llama.cpp's llama graph does not know, is its limit."""
    config: Any = model.module.config.get_text_config()
    positions = model.layout.max_positions or 2048
    window = getattr(config, "sliding_window", None) if model.layout.model_type == "mistral" else None
    return min(positions, int(window)) if window else positions


def architecture(model: LoadedModel) -> str:
    """llama.cpp's name."""
    return GGUF_FAMILIES[model.layout.model_type].architecture


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_llama(writer: gguf.GGUFWriter, config: Any) -> None:
    rope, width = _rope(config), _head_width(config)
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count_kv(int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(int(config.n_inner or 4 * config.n_embd))
    writer.add_layer_norm_eps(float(config.layer_norm_epsilon))


def _write_opt(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(int(config.ffn_dim))
    writer.add_layer_norm_eps(1e-5 * OPT_RESIDUAL_SCALE**2)


def _write_gpt_neox(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    share = float(rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 0.25)))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_rope_dimension_count(int(_head_width(config) * share))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_parallel_residual(bool(config.use_parallel_residual))
    writer.add_layer_norm_eps(float(config.layer_norm_eps))


def _write_bert(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_layer_norm_eps(float(config.layer_norm_eps))
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(int(config.type_vocab_size))


_WRITERS: dict[str, Callable[[gguf.GGUFWriter, Any], None]] = {
    "llama": _write_llama,
    "mistral": _write_llama,
    "qwen2": _write_llama,
    "qwen3": _write_llama,
    "gpt2": _write_gpt2,
    "opt": _write_opt,
    "gpt_neox": _write_gpt_neox,
    "bert": _write_bert,
}
