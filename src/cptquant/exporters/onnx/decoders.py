"""Causal language models as graphs with a key/value cache: OPT, Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX.

Inputs: `input_ids` (batch, tokens), the cache, its fill (`seqlens_k` = tokens in total - 1, `total_sequence_length`),
`position_ids` where positions are learned, and `logit_positions`: which of the new tokens get logits, so that a prompt
does not pay for a head it does not need. Attention is GroupQueryAttention, which also turns q and k by their rotary
angles; the cache may be one buffer that input and output share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto

from cptquant.exporters.onnx.check import rotary_angles
from cptquant.exporters.onnx.graph import CONTRIB
from cptquant.exporters.onnx.parts import Norm, Parts


@dataclass(frozen=True)
class Cache:
    """What the cache of one layer measures.

    Attributes:
        heads: of queries. kv_heads: of keys and values. head_size: of each.
        rotary_size: leading entries of a head that are turned; 0 without rotary positions.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int = 0


class Decoder:
    """What all causal models here share: inputs, attention with cache, logits."""

    def __init__(self, parts: Parts, cache: Cache, context: int) -> None:
        self.parts, self.graph, self.cache, self.context = parts, parts.graph, cache, context
        graph = self.graph
        self.ids = graph.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        self._fill = graph.input("seqlens_k", TensorProto.INT32, ["batch"])
        self._total = graph.input("total_sequence_length", TensorProto.INT32, [])
        self._wanted = graph.input("logit_positions", TensorProto.INT64, ["selected"])
        self._angles: tuple[str, str] | None = None

    def positions(self) -> str:
        """Positions of the new tokens, for models that learn them."""
        return self.graph.input("position_ids", TensorProto.INT64, ["batch", "tokens"])

    def use_rotary(self, inverse_frequencies: torch.Tensor, scaling: float) -> None:
        """Cosines and sines for all positions up to the context, computed when the engine loads the model."""
        graph = self.graph
        frequencies = graph.constant(inverse_frequencies.float().reshape(1, -1).numpy())
        places = graph.constant(np.arange(self.context, dtype=np.float32).reshape(-1, 1))
        angles = graph.node("Mul", places, frequencies)
        factor = graph.constant(np.array(scaling, np.float32))
        cosine, sine = (graph.node("Mul", graph.node(name, angles), factor) for name in ("Cos", "Sin"))
        self._angles = (cosine, sine)

    def attention(self, layer: int, query: str, key: str = "", value: str = "", *, scale: float | None = None) -> str:
        """Attention of one layer; with `key` empty, `query` holds q, k and v side by side."""
        cache, graph = self.cache, self.graph
        shape: list[int | str] = ["batch", cache.kv_heads, "past", cache.head_size]
        total: list[int | str] = ["batch", cache.kv_heads, "total", cache.head_size]
        past = [graph.input(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
        rotary = [*self._angles] if self._angles is not None else []
        output, *present = graph.nodes(
            "GroupQueryAttention", [query, key, value, *past, self._fill, self._total, *rotary], 3, domain=CONTRIB,
            num_heads=cache.heads, kv_num_heads=cache.kv_heads, scale=scale, do_rotary=int(bool(rotary)),
        )  # fmt: skip
        for part, made in zip(("key", "value"), present, strict=True):
            graph.output(made, f"present.{layer}.{part}", TensorProto.FLOAT, total)
        return output

    def select(self, hidden: str) -> str:
        """The hidden states that get logits."""
        return self.graph.node("Gather", hidden, self._wanted, axis=1)

    def finish(self, logits: str) -> None:
        """Declare the output."""
        self.graph.output(logits, "logits", TensorProto.FLOAT, ["batch", "selected", self.parts.layout.vocabulary_size])


def build_opt(parts: Parts, context: int) -> Decoder:
    """OPT, pre-norm or post-norm, with or without projections around the blocks."""
    config, root = parts.config, "model.decoder"
    heads = config.num_attention_heads
    decoder = Decoder(parts, Cache(config.num_hidden_layers, heads, heads, config.hidden_size // heads), context)
    graph, before = parts.graph, config.do_layer_norm_before
    hidden = parts.embedding(decoder.ids, f"{root}.embed_tokens")
    if parts.has(f"{root}.project_in.weight"):
        hidden = parts.linear(hidden, f"{root}.project_in")
    shifted = graph.node("Add", decoder.positions(), graph.constant(np.array(2, np.int64)))
    hidden = graph.node("Add", hidden, parts.embedding(shifted, f"{root}.embed_positions"))
    layers = [f"{root}.layers.{index}" for index in range(config.num_hidden_layers)]
    firsts = [Norm(f"{layer}.self_attn_layer_norm", 1e-5) for layer in layers]
    has_final = parts.has(f"{root}.final_layer_norm.weight")
    normed = parts.norm(hidden, firsts[0]) if before else hidden
    for index, layer in enumerate(layers):
        attended = _separate_attention(parts, decoder, index, normed, f"{layer}.self_attn")
        update = parts.linear(attended, f"{layer}.self_attn.out_proj")
        second = Norm(f"{layer}.final_layer_norm", 1e-5)
        hidden, normed = parts.add_norm(hidden, update, second if before else firsts[index])
        inner = parts.activate(parts.linear(normed, f"{layer}.fc1"), config.activation_function)
        update = parts.linear(inner, f"{layer}.fc2")
        if not before:
            _, hidden = parts.add_norm(normed, update, second)
            normed = hidden
        elif index + 1 < len(layers):
            hidden, normed = parts.add_norm(hidden, update, firsts[index + 1])
        elif has_final:
            hidden, normed = parts.add_norm(hidden, update, Norm(f"{root}.final_layer_norm", 1e-5))
        else:
            normed = graph.node("Add", hidden, update)
    normed = decoder.select(normed)
    if parts.has(f"{root}.project_out.weight"):
        normed = parts.linear(normed, f"{root}.project_out")
    decoder.finish(parts.linear(normed, parts.head))
    return decoder


def build_llama(parts: Parts, context: int) -> Decoder:
    """Llama, Mistral, Qwen2 and Qwen3: root-mean-square norms, rotary positions, gated feed-forward."""
    config = parts.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = Cache(config.num_hidden_layers, heads, kv_heads, head_size, head_size)
    decoder = Decoder(parts, cache, context)
    decoder.use_rotary(*rotary_angles(config, parts.layout.architecture))
    epsilon = config.rms_norm_eps
    layers = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]
    firsts = [Norm(f"{layer}.input_layernorm", epsilon, centered=False) for layer in layers]
    afters = [*firsts[1:], Norm("model.norm", epsilon, centered=False)]
    hidden = parts.embedding(decoder.ids, "model.embed_tokens")
    normed = parts.norm(hidden, firsts[0])
    for index, layer in enumerate(layers):
        attended = _separate_attention(parts, decoder, index, normed, f"{layer}.self_attn")
        update = parts.linear(attended, f"{layer}.self_attn.o_proj")
        second = Norm(f"{layer}.post_attention_layernorm", epsilon, centered=False)
        hidden, normed = parts.add_norm(hidden, update, second)
        update = parts.linear(_gated(parts, normed, f"{layer}.mlp"), f"{layer}.mlp.down_proj")
        hidden, normed = parts.add_norm(hidden, update, afters[index])
    decoder.finish(parts.linear(decoder.select(normed), parts.head))
    return decoder


def build_gpt2(parts: Parts, context: int) -> Decoder:
    """GPT-2, from its own Conv1D weights."""
    config = parts.config
    heads, root = config.n_head, "transformer"
    decoder = Decoder(parts, Cache(config.n_layer, heads, heads, config.n_embd // heads), context)
    graph, epsilon = parts.graph, config.layer_norm_epsilon
    hidden = graph.node(
        "Add", parts.embedding(decoder.ids, f"{root}.wte"), parts.embedding(decoder.positions(), f"{root}.wpe")
    )
    layers = [f"{root}.h.{index}" for index in range(config.n_layer)]
    afters = [*(Norm(f"{layer}.ln_1", epsilon) for layer in layers[1:]), Norm(f"{root}.ln_f", epsilon)]
    normed = parts.norm(hidden, Norm(f"{layers[0]}.ln_1", epsilon))
    for index, layer in enumerate(layers):
        attended = decoder.attention(index, parts.linear(normed, f"{layer}.attn.c_attn"))
        update = parts.linear(attended, f"{layer}.attn.c_proj")
        hidden, normed = parts.add_norm(hidden, update, Norm(f"{layer}.ln_2", epsilon))
        inner = parts.activate(parts.linear(normed, f"{layer}.mlp.c_fc"), config.activation_function)
        hidden, normed = parts.add_norm(hidden, parts.linear(inner, f"{layer}.mlp.c_proj"), afters[index])
    decoder.finish(parts.linear(decoder.select(normed), parts.head))
    return decoder


def build_gpt_neox(parts: Parts, context: int) -> Decoder:
    """GPT-NeoX (Pythia): fused q/k/v head by head, rotary on part of each head, parallel residual where configured."""
    config, root, graph = parts.config, "gpt_neox", parts.graph
    heads = config.num_attention_heads
    head_size = config.hidden_size // heads
    frequencies, scaling = rotary_angles(config, parts.layout.architecture)
    cache = Cache(config.num_hidden_layers, heads, heads, head_size, 2 * frequencies.numel())
    decoder = Decoder(parts, cache, context)
    decoder.use_rotary(frequencies, scaling)
    epsilon = config.layer_norm_eps
    order = gpt_neox_row_order(config.hidden_size, heads)
    hidden = parts.embedding(decoder.ids, f"{root}.embed_in")
    for index in range(config.num_hidden_layers):
        layer = f"{root}.layers.{index}"
        normed = parts.norm(hidden, Norm(f"{layer}.input_layernorm", epsilon))
        packed = parts.reordered_linear(normed, f"{layer}.attention.query_key_value", order)
        update = parts.linear(decoder.attention(index, packed), f"{layer}.attention.dense")
        second = Norm(f"{layer}.post_attention_layernorm", epsilon)
        if config.use_parallel_residual:
            inner, hidden = parts.norm(hidden, second), graph.node("Add", hidden, update)
        else:
            hidden, inner = parts.add_norm(hidden, update, second)
        inner = parts.activate(parts.linear(inner, f"{layer}.mlp.dense_h_to_4h"), config.hidden_act)
        hidden = graph.node("Add", hidden, parts.linear(inner, f"{layer}.mlp.dense_4h_to_h"))
    normed = parts.norm(decoder.select(hidden), Norm(f"{root}.final_layer_norm", epsilon))
    decoder.finish(parts.linear(normed, parts.head))
    return decoder


def gpt_neox_row_order(hidden_size: int, heads: int) -> torch.Tensor:
    """(3 · hidden_size,) int64: row r of q, k, v one below the other is row `order[r]` of GPT-NeoX's fused matrix."""
    return torch.arange(3 * hidden_size).reshape(heads, 3, hidden_size // heads).transpose(0, 1).reshape(-1)


DECODERS: dict[str, Callable[[Parts, int], Decoder]] = {
    "opt": build_opt,
    "llama": build_llama,
    "mistral": build_llama,
    "qwen2": build_llama,
    "qwen3": build_llama,
    "gpt2": build_gpt2,
    "gpt_neox": build_gpt_neox,
}


def _separate_attention(parts: Parts, decoder: Decoder, index: int, normed: str, path: str) -> str:
    names = [f"{path}.{part}_proj" for part in ("q", "k", "v")]
    has_head_norms = parts.has(f"{path}.q_norm.weight")
    if not has_head_norms:
        packed = parts.joined(normed, names)
        if packed is not None:
            return decoder.attention(index, packed)
    query, key, value = (parts.linear(normed, name) for name in names)
    if has_head_norms:
        query = _head_norm(parts, query, f"{path}.q_norm", decoder.cache.heads, decoder.cache.head_size)
        key = _head_norm(parts, key, f"{path}.k_norm", decoder.cache.kv_heads, decoder.cache.head_size)
    return decoder.attention(index, query, key, value)


def _head_norm(parts: Parts, x: str, name: str, heads: int, head_size: int) -> str:
    graph = parts.graph
    split = graph.node("Reshape", x, graph.constant(np.array([0, 0, heads, head_size], np.int64)))
    normed = parts.norm(split, Norm(name, parts.config.rms_norm_eps, centered=False))
    return graph.node("Reshape", normed, graph.constant(np.array([0, 0, heads * head_size], np.int64)))


def _gated(parts: Parts, normed: str, path: str) -> str:
    graph, width = parts.graph, parts.config.intermediate_size
    both = parts.joined(normed, [f"{path}.gate_proj", f"{path}.up_proj"])
    if both is None:
        gate, up = parts.linear(normed, f"{path}.gate_proj"), parts.linear(normed, f"{path}.up_proj")
    else:
        sizes = graph.constant(np.array([width, width], np.int64))
        gate, up = graph.nodes("Split", [both, sizes], 2, axis=-1)
    return graph.node("Mul", parts.activate(gate, parts.config.hidden_act), up)
