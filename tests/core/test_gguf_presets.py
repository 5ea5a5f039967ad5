"""llama.cpp's presets: published file sizes, and the rules where a size would not show a mistake."""

import pytest

from cptquant.core.layout import KeptTensor, ModelLayout, Site
from cptquant.core.targets import find_target, list_refusals
from cptquant.core.targets.gguf_presets import PRESETS, preset_formats

GGUF = find_target("gguf")


def llama(blocks: int, width: int, inner: int, *, key_width: int | None = None, vocabulary: int = 32000, tied=False):
    sites = [Site(name="model.embed_tokens", out_features=vocabulary, in_features=width, role="embedding",
                  kind="embedding")]  # fmt: skip
    shapes = {
        "self_attn.q_proj": ("q", width, width), "self_attn.k_proj": ("k", key_width or width, width),
        "self_attn.v_proj": ("v", key_width or width, width), "self_attn.o_proj": ("o", width, width),
        "mlp.gate_proj": ("gate", inner, width), "mlp.up_proj": ("up", inner, width),
        "mlp.down_proj": ("down", width, inner),
    }  # fmt: skip
    for index in range(blocks):
        sites += [
            Site(name=f"model.layers.{index}.{path}", out_features=rows, in_features=columns, block_index=index,
                 role=role)
            for path, (role, rows, columns) in shapes.items()
        ]  # fmt: skip
    sites.append(Site(name="lm_head", out_features=vocabulary, in_features=width, role="head"))
    kept = [KeptTensor(name="model.norm.weight", shape=(width,), stored_bytes=2 * width)]
    for index in range(blocks):
        kept += [
            KeptTensor(name=f"model.layers.{index}.{norm}.weight", shape=(width,), stored_bytes=2 * width)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
    parameters = sum(site.weight_count for site in sites[: -1 if tied else None]) + sum(k.shape[0] for k in kept)
    return ModelLayout(
        architecture="LlamaForCausalLM", model_type="llama", task="causal_lm", source="made", source_digest="0",
        source_dtype="float16", storage_dtype="float16", source_bytes=2 * parameters, parameters=parameters,
        block_count=blocks, hidden_size=width, max_positions=4096, vocabulary_size=vocabulary, sites=tuple(sites),
        shared_head=("model.embed_tokens", "lm_head") if tied else None, kept=tuple(kept),
    )  # fmt: skip


LLAMA_2 = {"7B": llama(32, 4096, 11008), "13B": llama(40, 5120, 13824)}
PUBLISHED = {
    ("7B", "Q3_K_M"): 3.30, ("7B", "Q4_K_M"): 4.08, ("7B", "Q5_K_M"): 4.78,
    ("13B", "Q3_K_M"): 6.34, ("13B", "Q4_K_M"): 7.87, ("13B", "Q5_K_M"): 9.23,
}  # fmt: skip
"""File sizes in GB of Llama 2 as published for llama.cpp (TheBloke/Llama-2-7B-GGUF, Llama-2-13B-GGUF, 2023-09)."""


@pytest.mark.parametrize(("size", "preset"), PUBLISHED)
def test_sizes_are_the_published_ones(size, preset):
    layout = LLAMA_2[size]
    tensor_bytes = GGUF.plan_bytes(layout, preset_formats(layout, preset))
    assert tensor_bytes / 1e9 == pytest.approx(PUBLISHED[size, preset], abs=0.0051)  # the header has under a megabyte


def names(layout, preset, ending):
    found = preset_formats(layout, preset)
    return [found[site.name].name for site in layout.sites if site.name.endswith(ending)]


def test_rules_by_block():
    layout = llama(16, 256, 512)
    assert names(layout, "Q4_K_M", "down_proj") == [
        "Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K",
        "Q6_K", "Q6_K",
    ]  # fmt: skip
    assert names(layout, "Q4_K_M", "v_proj") == names(layout, "Q4_K_M", "down_proj")
    assert names(layout, "Q3_K_M", "v_proj") == ["Q5_K", "Q5_K", *["Q4_K"] * 14]
    assert names(layout, "Q3_K_M", "down_proj") == ["Q5_K", *["Q4_K"] * 15]
    assert set(names(layout, "Q2_K", "v_proj") + names(layout, "Q2_K", "o_proj")) == {"Q3_K"}
    assert set(names(llama(4, 256, 512, key_width=64), "Q2_K", "v_proj")) == {"Q4_K"}
    assert set(names(llama(80, 256, 512), "Q3_K_M", "v_proj")) == {"Q5_K"}
    assert names(layout, "Q2_K", "embed_tokens") == ["Q2_K"] and names(layout, "Q2_K", "lm_head") == ["Q6_K"]
    tied = llama(4, 256, 512, tied=True)
    assert names(tied, "Q2_K", "embed_tokens") == names(tied, "Q2_K", "lm_head") == ["Q6_K"]


def test_rows_that_k_types_do_not_divide():
    layout = llama(8, 256, 352)
    assert set(names(layout, "Q2_K", "down_proj")) == {"Q4_0"}
    assert set(names(layout, "Q4_K_M", "down_proj")) == {"Q5_0", "Q8_0"}
    assert set(names(layout, "Q5_K_M", "down_proj")) == {"Q5_1", "Q8_0"}
    narrow = llama(2, 96, 96)
    assert set(names(narrow, "Q4_K_M", "lm_head")) == {"Q8_0"} and set(names(narrow, "Q4_K_M", "q_proj")) == {"Q5_0"}
    odd = llama(2, 80, 80)
    assert {fmt.name for fmt in preset_formats(odd, "Q2_K").values()} == {"float16"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layout", [LLAMA_2["7B"], llama(4, 256, 352, tied=True)], ids=["7B", "tied"])
def test_a_preset_is_legal_under_the_target(layout, preset):
    assert list_refusals(layout, GGUF, preset_formats(layout, preset)) == []


def test_presets_stand_from_small_to_large():
    sizes = [GGUF.plan_bytes(LLAMA_2["7B"], preset_formats(LLAMA_2["7B"], preset)) for preset in PRESETS]
    assert sizes == sorted(sizes)
    with pytest.raises(KeyError):
        preset_formats(LLAMA_2["7B"], "Q9_K")
