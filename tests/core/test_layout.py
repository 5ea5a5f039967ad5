import pytest
from allocation.made_layouts import make_layout, parse_formats
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.plain_bytes import checkpoint_bytes, stored_bytes

from cptquant.core.formats import BFLOAT16, FLOAT16
from cptquant.core.layout import ModelLayout

LINEAR = parse_formats("int2-g16", "int3-channel", "int4-g32", "int8-tensor", "int4-tensor-asym", "float16")
EMBEDDING = parse_formats("int8-channel-plain", "int8-g16-plain", "float16")


@st.composite
def layouts(draw):
    shapes = st.tuples(st.integers(1, 20), st.sampled_from([16, 32, 48]))
    head = draw(st.booleans())
    return make_layout(
        draw(st.lists(st.lists(shapes, max_size=3), max_size=3)),
        embedding=draw(shapes) if head or draw(st.booleans()) else None,
        head=head,
        shared=head and draw(st.booleans()),
        kept=draw(st.integers(0, 9)),
    )


@settings(deadline=None, max_examples=150)
@given(layouts(), st.data())
def test_bytes_are_those_of_the_tensors(layout, data):
    formats = {
        site.name: data.draw(st.sampled_from(EMBEDDING if site.kind == "embedding" else LINEAR))
        for site in layout.sites
    }
    assert layout.plan_bytes(formats) == checkpoint_bytes(layout, formats)
    assert layout.block_site_bytes(formats) == sum(
        stored_bytes(formats[site.name], site.out_features, site.in_features)
        for site in layout.sites
        if site.block_index is not None
    )


@settings(deadline=None, max_examples=50)
@given(layouts())
def test_sites_that_are_not_named_stay_in_16_bits(layout):
    assert layout.plan_bytes({}) == layout.bytes_at_16_bit == 2 * layout.parameters
    assert layout.bytes_at_32_bit == 2 * layout.bytes_at_16_bit
    assert layout.block_site_bytes({}) == 2 * sum(site.weight_count for site in layout.block_sites)


def test_a_shared_head_is_stored_once_only_if_both_are_in_16_bits():
    layout = make_layout([], embedding=(100, 32), head=True, shared=True)
    plain, packed = parse_formats("int8-channel-plain", "int4-g32")
    once, embedding, head = 6400, 100 * 34, 100 * (16 + 2) + 16
    assert layout.shared_head_bytes(FLOAT16, FLOAT16) == once
    assert layout.shared_head_bytes(plain, FLOAT16) == embedding + 6400
    assert layout.shared_head_bytes(FLOAT16, packed) == 6400 + head
    assert layout.shared_head_bytes(plain, packed) == embedding + head
    with pytest.raises(ValueError, match="not shared"):
        make_layout([], embedding=(100, 32), head=True).shared_head_bytes(plain, packed)


def test_lookups_and_names():
    layout = make_layout([[(4, 16)], [(4, 16)]], embedding=(10, 16), kept=3)
    assert [site.name for site in layout.block_sites] == ["block.0.0", "block.1.0"]
    assert layout.site_by_name["block.1.0"].block_index == 1
    assert layout.site_by_name["embedding"].parameter_name == "embedding.weight"
    assert layout.site_by_name["embedding"].weight_count == 160
    assert layout.kept_bytes == 6
    assert layout.keep_format == FLOAT16
    assert layout.model_copy(update={"storage_dtype": "bfloat16"}).keep_format == BFLOAT16


def test_survives_its_file(tmp_path):
    layout = make_layout([[(4, 16)]] * 2, embedding=(10, 16), head=True, shared=True, ties=[["block.0.0"]], kept=3)
    layout.save(tmp_path / "layout.json")
    assert ModelLayout.load(tmp_path / "layout.json") == layout
    assert ModelLayout.load(tmp_path / "layout.json").digest() == layout.digest()
