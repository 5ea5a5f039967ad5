"""What a person can get wrong about MODEL: each is a ModelError that says what, and what to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cptquant.core.errors import ModelError, UserError
from cptquant.models.load import load_any, load_model, read_layout


def _refusal(source: object, load=load_model) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(source))
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code == 2
    return str(caught.value)


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- the folder ---


def test_missing_folder(tmp_path):
    missing = tmp_path / "nothing"
    assert _refusal(missing) == (
        f"{missing} does not exist; MODEL is a local folder with config.json and *.safetensors, a hub id such as "
        "facebook/opt-125m, embedded:opt-mini or embedded:bert-mini"
    )


def test_hub_id_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = _refusal("nobody-here/no-such-model")
    assert message.startswith(
        "nobody-here/no-such-model is no local folder, and the Hugging Face hub could not give it ("
    )
    assert message.endswith(
        "); check the spelling and the network, or download the model elsewhere and give its folder"
    )


def test_empty_folder(tmp_path):
    assert _refusal(tmp_path) == (
        f"{tmp_path} is empty; a Hugging Face model folder holds config.json and *.safetensors"
    )


def test_folder_without_config(save_toy):
    folder = save_toy("opt")
    (folder / "config.json").unlink()
    assert _refusal(folder) == (
        f"{folder} holds no config.json; a Hugging Face model folder holds config.json and *.safetensors"
    )


def test_file_instead_of_folder(save_toy):
    file = save_toy("opt") / "model.safetensors"
    assert _refusal(file) == (f"{file} is a file; MODEL is a folder with config.json and *.safetensors, or a hub id")


def test_unknown_embedded_model():
    assert _refusal("embedded:opt-maxi") == (
        "'embedded:opt-maxi' is no embedded model; choose one of: embedded:opt-mini, embedded:bert-mini"
    )


# --- config.json ---


def test_config_that_is_no_json(save_toy):
    folder = save_toy("opt")
    (folder / "config.json").write_text('{"model_type": "opt",')
    assert _refusal(folder).startswith(f"{folder / 'config.json'} is not valid JSON (")


def test_config_that_is_a_list(save_toy):
    folder = save_toy("opt")
    (folder / "config.json").write_text("[1, 2]")
    assert _refusal(folder).startswith(f"{folder / 'config.json'} holds a JSON list, expected an object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": 7}, 'config.json: model_type is 7, expected a name such as "opt"'),
        ({"model_type": None}, 'config.json: model_type is None, expected a name such as "opt"'),
        ({"architectures": "OPTForCausalLM"}, 'config.json: architectures is "OPTForCausalLM", expected a list with'),
        ({"architectures": []}, "config.json: architectures is [], expected a list with the class the weights belong"),
        ({"architectures": None}, "config.json: architectures is null, expected a list with the class the weights"),
        ({"hidden_size": "32"}, "config.json (OPTForCausalLM) is not accepted by transformers: "),
        ({"num_hidden_layers": "three"}, "config.json (OPTForCausalLM) is not accepted by transformers: "),
        ({"hidden_size": -32}, "OPTForCausalLM cannot be built from its config ("),
        ({"activation_function": "nonsense"}, "OPTForCausalLM cannot be built from its config ("),
        ({"model_type": "optimus"}, "config.json (OPTForCausalLM) is not accepted by transformers: "),
        ({"architectures": ["OPTForPoetry"]}, "architecture OPTForPoetry is unknown here; cptquant handles causal"),
    ],
)
def test_config_with_a_wrong_field(changes, message, save_toy):
    folder = save_toy("opt")
    _change_config(folder, **changes)
    assert message in _refusal(folder)


def test_own_code_needs_permission(save_toy):
    folder = save_toy("opt")
    _change_config(folder, architectures=["Special"], auto_map={"AutoModelForCausalLM": "special.Special"})
    assert _refusal(folder) == (
        f"{folder}: Special comes with its own Python code; pass --trust-remote-code if you trust it"
    )


# --- architectures ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "T5ForConditionalGeneration is an encoder-decoder; cptquant handles models with one stack of blocks"),
        ("resnet", "ResNetModel has no token embedding (found an input named pixel_values)"),
        ("vit", "ViTModel has no token embedding (found an input named pixel_values)"),
        ("token-classifier", "architecture BertForTokenClassification is unknown here; cptquant handles"),
        ("albert", "AlbertModel: found 1 blocks in encoder.albert_layer_groups, but num_hidden_layers"),
        ("mixtral", "of the weights in the blocks of MixtralForCausalLM are nn.Linear or Conv1D, at least 50% are"),
    ],
)
def test_architecture_that_cannot_be_handled(name, message, save_toy):
    assert message in _refusal(save_toy(name), read_layout)


def test_model_without_repeated_blocks(save_toy):
    folder = save_toy("bert-encoder", num_hidden_layers=0)
    assert _refusal(folder) == (
        "BertModel has no repeated blocks of linear layers: cptquant needs a ModuleList of blocks of one class that "
        "contain nn.Linear or Conv1D; found 1 linear layers, but no such list"
    )


# --- weight files ---


def test_pickled_weights_only(save_toy):
    folder = save_toy("opt")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert _refusal(folder) == (
        f"{folder} holds weights as pytorch_model.bin only; cptquant reads safetensors only, because loading a pickle "
        "can run code: convert with model.save_pretrained(..., safe_serialization=True)"
    )


def test_no_weights_at_all(save_toy):
    folder = save_toy("opt")
    (folder / "model.safetensors").unlink()
    assert _refusal(folder) == (
        f"{folder} holds no model.safetensors (nor model.safetensors.index.json); is the download complete?"
    )


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_truncated_weights(kept, save_toy):
    file = save_toy("opt") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = _refusal(file.parent)
    assert message.startswith(f"{file} is damaged or truncated (")
    assert message.endswith(f"{kept:,} bytes on disk); download or copy it again")


@pytest.mark.parametrize("byte", [0, 7, 8, 60, 200, 1000, 3000])
def test_header_with_a_flipped_bit(byte, save_toy):
    file = save_toy("opt") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[byte] ^= 0x40
    file.write_bytes(content)
    message = _refusal(file.parent)
    refused = (
        f"{file} is damaged or truncated (",
        f"{file.parent}: the weight files lack ",
        f"{file.parent}: shapes in ",
    )
    assert message.startswith(refused)


def test_no_flipped_bit_in_the_header_is_more_than_a_refusal(save_toy):
    file = save_toy("opt") / "model.safetensors"
    sound = file.read_bytes()
    length = 8 + int.from_bytes(sound[:8], "little")
    refusals = 0
    for byte in range(0, length, 97):
        for bit in (0x01, 0x10):
            content = bytearray(sound)
            content[byte] ^= bit
            file.write_bytes(content)
            try:
                load_model(str(file.parent))
            except ModelError:
                refusals += 1
    assert refusals > length // 97  # a flip in the metadata may be harmless; most are not


def test_missing_shard(save_toy):
    folder = save_toy("opt", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    assert _refusal(folder) == (
        f"{folder}: 1 of {len(shards)} shards are missing: {shards[1].name}; complete the download"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_shard_index_of_a_wrong_form(content, save_toy):
    folder = save_toy("opt", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert _refusal(folder) == (
        f"{index}: weight_map is no table of tensor name to file; download or save the model again"
    )


def test_missing_tensors_are_named(save_toy):
    folder = save_toy("opt")
    _change_tensors(folder, lambda tensors: tensors.pop("model.decoder.layers.1.fc1.weight"))
    assert _refusal(folder) == (
        f"{folder}: the weight files lack model.decoder.layers.1.fc1.weight, which OPTForCausalLM needs; complete the "
        "download, or mend architectures in config.json"
    )


def test_superfluous_tensors_are_named(save_toy):
    folder = save_toy("opt")
    _change_tensors(folder, lambda tensors: tensors.update({"model.decoder.extra.weight": torch.ones(3)}))
    assert _refusal(folder) == (
        f"{folder}: the weight files hold model.decoder.extra.weight, which OPTForCausalLM does not use; mend "
        "architectures in config.json, or save the model again with its own class"
    )


def test_config_of_another_size(save_toy):
    folder = save_toy("opt")
    _change_config(folder, ffn_dim=128)
    message = _refusal(folder)
    assert "OPTForCausalLM" in message or "contradict config.json" in message
    assert "fc1" in message or "belong together" in message


def test_weights_tied_in_the_config_but_not_in_the_file(save_toy):
    folder = save_toy("llama-untied")
    _change_config(folder, tie_word_embeddings=True)
    assert _refusal(folder) == (
        f"{folder}: config.json ties the embedding to the head, but the weight files hold a different lm_head.weight; "
        'set "tie_word_embeddings": false in config.json'
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_counted(dtype, value, save_toy):
    folder = save_toy("opt", dtype)

    def spoil(tensors):
        tensors["model.decoder.layers.2.fc2.weight"][:2, :3] = value
        tensors["model.decoder.layers.0.fc1.bias"][1] = value

    _change_tensors(folder, spoil)
    for load in (load_model, read_layout, load_any):
        assert _refusal(folder, load) == (
            f"{folder}: weights are NaN or infinite in model.decoder.layers.0.fc1.bias (1), "
            "model.decoder.layers.2.fc2.weight (6) (entries in brackets); such a model cannot be measured or "
            "quantized: get a sound copy of it"
        )


def test_weights_in_a_dtype_that_is_no_start(save_toy):
    folder = save_toy("opt")

    def widen(tensors):
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    _change_tensors(folder, widen)
    assert _refusal(folder) == (
        f"{folder}: the weights are F64; cptquant starts from float32, float16 or bfloat16: convert them with "
        "model.to(torch.bfloat16).save_pretrained(...)"
    )


# --- already quantized, tokenizer ---


def test_quantized_checkpoint_is_no_start(save_toy):
    folder = save_toy("opt")
    _change_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    assert _refusal(folder) == (
        f"{folder} is already quantized (compressed-tensors); give the original float model (cptquant evaluate takes "
        "quantized folders too)"
    )


def test_damaged_tokenizer(save_toy):
    folder = save_toy("opt")
    (folder / "tokenizer.json").write_text('{"version": 3')
    message = _refusal(folder)
    assert message.startswith(f"{folder}: the tokenizer cannot be loaded (")
    assert message.endswith("); copy the original's tokenizer files again")


def test_absent_tokenizer_matters_only_when_text_is_needed(save_toy):
    folder = save_toy("opt")
    loaded = load_model(str(folder))
    assert loaded.tokenizer is None
    with pytest.raises(ModelError) as caught:
        loaded.require_tokenizer()
    assert str(caught.value) == (
        f"{folder} has no tokenizer, and text is needed; copy the original's tokenizer files (tokenizer.json, "
        f"tokenizer_config.json) into {folder}"
    )
