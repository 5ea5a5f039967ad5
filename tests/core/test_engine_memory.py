"""Memory as a budget: the parts of the prediction by hand."""

import pytest

from cptquant.core.budget import Budget
from cptquant.core.engine_export import MemoryUse
from cptquant.core.engine_memory import (
    ENGINE_MEMORY,
    cache_bytes,
    find_context,
    fit_budget,
    held_bytes_per_token,
    memory_budget,
    predict_memory,
)
from cptquant.core.errors import BudgetError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.settings import RunSettings
from cptquant.core.targets import find_target


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


def test_weights_are_counted_as_the_engine_holds_them():
    layout, int4, engine = grouped(), QuantFormat.parse("int4-g64"), ENGINE_MEMORY["onnx"]
    formats = {site.name: int4 for site in layout.block_sites}
    codes = sum(site.weight_count // 2 + 2 * site.weight_count // 64 for site in layout.block_sites)
    embedding, head = 2 * 100 * 64, 2 * 100 * 64
    wanted = engine.quantized_factor * codes + engine.embedding_factor * embedding + engine.float_factor * head
    assert predict_memory(layout, "onnx", formats, 16).weight_bytes == round(wanted)


def test_a_shared_head_is_one_matrix():
    shared = grouped().model_copy(update={"shared_head": ("embedding", "head")})
    q8 = {name: QuantFormat.parse("Q8_0") for name in ("embedding", "head")}
    apart = predict_memory(grouped(), "gguf", q8, 16).weight_bytes
    assert apart - predict_memory(shared, "gguf", q8, 16).weight_bytes == 100 * 64 // 32 * 34


@pytest.mark.parametrize("context", [0, 1, -3, 513, 99_999])
def test_a_context_outside_the_model_is_refused(context):
    with pytest.raises(
        BudgetError, match=rf"^--context {context} is outside the model's range of 2 to 512 tokens \(x\)$"
    ):
        find_context(grouped(), context)


def test_the_context_of_a_model_that_says_none():
    unknown = grouped().model_copy(update={"max_positions": None})
    long = grouped().model_copy(update={"max_positions": 32_768})
    assert (find_context(grouped(), None), find_context(unknown, None), find_context(long, None)) == (512, 2048, 4096)
    assert find_context(long, 20_000) == 20_000
    with pytest.raises(BudgetError, match=r"--context 0 is outside the model's range of 2 tokens or more \(x\)$"):
        find_context(unknown, 0)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_memory_becomes_the_bytes_of_weights_that_the_prediction_allows(target):
    """A plan of exactly the budget's bytes is predicted to take exactly the memory that was given."""
    layout = grouped()
    name = {"gguf": "Q8_0", "onnx": "int4-g64"}[target]
    formats = {site.name: QuantFormat.parse(name) for site in layout.sites if site.kind == "linear"}
    limit = predict_memory(layout, target, formats, 100).predicted_bytes
    budget = memory_budget(layout, f"{limit}B", 100, target)
    size = find_target(target).plan_bytes(layout, formats)
    unlike = {site.name for site in layout.sites if site.name not in formats}
    slack = sum(2 * layout.site_by_name[name].weight_count for name in unlike)
    assert abs(budget.limit_bytes(layout) - size) <= slack
    assert budget.scope == "file" and budget.flag == "--memory"
    assert budget.text.startswith(
        f"{limit}B (less {cache_bytes(layout, 100, ENGINE_MEMORY[target].cache_entry_bytes):,}"
    )


@pytest.mark.parametrize("name", ["int8-g64", "bfloat16"])
def test_a_plan_that_takes_too_much_gets_a_budget_that_fits(name):
    """The same plan scaled to the smaller budget's bytes takes at most the limit, also where loading is the peak."""
    layout = grouped()
    chosen = {site.name: name if site.kind == "linear" else "bfloat16" for site in layout.sites}
    plan = Plan(
        target="onnx", allocator="x", budget="x", budget_scope="file", limit_bytes=1, formats=chosen,
        size_bytes=100_000, site_bytes=1, bits_per_weight=1, bits_per_weight_sites=1, status=SolverStatus.HEURISTIC,
    )  # fmt: skip
    use = predict_memory(layout, "onnx", plan.quant_formats, 2)
    budget = Budget(100_000, "bytes", "file", "5kB", flag="--memory")
    assert fit_budget(layout, budget, plan, 2, use.predicted_bytes) is None
    beside = use.base_bytes + use.cache_bytes
    limit = beside + (use.predicted_bytes - beside) * 3 // 4
    smaller = fit_budget(layout, budget, plan, 2, limit)
    assert smaller is not None and smaller.flag == "--memory" and smaller.text == "5kB"
    assert 0.6 < smaller.value / plan.size_bytes <= 0.75


def test_loading_is_the_peak_where_matrices_in_16_bits_outweigh_the_cache():
    engine = ENGINE_MEMORY["onnx"]
    small = predict_memory(grouped(), "onnx", {}, 1)
    linear = sum(2 * site.weight_count for site in grouped().sites if site.kind == "linear")
    excess = (engine.loading_factor - engine.float_factor) * linear
    assert abs(small.overhead_bytes + small.cache_bytes - excess) < 2
    assert small.overhead_bytes < predict_memory(grouped(), "onnx", {}, 512).overhead_bytes


def test_the_measured_peak_is_held_against_the_limit():
    parts = {"context": 8, "base_bytes": 1, "weight_bytes": 1, "cache_bytes": 1, "overhead_bytes": 1}
    use = MemoryUse(predicted_bytes=4, limit_bytes=10, **parts)
    assert use.excess_bytes == 0 and use.model_copy(update={"measured_bytes": 10}).excess_bytes == 0
    assert use.model_copy(update={"measured_bytes": 13}).excess_bytes == 3


@pytest.mark.parametrize(
    ("memory", "context", "target", "message"),
    [
        ("1MB", 16, "gguf", "--memory 1MB leaves nothing for the weights: "),
        ("4bpw", 16, "gguf", "--memory '4bpw' is no size; write it as 2GB, 512MB or 1.5GiB"),
        ("garbage", 16, "gguf", "--memory 'garbage' is not readable; write it as 2GB, 512MB or 1.5GiB"),
        ("2GB", 513, "gguf", "--context 513 is outside the model's range of 2 to 512 tokens (x)"),
        ("2GB", 16, "vllm", "--memory 2GB needs a target whose engine's memory is known: gguf, onnx; under --target v"),
    ],
)
def test_bad_limits(memory, context, target, message):
    with pytest.raises(BudgetError) as caught:
        memory_budget(grouped(), memory, context, target)
    assert str(caught.value).startswith(message)


def test_budget_and_memory_exclude_each_other():
    both = RunSettings(model="m", budget="4bpw", memory="2GB")
    with pytest.raises(UserError, match="--budget and --memory were both given"):
        both.budget_for(grouped())
    assert RunSettings(model="m", budget="4bpw").budget_for(grouped()).text == "4bpw"
