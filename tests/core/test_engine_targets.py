"""Rules of --target onnx and --target vllm."""

import pytest
from allocation.made_layouts import make_layout, parse_formats

from cptquant.core.layout import ModelLayout, Site
from cptquant.core.targets import TARGETS, candidate_formats, list_refusals

ONNX, VLLM = TARGETS["onnx"], TARGETS["vllm"]
SITE = Site(name="block.0.q", out_features=8, in_features=96, block_index=0)
EMBEDDING = Site(name="embedding", out_features=20, in_features=96, kind="embedding", role="embedding")


def named(model_type: str, task: str = "causal_lm") -> ModelLayout:
    layout = make_layout([[(8, 64)]] * 2, ties=[["block.0.0", "block.1.0"]])
    return layout.model_copy(update={"model_type": model_type, "task": task})


@pytest.mark.parametrize(
    ("asked", "fitted"),
    [
        ("int3-g64", "int4-g32"),  # 96 = 3 × 32
        ("int8-g128", "int8-g32"),
        ("int5-channel", "int8-channel"),
        ("int2-g48", "int2-g48"),
        ("int4-g8", "int4-g16"),
        ("Q4_K", "int4-g32"),
        ("float16", "float16"),
    ],
)
def test_onnx_fits_to_what_has_a_kernel(asked, fitted):
    found = ONNX.fit(SITE, parse_formats(asked)[0])
    assert found.name == fitted
    assert ONNX.refusal(SITE, found) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int3-g32", "ONNX Runtime has kernels for 2, 4 and 8 bits, not 3"),
        ("int4-g64", "groups of 64 columns do not divide the row of 96"),
        ("int4-g8", "ONNX Runtime needs 16 columns or a multiple to share a scale, here 8 do"),
        ("Q4_0", "Q4_0 is a block format of GGUF, which ONNX Runtime does not have"),
    ],
)
def test_onnx_refusals_give_their_reason(name, reason):
    assert ONNX.refusal(SITE, parse_formats(name)[0]) == reason


def test_onnx_bytes_are_codes_scales_and_zero_points():
    layout = named("opt")
    assert ONNX.site_bytes(layout, SITE, parse_formats("int4-g32")[0]) == 8 * 48 + 2 * 8 * 3
    assert ONNX.site_bytes(layout, SITE, parse_formats("int2-g32-asym")[0]) == 8 * 24 + 2 * 8 * 3 + 8 * 1
    assert ONNX.site_bytes(layout, SITE, parse_formats("int8-tensor")[0]) == 8 * 96 + 2
    assert ONNX.site_bytes(layout, SITE, parse_formats("float16")[0]) == 2 * 8 * 96


def test_onnx_names_the_models_it_writes():
    assert ONNX.refuse_model(named("qwen3")) is None
    assert ONNX.refuse_model(named("bert", "encoder")) is None
    assert "supported for text (…ForCausalLM), not for encoder" in (ONNX.refuse_model(named("llama", "encoder")) or "")
    refusal = ONNX.refuse_model(named("bloom")) or ""
    assert (
        refusal.startswith("--target onnx:") and "(model_type bloom) is not supported; supported: opt, llama" in refusal
    )


def test_vllm_keeps_to_its_kernels():
    site = Site(name="block.0.q", out_features=8, in_features=192, block_index=0)
    names = "int4-g128", "int4-g64", "int8-channel", "int3-g32", "int4-g64-asym", "int4-g16"
    assert [fmt.name for fmt in candidate_formats(site, named("llama"), VLLM, parse_formats(*names))] == [
        "int4-g64", "int8-channel", "int3-g32", "int4-g32", "float16",
    ]  # fmt: skip
    assert VLLM.refusal(site, parse_formats("int4-g96")[0]) == (
        "vLLM's kernels take groups of 128, 64, 32 columns or one scale a row"
    )
    assert VLLM.refusal(site, parse_formats("int4-g64-asym")[0]) == (
        "cptquant writes symmetric formats for vLLM: its loader takes zero points in 4 and 8 bits only"
    )
    assert VLLM.refusal(EMBEDDING, parse_formats("int8-channel-plain")[0]) == "vLLM keeps embedding and head in 16 bits"


def test_vllm_wants_one_scheme_where_it_fuses():
    formats = dict(zip(("block.0.0", "block.1.0"), parse_formats("int4-g64", "int8-g64"), strict=True))
    lines = list_refusals(named("llama"), VLLM, formats)
    assert len(lines) == 1 and "block.0.0, block.1.0 have int4-g64, int8-g64, but must share one format" in lines[0]
    assert "is not supported; supported are text models" in list_refusals(named("gpt2"), VLLM, formats)[0]


def test_encoders_are_offered_what_onnx_runtime_runs_fast():
    assert ONNX.formats_for(named("bert", "encoder")) == ("int2-g64", "int4-g64", "int8-channel")
    assert ONNX.formats_for(named("bert", "sequence_classification")) == ("int2-g64", "int4-g64", "int8-channel")
    narrow, wide = (named("opt").model_copy(update={"hidden_size": size}) for size in (128, 4096))
    assert ONNX.formats_for(narrow) == (
        *ONNX.default_formats, "int2-g64-r1", "int2-g64-r2", "int4-g64-r1", "int4-g64-r2"
    )  # fmt: skip
    assert ONNX.formats_for(wide)[len(ONNX.default_formats) :] == tuple(
        f"int{bits}-g64-r{rank}" for bits in (2, 4) for rank in (8, 16, 32, 64)
    )
    assert VLLM.formats_for(named("bert", "encoder")) == VLLM.default_formats
