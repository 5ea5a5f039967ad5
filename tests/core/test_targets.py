import pytest
from allocation.made_layouts import FUSED, TRANSFORMERS, make_layout, parse_formats
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.core.targets import TARGETS, candidate_formats, find_target

LINEAR = Site(name="block.0.q", out_features=8, in_features=96, block_index=0)
EMBEDDING = Site(name="embedding", out_features=20, in_features=96, kind="embedding", role="embedding")
LAYOUT = make_layout([[(8, 64)]] * 2, ties=[["block.0.0", "block.1.0"]])


def reason(site, name):
    return TRANSFORMERS.refusal(site, parse_formats(name)[0])


@pytest.mark.parametrize(
    "name", ["int4-g32", "int2-channel", "int8-tensor", "int4-tensor-asym", "float16", "bfloat16", "int3-g96"]
)
def test_linear_sites_hold(name):
    assert reason(LINEAR, name) is None


@pytest.mark.parametrize("name", ["int8-channel-plain", "int8-g32-plain", "int8-tensor-plain", "float16"])
def test_embeddings_hold(name):
    assert reason(EMBEDDING, name) is None


def test_refusals_give_their_reason():
    assert reason(LINEAR, "int4-g64") == (
        "compressed-tensors needs the group size to divide the row: 96 columns, groups of 64"
    )
    assert reason(EMBEDDING, "int8-g64-plain") == reason(LINEAR, "int4-g64")
    asymmetric = (
        "compressed-tensors 0.20 writes packed zero points that transformers 5.23 cannot load (the meta-device layout "
        "leaves them unpacked); use the symmetric format, or one zero point per tensor"
    )
    assert reason(LINEAR, "int4-g32-asym") == reason(LINEAR, "int4-channel-asym") == asymmetric
    assert reason(LINEAR, "int8-channel-plain") == (
        "plain storage is for embeddings and GPT-2's output projections; other linear layers are packed"
    )
    packed = (
        "transformers 5.23 cannot load an embedding (or an output projection of GPT-2) packed by "
        "compressed-tensors 0.20: its initializer reads a `weight` that packing removed; these are held in 8 "
        "bits plain (int8-channel-plain) or 16"
    )
    assert reason(EMBEDDING, "int8-channel") == reason(EMBEDDING, "int4-channel") == packed
    assert reason(EMBEDDING, "int8-channel-asym-plain") == packed


def test_candidates_are_fitted_to_the_site():
    formats = parse_formats("int4-g64", "int4-g32", "int8-g64", "int4-channel-asym", "int2-channel")
    assert [fmt.name for fmt in candidate_formats(LINEAR, LAYOUT, TRANSFORMERS, formats)] == [
        "int4-g32", "int8-g32", "int2-channel", "float16",
    ]  # fmt: skip
    assert [fmt.name for fmt in candidate_formats(EMBEDDING, LAYOUT, TRANSFORMERS, formats)] == [
        "int8-g32-plain", "float16",
    ]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 300), st.integers(1, 200), st.sampled_from(["linear", "embedding"]), st.integers(2, 8))
def test_candidates_are_always_legal_and_end_in_16_bits(columns, group, kind, bits):
    site = Site(name="s", out_features=3, in_features=columns, kind=kind)
    (asked,) = parse_formats(f"int{bits}-g{group}")
    found = candidate_formats(site, LAYOUT, TRANSFORMERS, [asked])
    assert all(TRANSFORMERS.refusal(site, fmt) is None for fmt in found)
    assert found[-1] == LAYOUT.keep_format
    if kind == "linear":
        assert found[0].code_bits == bits  # the width that was asked for is never lost
        granularity = found[0].granularity
        assert granularity == "channel" or (columns % granularity == 0 and granularity <= group)
        assert granularity == group or columns % group


def test_only_engines_that_fuse_have_ties():
    assert TRANSFORMERS.ties(LAYOUT) == ()
    assert [tie.sites for tie in FUSED.ties(LAYOUT)] == [("block.0.0", "block.1.0")]


def test_an_unknown_target_is_refused_with_the_known_ones():
    assert find_target("transformers") is TARGETS["transformers"]
    with pytest.raises(FormatError) as caught:
        find_target("tensorrt")
    assert (
        str(caught.value)
        == "--target 'tensorrt' is unknown; choose one of: transformers, transformers-fused, gguf, onnx, vllm, torch"
    )


