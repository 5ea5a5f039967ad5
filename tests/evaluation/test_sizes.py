import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cptquant.core.errors import ModelError
from cptquant.core.layout import ModelLayout
from cptquant.evaluation.sizes import folder_weight_bytes, measure_sizes

LAYOUT = ModelLayout(
    architecture="OPTForCausalLM",
    model_type="opt",
    task="causal_lm",
    source="tiny",
    source_digest="0",
    source_dtype="float16",
    storage_dtype="float16",
    source_bytes=2000,
    parameters=1000,
    block_count=1,
    hidden_size=8,
    max_positions=16,
    vocabulary_size=32,
    sites=(),
)


def test_compression_is_stated_against_both_float_sizes_by_bytes():
    found = measure_sizes(LAYOUT, {"original": 2000, "quantized": 600})
    values = {(m.subject, m.name): m.value for m in found}
    assert values["original", "compression_vs_float16"] == 1.0
    assert values["original", "compression_vs_float32"] == 2.0
    assert values["quantized", "weight_bytes"] == 600
    assert values["quantized", "parameters"] == 1000
    assert values["quantized", "bits_per_weight"] == pytest.approx(4.8)
    assert values["quantized", "compression_vs_float16"] == pytest.approx(2000 / 600)
    assert values["quantized", "compression_vs_float32"] == pytest.approx(4000 / 600)
    assert all(m.stderr is None and m.n == 0 for m in found)


def write_shards(folder: Path) -> int:
    save_file(
        {"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(7, dtype=torch.int32)}, folder / "1.safetensors"
    )
    save_file({"c": torch.zeros(2, 2, dtype=torch.int64)}, folder / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * 15 + 4 * 7 + 8 * 4


def test_bytes_of_a_folder_are_those_of_its_tensors_without_headers(tmp_path: Path):
    tensor_bytes = write_shards(tmp_path)
    assert folder_weight_bytes(tmp_path) == tensor_bytes
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert on_disk > tensor_bytes


def test_a_single_file_is_counted_likewise(tmp_path: Path):
    save_file({"a": torch.zeros(3, 5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert folder_weight_bytes(tmp_path) == 30


def test_a_missing_shard_is_named(tmp_path: Path):
    write_shards(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 shards are missing: 2\.safetensors"):
        folder_weight_bytes(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged or truncated"):
        folder_weight_bytes(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        folder_weight_bytes(tmp_path)
