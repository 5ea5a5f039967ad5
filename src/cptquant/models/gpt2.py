"""GPT-2 rewritten, exactly, as the architecture GPT-BigCode, whose linear layers are `nn.Linear`.

compressed-tensors packs `nn.Linear` only, and transformers builds GPT-2 from `Conv1D`, so a packed GPT-2 cannot be
loaded. GPT-BigCode with `multi_query: false` computes the same function from the same tensors under the same names,
with two differences in how they are stored: matrices are (out, in) instead of (in, out), and the rows of the fused
q/k/v matrix go head by head (q, k, v of head 0, q, k, v of head 1, ...) instead of all q, all k, all v. Reordering
rows does not touch a row's codes or scales, so a quantized matrix is rewritten without loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.packing.quantized_weight import StoredWeight

_ARCHITECTURES = {
    "GPT2LMHeadModel": "GPTBigCodeForCausalLM",
    "GPT2ForSequenceClassification": "GPTBigCodeForSequenceClassification",
    "GPT2Model": "GPTBigCodeModel",
}
_CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_DROPPED_FIELDS = ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "auto_map", "task_specific_params")
_DROPPED_PREFIX = "summary_"


def rewrite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the equal GPT-BigCode model.

    Args:
        config: content of GPT-2's config.json.

    Raises:
        ModelError: cross attention, attention scaled by layer, or a head that GPT-BigCode does not have.
    """
    architecture = (config.get("architectures") or ["GPT2LMHeadModel"])[0]
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{architecture} cannot be written as GPT-BigCode, the form in which compressed-tensors can hold GPT-2; "
            f"possible are {', '.join(_ARCHITECTURES)}"
        )
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        if config.get(name):
            raise ModelError(
                f"GPT-2 with {name} = true cannot be written as GPT-BigCode, the form in which compressed-tensors can "
                "hold GPT-2"
            )
    kept = {
        name: value
        for name, value in config.items()
        if name not in _DROPPED_FIELDS and not name.startswith(_DROPPED_PREFIX)
    }
    return {
        "activation_function": "gelu_new",  # GPT-2's default; GPT-BigCode's differs
        **kept,
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": "gpt_bigcode",
        "multi_query": False,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    }


def attention_row_order(hidden_size: int, head_count: int) -> Tensor:
    """(3 · hidden_size,) int64: row r of GPT-BigCode's c_attn is row `order[r]` of GPT-2's."""
    rows = torch.arange(3 * hidden_size).reshape(3, head_count, hidden_size // head_count)
    return rows.transpose(0, 1).reshape(-1)


def rewrite_dense(
    name: str,
    tensor: Tensor,  # as in GPT-2's state dict: Conv1D weights (in_features, out_features)
    order: Tensor,  # (3 * hidden_size,) int64, of `attention_row_order`
) -> Tensor:
    """The tensor of that name in GPT-BigCode's state dict: weights (out_features, in_features), c_attn by heads."""
    if name.endswith(_CONV1D_WEIGHTS):
        tensor = tensor.t()
    if _is_fused_attention(name.rpartition(".")[0]):
        tensor = tensor[order]
    return tensor.contiguous()


def rewrite_quantized(
    site_name: str,
    weight: StoredWeight,
    order: Tensor,  # (3 * hidden_size,) int64, of `attention_row_order`
) -> StoredWeight:
    """The quantized matrix of that name in GPT-BigCode: c_attn's rows by heads, everything else as it is."""
    if not _is_fused_attention(site_name):
        return weight
    return weight.rows(order)


def _is_fused_attention(module_name: str) -> bool:
    return module_name.endswith("attn.c_attn")
