import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_toys import GGUF, TOYS, quantize_toy, save_toy

from cptquant.core.errors import ArtifactError, CptquantError, ModelError, OutputError
from cptquant.core.layout import ModelLayout
from cptquant.core.targets import list_refusals
from cptquant.exporters.export import find_exporter
from cptquant.exporters.gguf.read_back import GgufWeights, open_gguf
from cptquant.exporters.gguf.tensors import list_tensors
from cptquant.exporters.gguf.write import check_file, check_gguf_exportable, write_gguf
from cptquant.models.load import load_model, read_layout
from cptquant.stages.engine_check import Written, read_back


@pytest.mark.parametrize("name", TOYS)
def test_every_family_is_written_and_read_back_exactly(name, quantized, tmp_path):
    toy = quantized(name)
    assert list_refusals(toy.model.layout, GGUF, toy.plan.quant_formats) == []
    written = write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.gguf"
    tensors = gguf.GGUFReader(path).tensors
    assert written.tensor_bytes == toy.plan.size_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert written.tensor_bytes + written.header_bytes == path.stat().st_size
    records = read_back(Written(toy.model, toy.plan, toy.shards, path))
    quantized_sites = {site for site, fmt in toy.plan.quant_formats.items() if not fmt.is_float}
    assert {record.site for record in records} == quantized_sites - {"pooler.dense"}
    assert all(record.largest_error == 0 for record in records)
    left_out = {"pooler.dense"} if name == "bert" else set()
    found = dict(find_exporter("gguf").read_back(path.parent, toy.model, toy.plan))
    assert set(found) == {site.name for site in toy.model.layout.sites} - left_out
    assert not (tmp_path / "checkpoint.partial").exists()


def test_norms_and_biases_are_float32_and_carry_the_originals_values(quantized, tmp_path):
    toy = quantized("gpt2")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "checkpoint" / "model.gguf").tensors}
    state = toy.model.module.state_dict()
    for ours, theirs in (("transformer.ln_f.bias", "output_norm.bias"),
                         ("transformer.h.1.attn.c_attn.bias", "blk.1.attn_qkv.bias")):  # fmt: skip
        assert tensors[theirs].tensor_type.name == "F32"
        assert np.array_equal(tensors[theirs].data, state[ours].float().numpy())
    assert tensors["position_embd.weight"].tensor_type.name == "F16"


def test_opt_carries_the_residual_stream_scaled(quantized, tmp_path):
    toy = quantized("opt")
    tensors = {tensor.name: tensor.make() for tensor in list_tensors(toy.model, toy.plan, toy.shards)}
    state = {name: value.float() for name, value in toy.model.module.state_dict().items()}
    last = state["model.decoder.final_layer_norm.weight"] / 1024
    assert np.array_equal(tensors["output_norm.weight"], last.numpy())
    second = state["model.decoder.layers.0.fc2.bias"] * 1024
    assert np.array_equal(tensors["blk.0.ffn_down.bias"], second.numpy())
    positions = torch.from_numpy(tensors["position_embd.weight"]).view(torch.float16).float()
    assert torch.equal(positions, state["model.decoder.embed_positions.weight"][2:] * 1024)
    q, k, v = (state[f"model.decoder.layers.1.self_attn.{part}_proj.bias"] for part in "qkv")
    assert np.array_equal(tensors["blk.1.attn_qkv.bias"], torch.cat([q, k, v]).numpy())


def test_opt_as_gpt2_computes_the_same_logits(quantized):
    """The rewriting itself, in torch: transformers' GPT-2 with the file's tensors against transformers' OPT."""
    import transformers as hf

    toy = quantized("opt")
    tensors = {t.name: torch.from_numpy(np.array(t.make())) for t in
               list_tensors(toy.model, toy.plan, toy.shards, in_float32=True)}  # fmt: skip
    config = hf.GPT2Config(
        vocab_size=2048, n_embd=256, n_inner=512, n_layer=2, n_head=4, n_positions=64, layer_norm_epsilon=1e-5 * 1024**2
    )
    gpt2 = hf.GPT2LMHeadModel(config).eval()
    names = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "attn_norm": "ln_1",
             "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc",
             "ffn_down": "mlp.c_proj"}  # fmt: skip
    state = {}
    for name, values in tensors.items():
        parts = name.split(".")
        key = ".".join([*(["h", parts[1]] if parts[0] == "blk" else []), names[parts[-2]], parts[-1]])
        linear = values.dim() == 2 and parts[0] == "blk"
        state[f"transformer.{key}"] = values.t().contiguous() if linear else values
    gpt2.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    opt = load_model(str(toy.model.path)).module.float()
    from cptquant.models.stream import write_weight_

    for site in toy.model.layout.sites:
        weight = toy.shards.weight(site.name)
        if weight is not None:
            write_weight_(opt.get_submodule(site.name), site, weight)
    ids = torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = opt(ids).logits.log_softmax(-1), gpt2(ids).logits.log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert abs(float(kl)) < 1e-6


