"""Checkpoints on disk: our own read site by site, and any folder loaded by stock transformers, by one ruler."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MODELS, block_formats, quantized_sites, random_tokens, save_tokenizer

from cptquant.core.errors import ArtifactError, ModelError
from cptquant.core.evaluation import Measurement
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan, SolverStatus
from cptquant.evaluation.evaluate import evaluate, evaluate_models
from cptquant.exporters.compressed_tensors import write_checkpoint
from cptquant.models.checkpoint_weights import CheckpointWeights, MemoryWeights, formats_from_config
from cptquant.models.load import LoadedModel, load_any, load_model
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.packing.shards import ShardFolder

Tiny = Callable[..., LoadedModel]
MIXED = ("int4-g16", "int3-channel", "int8-tensor", "float16", "int5-tensor-asym", "int2-g16")


def write(model: LoadedModel, formats: dict[str, QuantFormat], folder: Path) -> tuple[Plan, dict[str, QuantizedWeight]]:
    """A checkpoint as the main path writes it."""
    layout = model.layout
    complete = {site.name: formats.get(site.name, layout.keep_format) for site in layout.sites}
    weights = quantized_sites(model, {name: fmt for name, fmt in complete.items() if not fmt.is_float})
    size_bytes = layout.plan_bytes(complete)
    plan = Plan(
        target="transformers",
        allocator="uniform",
        budget="4bpw",
        budget_scope="file",
        limit_bytes=size_bytes,
        formats={name: fmt.name for name, fmt in complete.items()},
        size_bytes=size_bytes,
        site_bytes=layout.block_site_bytes(complete),
        bits_per_weight=8 * size_bytes / layout.parameters,
        bits_per_weight_sites=4.0,
        status=SolverStatus.HEURISTIC,
    )
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    shards = ShardFolder(folder.with_name(folder.name + "-work"), complete, shapes)
    shards.save("all", weights, [])
    write_checkpoint(model, plan, shards, folder)
    return plan, weights


def values(measurements: list[Measurement]) -> dict[tuple[str, str], float]:
    return {(m.name, m.subject): m.value for m in measurements}


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["opt", "classifier", "encoder"])
def test_a_checkpoint_read_back_equals_the_weights_in_memory(name: str, tiny: Tiny, tmp_path: Path):
    model = tiny(name)
    formats = block_formats(model.layout, *MIXED)
    if model.layout.shared_head is not None:
        formats[model.layout.shared_head[0]] = QuantFormat.parse("int8-channel-plain")
        formats[model.layout.shared_head[1]] = QuantFormat.parse("int6-channel")
    plan, weights = write(model, formats, tmp_path / "checkpoint")
    read = CheckpointWeights(tmp_path / "checkpoint", model.layout, plan.quant_formats)
    memory = MemoryWeights(weights)
    state = model.module.state_dict()
    for site in model.layout.sites:
        found, expected = read.weight(site.name), memory.weight(site.name)
        assert found is not None
        assert torch.equal(found, state[site.parameter_name].float() if expected is None else expected)
        codes, expected_codes = read.quantized(site.name), memory.quantized(site.name)
        assert (codes is None) == (expected_codes is None)
        if codes is not None and expected_codes is not None:
            assert torch.equal(codes.codes, expected_codes.codes)


def test_formats_are_read_from_config_when_no_plan_is_given(tiny: Tiny, tmp_path: Path):
    model = tiny("opt")
    plan, _ = write(model, block_formats(model.layout, *MIXED), tmp_path / "checkpoint")
    quantized = {name: fmt for name, fmt in plan.quant_formats.items() if not fmt.is_float}
    assert formats_from_config(tmp_path / "checkpoint", model.layout) == quantized


def test_a_shared_head_in_16_bits_is_the_originals(tiny: Tiny, tmp_path: Path):
    model = tiny("opt")
    assert model.layout.shared_head is not None
    write(model, block_formats(model.layout, "int4-g16"), tmp_path / "checkpoint")
    read = CheckpointWeights(tmp_path / "checkpoint", model.layout)
    embedding, head = model.layout.shared_head
    assert read.weight(embedding) is not None
    assert read.weight(head) is None


def test_shards_are_followed(tiny: Tiny, tmp_path: Path):
    model = tiny("opt")
    _, weights = write(model, block_formats(model.layout, "int3-g16"), tmp_path / "checkpoint")
    split_into_shards(tmp_path / "checkpoint")
    read = CheckpointWeights(tmp_path / "checkpoint", model.layout)
    for name, weight in weights.items():
        found = read.weight(name)
        assert found is not None and torch.equal(found, weight.dequantize())


@pytest.mark.parametrize("name", ["opt", "masked", "classifier", "encoder"])
def test_a_stock_checkpoint_is_judged_as_the_weights_in_memory(name: str, tiny: Tiny, tmp_path: Path):
    """In float32 on both sides: what stock transformers unpacks is what we evaluated."""
    model = tiny(name)
    tokens = random_tokens(padded=name != "opt", labels=name == "classifier")
    plan, weights = write(model, block_formats(model.layout, *MIXED), tmp_path / "checkpoint")
    candidate = load_any(str(tmp_path / "checkpoint"))
    in_memory = values(evaluate(model, {"quantized": MemoryWeights(weights)}, tokens, batch_size=4))
    on_disk = values(evaluate_models(model, candidate, tokens, batch_size=4))
    assert in_memory.keys() <= on_disk.keys()
    for key, value in in_memory.items():
        assert on_disk[key] == pytest.approx(value, abs=1e-6, rel=1e-6), key
    assert on_disk["weight_bytes", "quantized"] == plan.size_bytes
    assert on_disk["weight_bytes", "original"] == model.layout.source_bytes
    assert on_disk["compression_vs_float16", "quantized"] == pytest.approx(
        2 * model.layout.parameters / plan.size_bytes
    )


def test_a_folder_alone_is_graded_but_not_compared(tiny: Tiny):
    model, tokens = tiny("opt"), random_tokens()
    found = values(evaluate_models(None, model, tokens, subject="candidate"))
    compared = values(evaluate(model, {}, tokens))
    assert found["nll_nats_per_token", "candidate"] == compared["nll_nats_per_token", "original"]
    assert {subject for _, subject in found} == {"candidate"}
    assert not [name for name, _ in found if name.startswith(("kl", "top1"))]
    assert found["weight_bytes", "candidate"] == model.layout.source_bytes


def test_a_classifier_alone_is_graded(tiny: Tiny):
    found = values(evaluate_models(None, tiny("classifier"), random_tokens(labels=True)))
    assert {"accuracy", "nll_nats_per_example"} <= {name for name, _ in found}


def test_models_of_different_depth_compare(tiny: Tiny, tmp_path: Path):
    import transformers as hf

    torch.manual_seed(3)
    config = hf.OPTConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    hf.OPTForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    deeper = load_any(str(tmp_path))
    found = values(evaluate_models(tiny("opt"), deeper, random_tokens()))
    alone = values(evaluate_models(None, deeper, random_tokens()))
    assert found["nll_nats_per_token", "quantized"] == pytest.approx(alone["nll_nats_per_token", "quantized"])
    assert found["kl_nats_per_token", "quantized"] > 0


def test_another_vocabulary_is_refused(tiny: Tiny, tmp_path: Path):
    import transformers as hf

    config = hf.OPTConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    hf.OPTForCausalLM(config).save_pretrained(tmp_path / "larger")
    larger = load_model(str(tmp_path / "larger"))
    with pytest.raises(ModelError, match=r"has 120 tokens, .* has 97; KL needs one vocabulary: give the original that"):
        evaluate_models(tiny("opt"), larger, random_tokens())


def test_the_same_number_of_tokens_in_another_order_is_refused(tiny: Tiny, tmp_path: Path):
    MODELS["opt"]().to(torch.float16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, shift=1)
    renumbered = load_model(str(tmp_path))
    with pytest.raises(ModelError, match="number their tokens differently; KL needs one vocabulary"):
        evaluate_models(tiny("opt"), renumbered, random_tokens())


def test_another_task_is_refused(tiny: Tiny):
    with pytest.raises(ModelError, match=r"is for masked_lm, .* for causal_lm; only models for the same task compare"):
        evaluate_models(tiny("opt"), tiny("masked"), random_tokens())


def test_an_encoder_alone_is_refused(tiny: Tiny):
    with pytest.raises(ModelError, match="is a bare encoder: it has no loss of its own"):
        evaluate_models(None, tiny("encoder"), random_tokens())


def test_a_checkpoint_of_another_tool_is_told_apart(tiny: Tiny, tmp_path: Path):
    model = tiny("opt")
    write(model, block_formats(model.layout, "int4-g16"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"group target 'Linear' is no site of .*evaluate it as a model folder"):
        CheckpointWeights(tmp_path / "checkpoint", model.layout)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"not one that cptquant writes \(KeyError: 'config_groups'\)"):
        CheckpointWeights(tmp_path / "checkpoint", model.layout)
    path.write_text('{"quantization_config": {"config_groups": {"a": {"weights": null}}}}')
    with pytest.raises(ModelError, match=r"not one that cptquant writes \(TypeError"):
        CheckpointWeights(tmp_path / "checkpoint", model.layout)
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        CheckpointWeights(tmp_path / "checkpoint", model.layout)


def test_missing_and_misshapen_tensors_are_named(tiny: Tiny, tmp_path: Path):
    model, folder = tiny("opt"), tmp_path / "checkpoint"
    formats = block_formats(model.layout, "int4-g16")
    kept, packed, *_ = formats
    formats[kept] = model.layout.keep_format
    plan, _ = write(model, formats, folder)
    tensors = load_file(folder / "model.safetensors")

    def rewritten(**changes: torch.Tensor | None) -> CheckpointWeights:
        changed = {**tensors, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, folder / "model.safetensors")
        return CheckpointWeights(folder, model.layout, plan.quant_formats)

    with pytest.raises(ArtifactError, match=f"site {packed}: tensor weight_scale of a int4-g16 matrix .* is missing"):
        rewritten(**{f"{packed}.weight_scale": None}).weight(packed)
    with pytest.raises(ModelError, match=rf"lacks the tensor {kept}\.weight; write the checkpoint again"):
        rewritten(**{f"{kept}.weight": None}).weight(kept)
    with pytest.raises(ModelError, match=r"has shape \(2, 3\), the model's is \(32, 32\); this checkpoint belongs to"):
        rewritten(**{f"{kept}.weight": torch.zeros(2, 3)}).weight(kept)


def test_a_truncated_checkpoint_is_refused(tiny: Tiny, tmp_path: Path):
    model = tiny("opt")
    write(model, block_formats(model.layout, "int4-g16"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or truncated"):
        CheckpointWeights(tmp_path / "checkpoint", model.layout)
    with pytest.raises(ModelError, match="damaged or truncated"):
        evaluate_models(None, replace(model, path=tmp_path / "checkpoint"), random_tokens())
