"""The peers, their settings, and the calibration files that all contestants read."""

import json
from pathlib import Path

import torch
from gptq_vs_peers import CALIBRATION_WINDOWS, WINDOW_TOKENS, read_text
from peer_cells import Setting, Tool
from results_file import model_folder
from ruler import cut_windows
from safetensors.torch import save_file
from torch import Tensor

SPARE_TOKENS = 4
"""AutoRound reads text: decoded and cut again, some windows come out shorter, so its texts are a little longer."""
GUARD_CHARACTERS = 300_000
"""The end of the training text, which ours holds its own checks on."""


def uniform(widths: tuple[int, ...], groups: tuple[int, ...], *options: str, note: str = "") -> tuple[Setting, ...]:
    """All widths in all group sizes."""
    return tuple(
        Setting(f"W{width} g{group}{note}", (str(width), str(group)), options) for group in groups for width in widths
    )


def averages(*bits: float) -> tuple[Setting, ...]:
    """Average widths."""
    return tuple(Setting(f"average {value:g}", (f"{value:g}",)) for value in bits)


WIDTHS, GROUPS = (2, 3, 4), (64, 32, 128)
PRESETS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M")
FAST = ("--batch-size", "8")
"""Eight sequences at a time: faster than the tools' default of one, the same result but for rounding."""

TOOLS = (
    Tool("AutoRound", "autoround_scheme.py", "autoround", averages(2.5, 3, 3.5, 4, 4.25), reads="texts"),
    Tool("GPTQModel", "gptqmodel_gptq.py", "gptqmodel",
         uniform(WIDTHS, GROUPS, *FAST) + uniform(WIDTHS, GROUPS[:2], *FAST, "--clip-search", note=", clip search")),
    Tool("llm-compressor GPTQ", "llmcompressor_gptq.py", "llmcompressor",
         uniform(WIDTHS, GROUPS, *FAST) + uniform(WIDTHS, GROUPS[:2], *FAST, "--clip-search", note=", clip search")),
    Tool("llm-compressor AWQ", "llmcompressor_awq.py", "llmcompressor",
         uniform(WIDTHS, (64, 128), *FAST) + uniform(WIDTHS, (64,), *FAST, "--then-gptq", note=", then GPTQ")),
    Tool("ModelOpt", "modelopt_auto.py", "modelopt", averages(2.5, 3, 3.5, 4, 4.25), shares=True),
    Tool("HQQ", "hqq_uniform.py", "hqq",
         uniform(WIDTHS, GROUPS) + uniform(WIDTHS, (64,), "--axis", "1", note=", axis 1")),
    Tool("llama.cpp", "llamacpp_presets.py", "llamacpp", tuple(Setting(name, (name,)) for name in PRESETS),
         shares=True, hosted=True),
)  # fmt: skip


def applicable(tool: Tool, folder: Path) -> list[Setting]:
    """The settings whose group divides every row of the model's blocks; others are left out and not failures."""
    config = json.loads((folder / "config.json").read_text())
    rows = [config[name] for name in ("hidden_size", "intermediate_size", "ffn_dim") if config.get(name)]
    found = []
    for setting in tool.settings:
        group = int(setting.positional[1]) if len(setting.positional) == 2 else 1
        if all(width % group == 0 for width in rows):
            found.append(setting)
    return found


def write_calibration(model: str, folder: Path) -> dict[str, Path]:
    """The same calibration windows as token ids, as texts for AutoRound, as one text for ours; and ours' guard."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokens": folder / "tokens.safetensors", "texts": folder / "texts.json",
             "text": folder / "calibration.txt", "guard": folder / "guard.txt"}  # fmt: skip
    source, text = model_folder(model), read_text(model, "train")
    windows: Tensor = cut_windows(source, text, CALIBRATION_WINDOWS, WINDOW_TOKENS + SPARE_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(source)
    pieces = [tokenizer.decode(row) for row in windows]
    save_file({"input_ids": windows[:, :WINDOW_TOKENS].to(torch.int64).contiguous()}, files["tokens"])
    files["texts"].write_text(json.dumps([{"text": piece} for piece in pieces]))
    files["text"].write_text("".join(pieces))
    files["guard"].write_text(text[-GUARD_CHARACTERS:])
    return files
