"""What of a model has no graph here: activation, rotary positions, windows, switches. Known from the config alone."""

from collections.abc import Callable
from typing import Any

import torch

from cptquant.core.errors import ModelError
from cptquant.core.layout import ModelLayout
from cptquant.core.targets import find_target
from cptquant.models.load import LoadedModel

ACTIVATIONS = ("relu", "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "tanh")
"""Hugging Face's names that `parts.Parts.activate` writes."""
_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
_INSTEAD = "use --target transformers"


def check_onnx_exportable(model: LoadedModel, context: int) -> None:
    """Refuse, before anything is quantized, a model that has no graph here, or not for this context.

    Raises:
        ModelError: what it is, and what is possible.
    """
    layout, config = model.layout, model.module.config
    refusal = find_target("onnx").refuse_model(layout)
    if refusal is not None:
        raise ModelError(refusal)
    longest = layout.max_positions
    if longest is not None and context > longest:
        raise ModelError(f"--context {context} is longer than the {longest} positions of {layout.source}")
    _check_activation(config, layout)
    family_check = _FAMILY_CHECKS.get(layout.model_type)
    if family_check is not None:
        family_check(config, layout, context)


def rotary_angles(config: Any, architecture: str) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and scaling of the angles, by transformers' own functions.

    Raises:
        ModelError: a type of rotary positions, or a number of turned entries, that ONNX Runtime does not have.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = dict(getattr(config, "rope_parameters", None) or {})
    kind = settings.get("rope_type", "default")
    if kind not in _ROTARY_TYPES:
        raise ModelError(
            f"--target onnx does not know rotary positions of type {kind!r}; it knows {', '.join(_ROTARY_TYPES)}; "
            f"{_INSTEAD}"
        )
    if kind == "default":
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        size = int(size * settings.get("partial_rotary_factor", 1.0))
        powers = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        frequencies, scaling = 1.0 / (settings["rope_theta"] ** powers), 1.0
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if frequencies.numel() % 8:
        raise ModelError(
            f"{architecture} turns {2 * frequencies.numel()} entries of each head by their position; ONNX Runtime "
            f"needs a multiple of 16; {_INSTEAD}"
        )
    return frequencies, scaling


def _check_activation(config: Any, layout: ModelLayout) -> None:
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        raise ModelError(
            f"--target onnx does not know the activation {name!r} of {layout.architecture}; it knows "
            f"{', '.join(ACTIVATIONS)}; {_INSTEAD}"
        )


def _check_llama(config: Any, layout: ModelLayout, context: int) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and context > window and "sliding_attention" in kinds:
        raise ModelError(
            f"{layout.architecture} attends to the last {window} tokens only, and the context is {context}; "
            f"--target onnx holds full attention: pass --context {window}"
        )
    rotary_angles(config, layout.architecture)


def _check_gpt_neox(config: Any, layout: ModelLayout, context: int) -> None:
    rotary_angles(config, layout.architecture)


def _check_gpt2(config: Any, layout: ModelLayout, context: int) -> None:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, name, False):
            raise ModelError(f"--target onnx cannot hold GPT-2 with {name} = true; {_INSTEAD}")


def _check_bert(config: Any, layout: ModelLayout, context: int) -> None:
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ModelError(f"--target onnx knows BERT with absolute positions, not {kind!r}; {_INSTEAD}")


_FAMILY_CHECKS: dict[str, Callable[[Any, ModelLayout, int], None]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _check_llama),
    "gpt_neox": _check_gpt_neox,
    "gpt2": _check_gpt2,
    "bert": _check_bert,
}
