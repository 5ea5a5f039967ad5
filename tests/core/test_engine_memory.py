"""Memory as a budget: the parts of the prediction by hand."""

import pytest

from cptquant.core.engine_memory import (
    cache_bytes,
    default_context,
    held_bytes_per_token,
    predict_memory,
)
from cptquant.core.errors import BudgetError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site


def grouped(task: str = "causal_lm") -> ModelLayout:
    """Two blocks of width 64 with 8 query heads and 2 key/value heads of 8."""
    sites = [Site(name="embedding", out_features=100, in_features=64, kind="embedding", role="embedding")]
    for block in range(2):
        for role, rows in (("q", 64), ("k", 16), ("v", 16), ("o", 64)):
            sites.append(Site(name=f"{block}.{role}", out_features=rows, in_features=64, block_index=block, role=role))
    sites.append(Site(name="head", out_features=100, in_features=64, role="head"))
    parameters = sum(site.weight_count for site in sites)
    return ModelLayout(
        architecture="X", model_type="llama", task=task, source="x", source_digest="", source_dtype="bfloat16",
        storage_dtype="bfloat16", source_bytes=2 * parameters, parameters=parameters, block_count=2, hidden_size=64,
        max_positions=512, vocabulary_size=100, sites=tuple(sites),
    )  # fmt: skip


def test_the_cache_counts_key_value_heads():
    assert cache_bytes(grouped(), 100, 4) == 100 * 2 * (16 + 16) * 4
    assert cache_bytes(grouped("encoder"), 100, 4) == 0


def test_fused_attention_is_a_third_each():
    layout = grouped()
    fused = Site(name="0.qkv", out_features=192, in_features=64, block_index=0, role="qkv")
    assert cache_bytes(layout.model_copy(update={"sites": (fused,)}), 10, 2) == 10 * (64 + 64) * 2


def test_a_token_reads_every_matrix_but_the_embedding():
    layout, int4 = grouped(), QuantFormat.parse("int4-g64")
    blocks, head = 2 * (64 + 16 + 16 + 64) * 64, 100 * 64
    assert held_bytes_per_token(layout, {}, float_bytes=4) == 4 * (blocks + head)
    found = held_bytes_per_token(layout, {"head": int4, "embedding": int4}, float_bytes=2)
    assert found == 2 * blocks + int4.stored_bytes(100, 64)
    assert held_bytes_per_token(grouped("encoder"), {}, float_bytes=4) is None


def test_prediction_is_the_sum_of_its_parts():
    found = predict_memory(grouped(), "onnx", {}, 256)
    assert found.predicted_bytes == found.base_bytes + found.weight_bytes + found.cache_bytes + found.overhead_bytes
    assert found.cache_bytes == cache_bytes(grouped(), 256, 4)


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(BudgetError, match=r"--context 4096 is longer than the 512 positions of x"):
        default_context(grouped(), 4096)
    assert default_context(grouped(), None) == 512
