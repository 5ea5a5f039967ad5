"""BERT as a graph: masked language model, sequence classifier, or bare encoder.

Inputs: `input_ids`, `attention_mask` (1 for real tokens), `token_type_ids`, each (batch, tokens) int64. Output:
`logits` or, of a bare encoder, `last_hidden_state`.
"""

import numpy as np
from onnx import TensorProto

from cptquant.exporters.onnx.graph import CONTRIB
from cptquant.exporters.onnx.parts import Norm, Parts


def build_bert(parts: Parts) -> None:
    """BERT with learned absolute positions."""
    config, graph = parts.config, parts.graph
    root = "" if parts.layout.task == "encoder" else "bert."
    hidden, mask = _embeddings(parts, root)
    lengths = graph.node("Cast", mask, to=TensorProto.INT32)
    for index in range(config.num_hidden_layers):
        hidden = _block(parts, f"{root}encoder.layer.{index}", hidden, lengths)
    _head(parts, root, hidden)


def _embeddings(parts: Parts, root: str) -> tuple[str, str]:
    graph, path = parts.graph, f"{root}embeddings"
    ids, mask, types = (
        graph.input(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    length = graph.node("Gather", graph.node("Shape", ids), graph.constant(np.array(1, np.int64)))
    zero, one = graph.constant(np.array(0, np.int64)), graph.constant(np.array(1, np.int64))
    places = parts.embedding(graph.node("Range", zero, length, one), f"{path}.position_embeddings")
    words = parts.embedding(ids, f"{path}.word_embeddings")
    kinds = parts.embedding(types, f"{path}.token_type_embeddings")
    total = graph.node("Add", graph.node("Add", words, kinds), places)
    return parts.norm(total, Norm(f"{path}.LayerNorm", parts.config.layer_norm_eps)), mask


def _block(parts: Parts, layer: str, hidden: str, lengths: str) -> str:
    config, graph = parts.config, parts.graph
    query, key, value = (parts.linear(hidden, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
    attended = graph.nodes(
        "MultiHeadAttention", [query, key, value, "", lengths], 1, domain=CONTRIB,
        num_heads=config.num_attention_heads,
    )[0]  # fmt: skip
    update = parts.linear(attended, f"{layer}.attention.output.dense")
    first = Norm(f"{layer}.attention.output.LayerNorm", config.layer_norm_eps)
    _, hidden = parts.add_norm(hidden, update, first)
    inner = parts.activate(parts.linear(hidden, f"{layer}.intermediate.dense"), config.hidden_act)
    update = parts.linear(inner, f"{layer}.output.dense")
    _, hidden = parts.add_norm(hidden, update, Norm(f"{layer}.output.LayerNorm", config.layer_norm_eps))
    return hidden


def _head(parts: Parts, root: str, hidden: str) -> None:
    config, graph, task = parts.config, parts.graph, parts.layout.task
    if task == "encoder":
        graph.output(hidden, "last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", config.hidden_size])
    elif task == "masked_lm":
        path = "cls.predictions"
        inner = parts.activate(parts.linear(hidden, f"{path}.transform.dense"), config.hidden_act)
        inner = parts.norm(inner, Norm(f"{path}.transform.LayerNorm", config.layer_norm_eps))
        logits = parts.linear(inner, f"{path}.decoder")
        graph.output(logits, "logits", TensorProto.FLOAT, ["batch", "tokens", config.vocab_size])
    else:
        first = graph.node("Gather", hidden, graph.constant(np.array(0, np.int64)), axis=1)
        pooled = graph.node("Tanh", parts.linear(first, f"{root}pooler.dense"))
        graph.output(parts.linear(pooled, "classifier"), "logits", TensorProto.FLOAT, ["batch", config.num_labels])
