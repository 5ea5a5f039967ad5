"""Each family, built from its config, saved and loaded through the real from_pretrained."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from cptquant.core.layout import ModelLayout
from cptquant.models.layout import entry_count
from cptquant.models.load import load_model, quiet_transformers, read_layout

LLAMA_BLOCK = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN_BLOCK = ["q", "k", "v", "o", "up", "down"]
FUSED_BLOCK = ["qkv", "o", "up", "down"]

# name -> (task, blocks path, roles in a block, (role, module) outside the blocks, ties a block, shared head?)
EXPECTED = {
    "opt": (
        "causal_lm", "model.decoder.layers", PLAIN_BLOCK,
        [("embedding", "model.decoder.embed_tokens"), ("head", "lm_head")], 1, True,
    ),
    "opt-350m": (
        "causal_lm", "model.decoder.layers", PLAIN_BLOCK,
        [
            ("embedding", "model.decoder.embed_tokens"), ("projection", "model.decoder.project_in"),
            ("projection", "model.decoder.project_out"), ("head", "lm_head"),
        ], 1, True,
    ),
    "bert-mlm": (
        "masked_lm", "bert.encoder.layer", PLAIN_BLOCK,
        [
            ("embedding", "bert.embeddings.word_embeddings"), ("projection", "cls.predictions.transform.dense"),
            ("head", "cls.predictions.decoder"),
        ], 1, True,
    ),
    "bert-classifier": (
        "sequence_classification", "bert.encoder.layer", PLAIN_BLOCK,
        [("embedding", "bert.embeddings.word_embeddings"), ("pooler", "bert.pooler.dense")], 1, False,
    ),
    "bert-encoder": (
        "encoder", "encoder.layer", PLAIN_BLOCK,
        [("embedding", "embeddings.word_embeddings"), ("pooler", "pooler.dense")], 1, False,
    ),
    "llama": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, True,
    ),
    "llama-untied": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, False,
    ),
    "mistral": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, False,
    ),
    "qwen2": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, False,
    ),
    "qwen3": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, False,
    ),
    "gpt2": (
        "causal_lm", "transformer.h", FUSED_BLOCK, [("embedding", "transformer.wte"), ("head", "lm_head")], 0, True,
    ),
    "gpt-neox": (
        "causal_lm", "gpt_neox.layers", FUSED_BLOCK, [("embedding", "gpt_neox.embed_in"), ("head", "lm_head")], 0,
        False,
    ),
    # discovered, without an entry in the table of families
    "phi": (
        "causal_lm", "model.layers", PLAIN_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 1, False,
    ),
    "stablelm": (
        "causal_lm", "model.layers", LLAMA_BLOCK, [("embedding", "model.embed_tokens"), ("head", "lm_head")], 2, False,
    ),
    "bloom": (
        "causal_lm", "transformer.h", FUSED_BLOCK,
        [("embedding", "transformer.word_embeddings"), ("head", "lm_head")], 0, True,
    ),
    "falcon": (
        "causal_lm", "transformer.h", FUSED_BLOCK,
        [("embedding", "transformer.word_embeddings"), ("head", "lm_head")], 0, True,
    ),
    "gptj": (
        "causal_lm", "transformer.h", PLAIN_BLOCK, [("embedding", "transformer.wte"), ("head", "lm_head")], 1, False,
    ),
    "phi3": (
        "causal_lm", "model.layers", ["qkv", "o", "gate_up", "down"],
        [("embedding", "model.embed_tokens"), ("head", "lm_head")], 0, False,
    ),
    "distilbert": (
        "masked_lm", "distilbert.transformer.layer", PLAIN_BLOCK,
        [
            ("embedding", "distilbert.embeddings.word_embeddings"), ("projection", "vocab_transform"),
            ("head", "vocab_projector"),
        ], 1, True,
    ),
    "roberta": (
        "sequence_classification", "roberta.encoder.layer", PLAIN_BLOCK,
        [("embedding", "roberta.embeddings.word_embeddings"), ("pooler", "classifier.dense")], 1, False,
    ),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", EXPECTED)
def test_layout_is_as_the_family_says(name, save_toy):
    layout = read_layout(str(save_toy(name)))
    task, blocks_path, roles, outside, ties, shared = EXPECTED[name]

    assert layout.task == task
    assert layout.block_count == 3
    for index in range(3):
        block = [site for site in layout.sites if site.block_index == index]
        assert sorted(site.role for site in block) == sorted(roles)
        assert all(site.name.startswith(f"{blocks_path}.{index}.") for site in block)
    assert [(site.role, site.name) for site in layout.sites if site.block_index is None] == outside
    assert len(layout.ties) == 3 * ties
    assert (layout.shared_head is not None) == shared
    assert layout.sites[0].kind == "embedding"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_every_entry_is_counted_once(name, dtype, save_toy, toy):
    folder = save_toy(name, dtype)
    layout = read_layout(str(folder))
    model = toy(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # torch lists shared ones once
    buffers = [buffer for key, buffer in model.state_dict().items() if key in dict(model.named_buffers())]

    assert layout.parameters == parameters
    assert entry_count(layout) == parameters + sum(buffer.numel() for buffer in buffers)
    itemsize = torch.finfo(dtype).bits // 8
    assert layout.source_bytes == parameters * itemsize + sum(b.numel() * b.element_size() for b in buffers)
    assert layout.source_bytes == _tensor_bytes_on_disk(folder)
    assert layout.kept_bytes == 2 * sum(math.prod(kept.shape) for kept in layout.kept)
    assert f"torch.{layout.source_dtype}" == str(dtype)
    assert layout.storage_dtype == ("bfloat16" if dtype == torch.bfloat16 else "float16")


def _tensor_bytes_on_disk(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(key).nbytes for key in opened.keys())
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_loaded_model_is_the_saved_one(name, dtype, save_toy):
    folder = save_toy(name, dtype)
    loaded = load_model(str(folder))
    with quiet_transformers():
        expected = getattr(transformers, loaded.layout.architecture).from_pretrained(folder, dtype=dtype).eval()

    assert type(loaded.module).__name__ == loaded.layout.architecture
    assert not loaded.module.training
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in loaded.module.parameters())
    state, wanted = loaded.module.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    for site in loaded.layout.sites:
        shape = loaded.module.get_submodule(site.name).weight.shape
        assert tuple(shape) == ((site.in_features, site.out_features) if site.transposed else
                                (site.out_features, site.in_features))  # fmt: skip
    assert loaded.module.get_submodule(loaded.blocks_path)[2] is not None


def test_only_conv1d_is_transposed(save_toy):
    layout = read_layout(str(save_toy("gpt2")))
    assert {site.transposed for site in layout.block_sites} == {True}
    assert not layout.site_by_name["lm_head"].transposed
    fused = layout.site_by_name["transformer.h.0.attn.c_attn"]
    assert (fused.out_features, fused.in_features) == (96, 32)


def test_sites_in_a_block_come_in_forward_order(save_toy):
    layout = read_layout(str(save_toy("opt")))  # the class registers k, v, q
    assert [site.role for site in layout.sites if site.block_index == 0] == PLAIN_BLOCK


def test_ties_name_the_matrices_an_engine_fuses(save_toy):
    layout = read_layout(str(save_toy("qwen3")))
    prefix = "model.layers.1"
    assert tuple(f"{prefix}.self_attn.{role}_proj" for role in "qkv") in [tie.sites for tie in layout.ties]
    assert (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj") in [tie.sites for tie in layout.ties]


def test_positions_and_token_types_are_kept_not_sites(save_toy):
    layout = read_layout(str(save_toy("bert-mlm")))
    kept = {tensor.name for tensor in layout.kept}
    assert {"bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"} <= kept


def test_small_classifier_is_kept_and_a_large_one_is_a_site(save_toy):
    assert "classifier.weight" in {tensor.name for tensor in read_layout(str(save_toy("bert-classifier"))).kept}
    layout = read_layout(str(save_toy("bert-classifier", num_labels=50)))
    assert layout.site_by_name["classifier"].role == "head"


def test_positions_a_model_can_take(save_toy):
    assert read_layout(str(save_toy("opt"))).max_positions == 64
    assert read_layout(str(save_toy("roberta", pad_token_id=1))).max_positions == 62  # numbered from padding_idx + 1
    assert read_layout(str(save_toy("bloom"))).max_positions in (None, 64)  # ALiBi has no limit of its own


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-untied"])
def test_sharded_checkpoint_reads_like_a_single_file(name, save_toy):
    whole = read_layout(str(save_toy(name)))
    single = load_model(str(save_toy(name)))
    for file in single.path.glob("*.safetensors"):
        file.unlink()
    folder = save_toy(name, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = load_model(str(folder))
    assert _without_digest(loaded.layout) == _without_digest(whole)
    state = single.module.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.module.state_dict().items())


def _without_digest(layout: ModelLayout) -> ModelLayout:
    return layout.model_copy(update={"source_digest": "", "inputs": {}})


def test_weights_beyond_float16_are_stored_as_bfloat16(tmp_path, toy):
    model = toy("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] = 70000.0
    model.save_pretrained(tmp_path / "large")
    assert read_layout(str(tmp_path / "large")).storage_dtype == "bfloat16"


def test_digest_follows_the_weights_and_the_config(save_toy):
    folder = save_toy("opt")
    before = read_layout(str(folder)).source_digest
    assert read_layout(str(folder)).source_digest == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.5}))
    changed = read_layout(str(folder)).source_digest
    assert changed != before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert read_layout(str(folder)).source_digest not in (before, changed)


def test_layout_survives_its_file(save_toy, tmp_path):
    layout = read_layout(str(save_toy("bert-mlm")))
    layout.save(tmp_path / "layout.json")
    assert ModelLayout.load(tmp_path / "layout.json") == layout


def test_encoder_saved_without_pooler_gets_no_random_one(tmp_path, toy):
    model = toy("bert-encoder")
    model.pooler = None
    model.save_pretrained(tmp_path / "bare")
    loaded = load_model(str(tmp_path / "bare"))
    assert loaded.module.pooler is None
    assert entry_count(loaded.layout) == loaded.layout.parameters
    assert "pooler" not in {site.role for site in loaded.layout.sites}


def test_tensors_a_class_is_known_not_to_use_are_no_fault(tmp_path, toy):
    model = toy("bert-mlm")
    state = {
        **model.state_dict(),
        "bert.pooler.dense.weight": torch.zeros(4, 4),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    model.save_pretrained(tmp_path / "pretrained", state_dict=state)
    assert load_model(str(tmp_path / "pretrained")).layout.task == "masked_lm"


@pytest.mark.parametrize("name", ["opt", "bert-classifier", "gpt2", "llama"])
def test_padding_changes_nothing_for_the_real_tokens(name, save_toy):
    loaded = load_model(str(save_toy(name)))
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], dim=1).long()
    with torch.no_grad():
        plain = loaded.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with_padding = loaded.module(input_ids=padded, attention_mask=mask).logits
    if plain.dim() == 3:
        with_padding = with_padding[:, :12]
    torch.testing.assert_close(with_padding, plain, rtol=1e-5, atol=1e-5)
