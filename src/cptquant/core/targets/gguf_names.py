"""Where each tensor of a Hugging Face model goes in a GGUF file: names, and what happens to its rows on the way.

Names are those that llama.cpp's loader asks for. `Place.rows` says how rows are moved, `residual_power` by which power
of the residual scale an OPT tensor is multiplied (`gguf.py`), `part` which part of a stacked tensor it becomes.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Rows = Literal["same", "rope", "rope_kv", "by_head", "skip_two"]
"""same: as they are. rope, rope_kv: each head's halves interleaved, with the number of query or key heads. by_head:
from head by head (q, k, v of head 0, ...) to all q, all k, all v. skip_two: without the first two rows."""


@dataclass(frozen=True)
class Place:
    """Where one tensor goes.

    Attributes:
        tensor: name in the file. rows: how its rows move. part: (index, count) in a stacked tensor, else None.
        residual_power: OPT only: the tensor is multiplied by the residual scale to this power.
        float32: stored in float32 although it has two axes.
    """

    tensor: str
    rows: Rows = "same"
    part: tuple[int, int] | None = None
    residual_power: int = 0
    float32: bool = False


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp.

    Attributes:
        architecture: value of `general.architecture`. prefix: of the base model's parameters, optional in a bare one.
        places: module path below the prefix (`{}` is the block's number) -> place of `.weight`; the place of `.bias` is
            the same with the other ending, unless `biases` says otherwise.
        omitted: modules that the engine computes nothing with.
    """

    architecture: str
    prefix: str
    places: dict[str, Place]
    biases: dict[str, Place]
    omitted: tuple[str, ...] = ()


def _llama(architecture: str, *, interleaved: bool) -> GgufFamily:
    query, key = (("rope", "rope_kv") if interleaved else ("same", "same"))  # fmt: skip
    places = {
        "embed_tokens": Place("token_embd"),
        "layers.{}.input_layernorm": Place("blk.{}.attn_norm"),
        "layers.{}.self_attn.q_proj": Place("blk.{}.attn_q", query),
        "layers.{}.self_attn.k_proj": Place("blk.{}.attn_k", key),
        "layers.{}.self_attn.v_proj": Place("blk.{}.attn_v"),
        "layers.{}.self_attn.o_proj": Place("blk.{}.attn_output"),
        "layers.{}.self_attn.q_norm": Place("blk.{}.attn_q_norm"),
        "layers.{}.self_attn.k_norm": Place("blk.{}.attn_k_norm"),
        "layers.{}.post_attention_layernorm": Place("blk.{}.ffn_norm"),
        "layers.{}.mlp.gate_proj": Place("blk.{}.ffn_gate"),
        "layers.{}.mlp.up_proj": Place("blk.{}.ffn_up"),
        "layers.{}.mlp.down_proj": Place("blk.{}.ffn_down"),
        "norm": Place("output_norm"),
        "lm_head": Place("output"),
    }
    return GgufFamily(architecture, "model.", places, {})