@pytest.mark.parametrize(
    ("target", "asked", "held"),
    [
        ("transformers", "slim2-g64", "int3-g64"),
        ("vllm", "slim3-g64", "int4-g64"),
        ("gguf", "slim2-g64", "Q3_K"),
        ("gguf", "slim3-g64", "Q4_K"),
        ("gguf", "slim7-g64", "Q8_0"),
        ("onnx", "slim2-g64", "int4-g64"),
        ("onnx", "slim3-g64", "int4-g64"),
        ("onnx", "slim2-g64-halves", "int4-g64"),
        ("vllm", "slim3-g64-halves", "int4-g64"),
        ("torch", "slim2-g64", "slim2-g64"),
        ("torch", "slim2-g96", "int3-channel"),  # neither 96 nor 48 columns divide the row
        ("transformers", "int3-g64-c2", "int4-g64"),
        ("vllm", "int3-g64-c2", "int4-g64"),
        ("gguf", "int3-g64-c2", "Q4_K"),
        ("gguf", "int2-g64-asym-c2", "Q3_K"),
        ("onnx", "int3-g64-c2", "int4-g64"),
        ("torch", "int3-g64-c2", "int3-g64-c2"),
        ("torch", "int3-g96-c2", "int3-channel-c2"),
    ],
)
def test_what_an_engine_cannot_hold_becomes_one_width_that_is_no_worse(target, asked, held):
    site = Site(name="block.0.q", out_features=8, in_features=256, block_index=0)
    fitted = TARGETS[target].fit(site, QuantFormat.parse(asked))
    assert fitted.name == held and TARGETS[target].refusal(site, fitted) is None
    if target != "torch":
        assert TARGETS[target].refusal(site, QuantFormat.parse(asked)) is not None


@pytest.mark.parametrize(("name", "numbers"), [("slim3-g64-halves", 4), ("slim3-g32-sorted-halves", 256)])
def test_onnx_prices_two_widths_in_a_matrix(name, numbers):
    onnx, fmt = TARGETS["onnx"], QuantFormat.parse(name)
    site = Site(name="block.0.q", out_features=8, in_features=256, block_index=0)
    assert onnx.refusal(site, fmt) is None and onnx.fit(site, fmt) == fmt
    scales = 2 * 8 * 256 // fmt.granularity
    assert onnx.site_bytes(make_layout([[(8, 256)]]), site, fmt) == 8 * 256 * 3 // 8 + scales + 2 * numbers
    odd = Site(name="block.0.q", out_features=8, in_features=64 * 3, block_index=0)
    if fmt.granularity == 64:
        assert onnx.refusal(odd, fmt) == f"{name} needs an even number of groups: a row of 192 has 3"
    assert onnx.refusal(site, QuantFormat.parse("slim3-g64")) == (
        "slim3-g64 has widths that ONNX Runtime has no product for; write slim3-g64-halves (half of the groups in "
        "2 bits, half in 4) or use --target torch"
    )
    embedding = Site(name="embedding", out_features=20, in_features=256, kind="embedding", role="embedding")
    assert onnx.refusal(embedding, fmt) == f"{name} is for linear layers inside the blocks here"


@pytest.mark.parametrize(
    ("asked", "held", "correction_bytes", "said"),
    [
        ("int2-g64-c2", None, 5 * (8 + 2 + 2), "corrects columns in 8 bits"),
        ("int4-g96-asym-c5", "int4-g64-asym-c5", 13 * (8 + 2 + 2), "corrects columns in 8 bits"),
        ("int2-g64-r3", None, 3 * (8 + 256 + 2), "adds a product of low rank"),
        ("int4-g96-asym-r7", "int4-g64-asym-r7", 7 * (8 + 256 + 2), "adds a product of low rank"),
    ],
)
def test_onnx_prices_corrections(asked, held, correction_bytes, said):
    onnx, fmt = TARGETS["onnx"], QuantFormat.parse(asked)
    site = Site(name="block.0.q", out_features=8, in_features=256, block_index=0)
    fitted = onnx.fit(site, fmt)
    assert fitted.name == (held or asked) and onnx.refusal(site, fitted) is None
    layout = make_layout([[(8, 256)]])
    expected = onnx.site_bytes(layout, site, fitted.base) + correction_bytes
    assert onnx.site_bytes(layout, site, fitted) == expected
    embedding = Site(name="embedding", out_features=20, in_features=256, kind="embedding", role="embedding")
    reason = f"{fitted.name} is for linear layers: their inputs say what is corrected"
    assert onnx.refusal(embedding, fitted) == TARGETS["torch"].refusal(embedding, fitted) == reason
    assert onnx.refusal(site, QuantFormat.parse("int3-g64-c2")) == "ONNX Runtime has kernels for 2, 4 and 8 bits, not 3"
    assert TARGETS["transformers"].refusal(site, fitted) == (
        f"{fitted.name} {said}, which compressed-tensors cannot; --target torch can"
    )


def test_a_rank_as_large_as_the_matrix_becomes_one_more_bit():
    site = Site(name="block.0.q", out_features=8, in_features=256, block_index=0)
    fmt = QuantFormat.parse("int3-g64-r8")
    reason = "int3-g64-r8 has a rank that a 8 x 256 matrix itself cannot exceed"
    assert TARGETS["torch"].refusal(site, fmt) == reason and TARGETS["torch"].fit(site, fmt).name == "int4-g64"
    with pytest.raises(ValueError, match=reason):
        fmt.stored_bytes(8, 256)


def test_torch_refuses_what_it_cannot_run():
    torch, slim = TARGETS["torch"], QuantFormat.parse("slim2-g64")
    turned = Site(name="c_fc", out_features=8, in_features=256, block_index=0, transposed=True)
    assert torch.refusal(turned, slim) == "layers stored as (in, out), GPT-2's Conv1D, are not supported here"
    embedding = Site(name="embedding", out_features=20, in_features=256, kind="embedding", role="embedding")
    assert torch.refusal(embedding, slim) == "slim2-g64 is for linear layers: SliM-LLM needs their inputs"