def test_a_file_cut_short_is_refused(quantized, tmp_path):
    toy = quantized("llama")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.gguf"
    whole = path.read_bytes()
    for size in (3, 200, len(whole) // 2, len(whole) - 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="cut short"):
            open_gguf(path)
    with pytest.raises(ArtifactError, match=r"other\.gguf is missing"):
        open_gguf(tmp_path / "other.gguf")


def test_a_changed_byte_names_the_tensor(quantized, tmp_path):
    toy = quantized("llama")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.gguf"
    victim = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[int(victim.data_offset) + 20] ^= 0x55
    path.write_bytes(content)
    tensors = list_tensors(toy.model, toy.plan, toy.shards)
    with pytest.raises(CptquantError, match=r"the bytes of blk\.1\.ffn_up\.weight \(from model\.layers\.1\.mlp"):
        check_file(path, tensors, toy.plan.size_bytes)
    differing = [record.site for record in read_back(Written(toy.model, toy.plan, toy.shards, path))
                 if record.largest_error > 0]  # fmt: skip
    assert differing == ["model.layers.1.mlp.up_proj"]


def test_a_changed_byte_of_a_matrix_in_16_bits_is_found_too(quantized, tmp_path):
    toy = quantized("llama")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.gguf"
    kept = next(site for site, fmt in toy.plan.quant_formats.items() if fmt.is_float)
    tensor = GgufWeights(path, toy.model).tensor_of(toy.model.layout.site_by_name[kept])
    victim = next(found for found in gguf.GGUFReader(path).tensors if found.name == tensor)
    content = bytearray(path.read_bytes())
    content[int(victim.data_offset)] ^= 0x01
    path.write_bytes(content)
    records = read_back(Written(toy.model, toy.plan, toy.shards, path))
    assert [(record.site, record.format) for record in records if record.largest_error > 0] == [(kept, "float16")]


def test_a_failed_write_leaves_the_old_file(quantized, tmp_path, monkeypatch):
    toy = quantized("llama")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint" / "model.gguf").read_bytes()

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(OutputError, match="disk full while writing"):
        write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "model.gguf").read_bytes() == before
    assert not (tmp_path / "checkpoint.partial").exists()


def test_a_head_that_shares_the_embedding_is_one_tensor(quantized):
    toy = quantized("llama")
    embedding, head = toy.model.layout.shared_head
    assert torch.equal(toy.shards.weight(embedding), toy.shards.weight(head))
    assert toy.plan.formats[embedding] == toy.plan.formats[head]
    names = [tensor.name for tensor in list_tensors(toy.model, toy.plan, toy.shards)]
    assert "output.weight" not in names and len(names) == len(set(names))


def refused(path, message):
    model = load_model(str(path))
    with pytest.raises(ModelError, match=message) as caught:
        check_gguf_exportable(model)
    assert caught.value.exit_code == 2


def test_post_norm_opt_is_refused_with_the_reason(tmp_path):
    path = save_toy("opt", tmp_path / "post", do_layer_norm_before=False)
    refused(path, r"has no final norm \(post-norm, do_layer_norm_before = false, as OPT-350M\)")
    path = save_toy("opt", tmp_path / "projected", word_embed_proj_dim=128)
    refused(path, "this one has projections between its embedding and its blocks")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "llama.cpp runs llama with silu, the model's config.json has 'relu'"),
        ("opt", {"activation_function": "gelu"}, "llama.cpp runs opt with relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = False, config.json has"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary scaling 'dynamic' is not supported here; default, linear and llama3 are",
        ),
    ],
)
def test_variants_that_the_engine_does_not_have(name, changes, message, tmp_path):
    refused(save_toy(name, tmp_path / "model", **changes), message)


def test_other_architectures_and_tasks_are_refused(tmp_path):
    embedded = read_layout("embedded:bert-mini")
    assert GGUF.refuse_model(embedded) == (
        "--target gguf: BertForSequenceClassification: llama.cpp runs bert for embeddings (a bare BertModel), this "
        "model is for sequence_classification"
    )
    other = ModelLayout.model_validate({**embedded.model_dump(), "model_type": "bloom", "architecture": "BloomModel"})
    assert GGUF.refuse_model(other).startswith(
        "--target gguf: BloomModel (model_type bloom) is not supported; supported: "
    )


def test_a_weight_beyond_float16_after_scaling_is_refused(tmp_path):
    path = save_toy("opt", tmp_path / "model")
    toy = quantize_toy(path, tmp_path / "work", ("Q8_0",))
    weight = toy.model.module.get_submodule("model.decoder.layers.0.fc1").weight
    huge = toy.shards.quantized("model.decoder.layers.0.fc1")
    assert weight.shape == huge.shape
    with pytest.raises(ValueError, match="do not fit float16"):
        huge.scaled(2.0**26)


def test_missing_tokenizer_file_is_named(tmp_path):
    path = save_toy("llama", tmp_path / "model")
    (path / "tokenizer.json").unlink()
    shutil.copyfile(save_toy("llama", tmp_path / "other") / "tokenizer_config.json", path / "tokenizer_config.json")
    refused(path, "has no tokenizer")


def test_weights_of_a_file_are_those_of_the_run(quantized, tmp_path):
    toy = quantized("gpt_neox")
    write_gguf(toy.model, toy.plan, toy.shards, tmp_path / "checkpoint")
    source = GgufWeights(tmp_path / "checkpoint" / "model.gguf", toy.model)
    for site in toy.model.layout.block_sites:
        ours = toy.shards.weight(site.name)
        if ours is not None:
            assert torch.equal(source.weight(site.name), ours)
    tokens = json.loads((toy.model.path / "tokenizer.json").read_text())["model"]["vocab"]
    reader = gguf.GGUFReader(tmp_path / "checkpoint" / "model.gguf")
    field = reader.fields["tokenizer.ggml.tokens"]
    written = [bytes(field.parts[index]).decode() for index in field.data]
    assert all(written[index] == token for token, index in tokens.items() if index > 1)
