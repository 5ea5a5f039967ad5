"""Bits are counted from what was written; the oracle is the arithmetic of the format, and our own exporter's files."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from written_weights import count_bits, find_checkpoint, read_written

OUT, IN, GROUP = 32, 64, 32


def gptq_folder(folder: Path, bits: int, *, order: torch.Tensor, symmetric: bool = True) -> Path:
    """One layer as GPTQ's format stores it: codes of all ones, scale 0.5, stored zero 2^(bits-1) - 1."""
    folder.mkdir(parents=True)
    words = torch.full((IN * bits // 32, OUT), -1, dtype=torch.int32)
    zero = 2 ** (bits - 1) - 1
    zeros = torch.zeros(IN // GROUP, OUT * bits // 32, dtype=torch.int32)
    stream = 0
    for place in range(OUT):
        stream |= zero << (bits * place)
    for word in range(OUT * bits // 32):
        value = (stream >> (32 * word)) & 0xFFFFFFFF
        zeros[:, word] = value - (1 << 32) if value >= 1 << 31 else value
    layer = {"qweight": words, "qzeros": zeros, "g_idx": order,
             "scales": torch.full((IN // GROUP, OUT), 0.5, dtype=torch.float16)}  # fmt: skip
    tensors = {f"block.q_proj.{name}": tensor for name, tensor in layer.items()}
    save_file({**tensors, "norm.weight": torch.full((IN,), 3.0)}, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "sym": symmetric}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


IN_ORDER = torch.arange(IN, dtype=torch.int32) // GROUP


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_groups_count_codes_and_scales_only(tmp_path: Path, bits: int):
    folder = gptq_folder(tmp_path / "out", bits, order=IN_ORDER)
    assert count_bits(folder) == OUT * IN * bits + 16 * OUT * IN // GROUP
    written = read_written(tmp_path / "out", {"norm.weight"})
    assert written.bits_per_weight == bits + 16 / GROUP
    assert written.quantized_weights == OUT * IN
    largest = 2**bits - 1 - 2 ** (bits - 1)
    assert torch.equal(written.weights["block.q_proj.weight"], torch.full((OUT, IN), 0.5 * largest))
    assert torch.equal(written.weights["norm.weight"], torch.full((IN,), 3.0))


def test_zero_points_count_where_groups_are_not_symmetric(tmp_path: Path):
    folder = gptq_folder(tmp_path / "out", 4, order=IN_ORDER, symmetric=False)
    assert count_bits(folder) == OUT * IN * 4 + (16 + 4) * OUT * IN // GROUP


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_folders_read_as_the_library_reads_them(tmp_path: Path, bits: int, symmetric: bool):
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    generator = torch.Generator().manual_seed(bits)
    shape = (OUT, IN // GROUP)
    layer = {
        "weight": torch.randn(OUT, IN, generator=generator),
        "weight_scale": torch.rand(shape, generator=generator).to(torch.bfloat16) + 0.25,
        "weight_zero_point": torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(
            torch.int8
        ),
    }
    if symmetric:
        layer["weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
    stored = PackedQuantizationCompressor.compress(layer, scheme)
    save_file({f"block.q_proj.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": {"num_bits": bits}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    written = read_written(tmp_path, set())
    expected = PackedQuantizationCompressor.decompress(stored, scheme)["weight"].float()
    # The library multiplies in bfloat16, the ruler in float32.
    torch.testing.assert_close(written.weights["block.q_proj.weight"], expected, rtol=2**-8, atol=0)
    assert written.bits_per_weight == bits + (16 + (0 if symmetric else bits)) / GROUP


def test_an_order_of_columns_counts_where_it_says_something(tmp_path: Path):
    folder = gptq_folder(tmp_path / "out", 4, order=IN_ORDER.flip(0).contiguous())
    assert count_bits(folder) == OUT * IN * 4 + 16 * OUT * IN // GROUP + 32 * IN


def test_floats_that_the_original_has_not_are_left_out(tmp_path: Path):
    gptq_folder(tmp_path / "out", 4, order=IN_ORDER)
    assert set(read_written(tmp_path / "out", set()).weights) == {"block.q_proj.weight"}


def test_dense_weights_carry_their_bits(tmp_path: Path):
    from peers.dense_output import save_dense

    weights = {"a.weight": torch.randn(4, 8), "b.weight": torch.randn(2, 8).half(), "norm.weight": torch.ones(8)}
    save_dense(tmp_path / "out", weights, {"a.weight": 96, "b.weight": 64})
    written = read_written(tmp_path / "out", set(weights))
    assert written.bits == 160
    assert written.quantized_weights == 48
    assert written.bits_per_weight == pytest.approx(160 / 48)
    assert all(torch.equal(written.weights[name], weight.float()) for name, weight in weights.items())


def test_the_folder_with_weights_is_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds 0 folders with weights"):
        find_checkpoint(tmp_path)
    inner = gptq_folder(tmp_path / "named-by-the-tool", 4, order=IN_ORDER)
    assert find_checkpoint(tmp_path) == inner
    gptq_folder(tmp_path / "other", 4, order=IN_ORDER)
    with pytest.raises(FileNotFoundError, match="holds 2 folders with weights"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint"