GGUF_FAMILIES: dict[str, GgufFamily] = {
    # llama.cpp's llama graph rotates neighbouring pairs, Hugging Face rotates halves: rows of q and k move.
    "llama": _llama("llama", interleaved=True),
    "mistral": _llama("llama", interleaved=True),
    "qwen2": _llama("qwen2", interleaved=False),
    "qwen3": _llama("qwen3", interleaved=False),
    "gpt2": GgufFamily(
        "gpt2",
        "transformer.",
        {
            "wte": Place("token_embd"),
            "wpe": Place("position_embd"),
            "h.{}.ln_1": Place("blk.{}.attn_norm"),
            "h.{}.attn.c_attn": Place("blk.{}.attn_qkv"),
            "h.{}.attn.c_proj": Place("blk.{}.attn_output"),
            "h.{}.ln_2": Place("blk.{}.ffn_norm"),
            "h.{}.mlp.c_fc": Place("blk.{}.ffn_up"),
            "h.{}.mlp.c_proj": Place("blk.{}.ffn_down"),
            "ln_f": Place("output_norm"),
            "lm_head": Place("output"),
        },
        {},
    ),
    "gpt_neox": GgufFamily(
        "gptneox",
        "gpt_neox.",
        {
            "embed_in": Place("token_embd"),
            "layers.{}.input_layernorm": Place("blk.{}.attn_norm"),
            "layers.{}.attention.query_key_value": Place("blk.{}.attn_qkv", "by_head"),
            "layers.{}.attention.dense": Place("blk.{}.attn_output"),
            "layers.{}.post_attention_layernorm": Place("blk.{}.ffn_norm"),
            "layers.{}.mlp.dense_h_to_4h": Place("blk.{}.ffn_up"),
            "layers.{}.mlp.dense_4h_to_h": Place("blk.{}.ffn_down"),
            "final_layer_norm": Place("output_norm"),
            "embed_out": Place("output"),
            "lm_head": Place("output"),
        },
        {},
    ),
    "opt": GgufFamily(
        "gpt2",
        "model.decoder.",
        {
            "embed_tokens": Place("token_embd", residual_power=1),
            "embed_positions": Place("position_embd", "skip_two", residual_power=1),
            "layers.{}.self_attn_layer_norm": Place("blk.{}.attn_norm"),
            "layers.{}.self_attn.q_proj": Place("blk.{}.attn_qkv", part=(0, 3)),
            "layers.{}.self_attn.k_proj": Place("blk.{}.attn_qkv", part=(1, 3)),
            "layers.{}.self_attn.v_proj": Place("blk.{}.attn_qkv", part=(2, 3)),
            "layers.{}.self_attn.out_proj": Place("blk.{}.attn_output", residual_power=1),
            "layers.{}.final_layer_norm": Place("blk.{}.ffn_norm"),
            "layers.{}.fc1": Place("blk.{}.ffn_up", residual_power=1),
            "layers.{}.fc2": Place("blk.{}.ffn_down"),
            "final_layer_norm": Place("output_norm", residual_power=-1),
            "lm_head": Place("output", residual_power=1),
        },
        {"layers.{}.fc2": Place("blk.{}.ffn_down", residual_power=1)},
    ),
    "bert": GgufFamily(
        "bert",
        "bert.",
        {
            "embeddings.word_embeddings": Place("token_embd"),
            "embeddings.position_embeddings": Place("position_embd"),
            "embeddings.token_type_embeddings": Place("token_types", float32=True),
            "embeddings.LayerNorm": Place("token_embd_norm"),
            "encoder.layer.{}.attention.self.query": Place("blk.{}.attn_q"),
            "encoder.layer.{}.attention.self.key": Place("blk.{}.attn_k"),
            "encoder.layer.{}.attention.self.value": Place("blk.{}.attn_v"),
            "encoder.layer.{}.attention.output.dense": Place("blk.{}.attn_output"),
            "encoder.layer.{}.attention.output.LayerNorm": Place("blk.{}.attn_output_norm"),
            "encoder.layer.{}.intermediate.dense": Place("blk.{}.ffn_up"),
            "encoder.layer.{}.output.dense": Place("blk.{}.ffn_down"),
            "encoder.layer.{}.output.LayerNorm": Place("blk.{}.layer_output_norm"),
        },
        {},
        omitted=("pooler.dense",),
    ),
}
"""Hugging Face `model_type` -> llama.cpp's names. OPT is written as GPT-2 (`exporters/gguf`)."""

_NUMBER = re.compile(r"\.(\d+)\.")


@lru_cache(maxsize=65536)
def find_place(model_type: str, parameter_name: str) -> Place | None:
    """Where a parameter (`….weight` or `….bias`) goes; None if the file has no place for it."""
    family = GGUF_FAMILIES[model_type]
    path, _, ending = parameter_name.rpartition(".")
    path = path.removeprefix(family.prefix)
    number = _NUMBER.search(f".{path}.")
    template = path if number is None else f".{path}.".replace(number.group(0), ".{}.", 1).strip(".")
    place = (family.biases if ending == "bias" else {}).get(template) or family.places.get(template)
    if place is None or ending not in ("weight", "bias"):
        return None
    index = "" if number is None else number.group(1)
    return replace(place, tensor=f"{place.tensor.replace('{}', index)}.{ending}")


def is_omitted(model_type: str, parameter_name: str) -> bool:
    """Whether the engine computes nothing with a parameter, so that the file leaves it out."""
    family = GGUF_FAMILIES[model_type]
    path = parameter_name.rpartition(".")[0].removeprefix(family.prefix)
    return path in family.omitted
