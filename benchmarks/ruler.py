"""One ruler for every contestant: KL(original || quantized) on held-out tokens, computed with stock transformers.

It uses nothing of cptquant's evaluation, so that our outputs and the peers' are judged by neither's own code. Weights
are decoded to float32 as code * scale from what the tool wrote, put into the original model, and run in float32.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Divergence:
    """Mean over tokens; standard error over windows."""

    kl_nats_per_token: float
    stderr: float
    windows: int
    top1_agreement: float

    def __str__(self) -> str:
        return f"{self.kl_nats_per_token:.5f} ± {self.stderr:.5f}"


def cut_windows(model: Path, text: str, windows: int, length: int) -> Tensor:
    """The first windows * length tokens of a text as (windows, length) int64.

    Raises:
        ValueError: the text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    enough = text[: 16 * windows * length]
    token_ids = tokenizer(enough, add_special_tokens=False, verbose=False).input_ids[: windows * length]
    if len(token_ids) < windows * length:
        raise ValueError(f"{windows} windows of {length} tokens need more text than {len(text)} characters")
    return torch.tensor(token_ids).view(windows, length)


class Ruler:
    """Holds the original model in float32, and after the first judgement its log-probabilities on the test windows."""

    def __init__(self, model: Path, test_windows: Tensor, *, batch_size: int = 4) -> None:
        self.original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.original.requires_grad_(False)
        self.batches = test_windows.split(batch_size)
        self._references: list[Tensor] = []

    @torch.inference_mode()
    def judge(self, weights: dict[str, Tensor]) -> Divergence:
        """Divergence of the original with some weights replaced; names and shapes as in its state dict.

        Raises:
            KeyError: a name that the original has not. ValueError: a shape that differs.
        """
        changed = copy.deepcopy(self.original)
        parameters = dict(changed.named_parameters())
        for name, weight in weights.items():
            if parameters[name].shape != weight.shape:
                raise ValueError(f"{name}: {tuple(weight.shape)} instead of {tuple(parameters[name].shape)}")
            parameters[name].copy_(weight)
        means, agreements = [], []
        self._references = self._references or [self._log_probabilities(self.original, batch) for batch in self.batches]
        for batch, reference in zip(self.batches, self._references, strict=True):
            candidate = self._log_probabilities(changed, batch)
            means.append((reference.exp() * (reference - candidate)).sum(-1).double().mean(1))
            agreements.append((reference.argmax(-1) == candidate.argmax(-1)).double().mean(1))
        kl = torch.cat(means)
        return Divergence(
            kl_nats_per_token=kl.mean().item(),
            stderr=(kl.std() / len(kl) ** 0.5).item(),
            windows=len(kl),
            top1_agreement=torch.cat(agreements).mean().item(),
        )

    @staticmethod
    def _log_probabilities(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).logits[:, :-1].log_softmax(-1)


def decode_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Float32 weights, (out, in), of the quantized linear layers of a compressed-tensors or GPTQ checkpoint.

    Also of ours for torch, whose codes are compressed-tensors' and may have a product of low rank beside them.

    Raises:
        ValueError: the folder holds none of them, or groups of mixed width, or corrected columns.
    """
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "compressed-tensors":
        return _decode_compressed_tensors(stored, config)
    if config["quant_method"] in ("gptq", "auto-round"):  # AutoRound packs as GPTQ does, each layer in its own width
        own = {name: layer["bits"] for name, layer in config.get("extra_config", {}).items() if "bits" in layer}
        return _decode_gptq(stored, config["bits"], own)
    if config["quant_method"] == "cptquant-segments":
        return _decode_low_rank(stored, config["formats"])
    raise ValueError(f"{folder}: unknown quant_method {config['quant_method']!r}")


def _decode_compressed_tensors(stored: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Groups or rows in dense int32 words, zero points packed along the rows; the width is the group's."""
    dense = {}
    for packed_name in [name for name in stored if name.endswith(".weight_packed")]:
        module = packed_name.removesuffix(".weight_packed")
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        bits = _code_bits(module, config)
        codes = unpack_from_int32(stored[packed_name], bits, shape).float()
        scales = stored[f"{module}.weight_scale"].float()
        if f"{module}.weight_g_idx" in stored:
            columns = stored[f"{module}.weight_g_idx"].long()
        else:
            columns = torch.arange(shape[1]) // (shape[1] // scales.shape[1])
        if f"{module}.weight_zero_point" in stored:
            zeros = unpack_from_int32(stored[f"{module}.weight_zero_point"], bits, scales.shape, packed_dim=0)
            codes -= zeros.float()[:, columns]
        dense[f"{module}.weight"] = codes * scales[:, columns]
    return dense


def _decode_low_rank(stored: dict[str, Tensor], formats: dict[str, str]) -> dict[str, Tensor]:
    """code * scale + left * right / 128, each product with a scale; formats are int<bits>-g<group>[-r<rank>]."""
    dense = {}
    for module, name in formats.items():
        width = re.fullmatch(r"int(\d)-g\d+(-r\d+)?", name)
        if width is None:
            raise ValueError(f"{module} has {name}, which is not decoded here")
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        codes = unpack_from_int32(stored[f"{module}.weight_packed"], int(width[1]), shape).float()
        scales = stored[f"{module}.weight_scale"].float()
        dense[f"{module}.weight"] = codes * scales.repeat_interleave(shape[1] // scales.shape[1], dim=1)
        if width[2]:
            left = stored[f"{module}.weight_low_rank_left"].float() * stored[f"{module}.weight_low_rank_scale"].float()
            dense[f"{module}.weight"] += left @ stored[f"{module}.weight_low_rank_right"].float() / 128
    return dense


def _code_bits(module: str, config: dict) -> int:
    groups = config["config_groups"].values()
    for group in groups:
        if module in group["targets"]:
            return group["weights"]["num_bits"]
    (only,) = [group for group in groups if group["targets"] == ["Linear"]]
    return only["weights"]["num_bits"]


def _decode_gptq(stored: dict[str, Tensor], width: int, own: dict[str, int]) -> dict[str, Tensor]:
    """GPTQ (v1): codes of consecutive input rows, low bits first, in int32 words; the stored zero is one less."""
    dense = {}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        bits = own.get(name, width)
        codes = _read_words(stored[f"{name}.qweight"], bits)  # (in, out)
        zeros = _read_words(stored[f"{name}.qzeros"].T.contiguous(), bits).T + 1  # (groups, out)
        scales = stored[f"{name}.scales"].float()  # (groups, out)
        if f"{name}.g_idx" in stored:
            group = stored[f"{name}.g_idx"].long()  # (in,)
        else:
            group = torch.arange(len(codes)) // (len(codes) // len(scales))
        dense[f"{name}.weight"] = ((codes - zeros[group]).float() * scales[group]).T.contiguous()
    return dense


def _read_words(words: Tensor, bits: int) -> Tensor:
    """int32 words (rows * bits / 32, columns) to unsigned codes (rows, columns); a code may straddle two words."""
    positions = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = ((words[:, None, :] >> positions) & 1).reshape(-1, bits, words.shape[1])
    return (stream.long() << torch.arange(bits)[None, :, None]).sum(1)
