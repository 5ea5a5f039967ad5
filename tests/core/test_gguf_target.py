import pytest
from allocation.made_layouts import make_layout, parse_formats

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import BLOCK_LAYOUTS, NARROW_ROW_TYPE
from cptquant.core.layout import Site
from cptquant.core.targets import candidate_formats, find_target, list_refusals
from cptquant.core.targets.gguf_names import find_place

GGUF, TRANSFORMERS = find_target("gguf"), find_target("transformers")
ALL = parse_formats(*BLOCK_LAYOUTS)
LAYOUT = make_layout([[(64, 256), (64, 96)]] * 2, embedding=(128, 256), head=True, shared=True)


def site(columns, role="up"):
    return Site(name="s", out_features=8, in_features=columns, block_index=0, role=role)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_names_and_bytes(fmt):
    layout = fmt.block_layout
    assert QuantFormat.parse(fmt.name) == QuantFormat.parse(fmt.name.lower()) == fmt
    assert fmt.stored_bytes(3, 512) == 3 * 512 // layout.block_columns * layout.block_bytes
    with pytest.raises(ValueError, match=f"{fmt.name} has blocks of {layout.block_columns} columns, the row has 100"):
        fmt.stored_bytes(3, 100)


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("columns", [256, 96, 100])
def test_candidates_are_legal_and_no_narrower_than_asked(fmt, columns):
    found = candidate_formats(site(columns), LAYOUT, GGUF, [fmt])
    assert all(GGUF.refusal(site(columns), candidate) is None for candidate in found)
    assert found[-1] == LAYOUT.keep_format
    if columns == 256:
        assert found[0] == fmt
    elif columns == 96:
        assert found[0].name == NARROW_ROW_TYPE.get(fmt.block, fmt.block)
        assert found[0].code_bits >= min(fmt.code_bits, 5)
    else:
        assert len(found) == 1  # no block type has rows of 100


def test_refusals_name_the_rule_and_the_nearest_format():
    assert GGUF.refusal(site(96), ALL[0]) == "Q2_K has blocks of 256 weights along a row, and the row has 96"
    assert GGUF.refusal(site(256), QuantFormat.parse("int4-g64")).startswith(
        "int4-g64 is no format of GGUF; it has Q2_K"
    )
    assert GGUF.refusal(site(256, "pooler"), ALL[0]).startswith("llama.cpp computes embeddings without the pooler")
    assert "block format of GGUF" in TRANSFORMERS.refusal(site(256), ALL[0])


def test_a_plan_moved_to_another_target_lists_what_is_illegal_and_the_nearest_legal_format():
    held = parse_formats("Q4_K", "int4-g64", "Q3_K", "Q2_K", "Q8_0", "Q6_K")
    formats = dict(zip((s.name for s in LAYOUT.sites), held, strict=True))
    lines = list_refusals(LAYOUT.model_copy(update={"model_type": "llama"}), GGUF, formats)
    assert [line.rpartition("nearest legal format: ")[2] for line in lines[:2]] == ["Q4_K", "Q4_0"]
    assert lines[-1] == (
        "embedding, head have Q4_K, Q6_K, but must share one format: embedding and head are one tensor in this file"
    )
    there = list_refusals(LAYOUT, TRANSFORMERS, dict.fromkeys((s.name for s in LAYOUT.block_sites), ALL[2]))
    assert len(there) == 4 and there[0].endswith("nearest legal format: int4-g64")


def test_an_embedding_that_is_the_head_is_counted_once():
    layout = LAYOUT.model_copy(update={"model_type": "llama"})
    budget = Budget(GGUF.plan_bytes(layout, {}) // 3, "bytes")
    plan = allocate(layout, None, budget, GGUF, find_allocator("uniform"), formats=ALL)
    assert plan.formats["embedding"] == plan.formats["head"]
    assert plan.size_bytes == GGUF.plan_bytes(layout, plan.quant_formats) <= budget.value
    blocks = sum(plan.quant_formats[s.name].stored_bytes(s.out_features, s.in_features) for s in layout.block_sites)
    once = plan.quant_formats["head"].stored_bytes(128, 256)
    assert plan.size_bytes == blocks + once + GGUF.kept_bytes(layout)


def test_only_formats_of_the_target_can_be_asked_for():
    layout = LAYOUT.model_copy(update={"model_type": "llama"})
    with pytest.raises(FormatError, match=r"--formats Q4_K is refused by --target transformers"):
        allocate(
            make_layout([[(8, 100)]]), None, Budget(10**6, "bytes"), _Refusing(), find_allocator("uniform"),
            formats=parse_formats("Q4_K"),
        )  # fmt: skip
    assert layout.model_type == "llama"


class _Refusing(type(TRANSFORMERS)):
    """transformers without the translation of other engines' formats."""

    def __init__(self) -> None:
        super().__init__(**{name: getattr(TRANSFORMERS, name) for name in TRANSFORMERS.__dataclass_fields__})

    def fit(self, site, fmt):
        return fmt


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("llama", "model.layers.11.self_attn.q_proj.weight", "blk.11.attn_q.weight"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias", "blk.0.ffn_up.bias"),
        ("bert", "encoder.layer.3.output.LayerNorm.bias", "blk.3.layer_output_norm.bias"),
        ("bert", "bert.embeddings.LayerNorm.weight", "token_embd_norm.weight"),
        ("opt", "model.decoder.layers.2.self_attn.v_proj.bias", "blk.2.attn_qkv.bias"),
        ("gpt_neox", "embed_out.weight", "output.weight"),
    ],
)
def test_names_in_the_file(kind, name, tensor):
    assert find_place(kind, name).tensor == tensor
    assert find_place(kind, name.replace("layer", "liar").replace("h.0", "z").replace("embed", "mbed")) is None
