"""What the linear layers of each model family are called: the only place where such names stand.

A family is data: where its blocks are, and which path inside a block plays which role, in forward order. A model type
that is not listed is discovered: its blocks are the longest list of modules of one class that contain linear layers,
and its roles follow from `SUFFIX_ROLES`, or are "other".
"""

from dataclasses import dataclass, field

from cptquant.core.layout import Role


@dataclass(frozen=True)
class Family:
    """Names of one architecture, valid whatever head is on top.

    Attributes:
        blocks: path of the list of blocks below the base model (`config.base_model_prefix`).
        roles: path inside a block -> role, in forward order.
    """

    blocks: str
    roles: dict[str, Role] = field(default_factory=dict[str, Role])


_LLAMA = Family(
    "layers",
    {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    },
)

FAMILIES: dict[str, Family] = {
    "opt": Family(
        "decoder.layers",
        {
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "self_attn.out_proj": "o",
            "fc1": "up",
            "fc2": "down",
        },
    ),
    "bert": Family(
        "encoder.layer",
        {
            "attention.self.query": "q",
            "attention.self.key": "k",
            "attention.self.value": "v",
            "attention.output.dense": "o",
            "intermediate.dense": "up",
            "output.dense": "down",
        },
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family(
        "h",
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    ),
    "gpt_bigcode": Family(
        "h",
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    ),
    "gpt_neox": Family(
        "layers",
        {
            "attention.query_key_value": "qkv",
            "attention.dense": "o",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        },
    ),
}

SUFFIX_ROLES: dict[str, Role] = {
    # attention
    "q_proj": "q", "k_proj": "k", "v_proj": "v",
    "query": "q", "key": "k", "value": "v",
    "q_lin": "q", "k_lin": "k", "v_lin": "v",
    "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv", "Wqkv": "qkv",
    "o_proj": "o", "out_proj": "o", "out_lin": "o", "attn.c_proj": "o",
    "self_attn.dense": "o", "attention.dense": "o", "self_attention.dense": "o", "attention.output.dense": "o",
    # feed-forward
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "fc1": "up", "fc2": "down", "fc_in": "up", "fc_out": "down", "lin1": "up", "lin2": "down",
    "c_fc": "up", "mlp.c_proj": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    "intermediate.dense": "up", "output.dense": "down",
    # outside the blocks
    "project_in": "projection", "project_out": "projection", "embeddings_project": "projection",
    "embedding_hidden_mapping_in": "projection", "transform.dense": "projection", "lm_head.dense": "projection",
    "vocab_transform": "projection", "pre_classifier": "pooler", "pooler.dense": "pooler", "classifier.dense": "pooler",
    "classifier": "head", "classifier.out_proj": "head", "score": "head", "lm_head": "head",
}  # fmt: skip
"""Last parts of a module path -> role; the longest match wins."""

BEFORE_BLOCKS = ("project_in", "embeddings_project", "embedding_hidden_mapping_in")
"""Linear layers outside the blocks that run before them; all others run after."""


def suffix_role(path: str) -> Role:
    """Role of a module by the last parts of its path; "other" if none is known."""
    parts = path.split(".")
    for start in range(len(parts)):
        role = SUFFIX_ROLES.get(".".join(parts[start:]))
        if role is not None:
            return role
    return "other"
