"""The command line inside the test process, and a small model to give it."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from cptquant.cli.main import main
from cptquant.quantizers.learned_blocks import LearnedBlocks
from cptquant.quantizers.methods import QUANTIZERS


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cptquant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call `cptquant ARGUMENTS` and return its exit code and output; a traceback never gets this far."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cptquant", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


class ShortTraining(LearnedBlocks):
    """About three steps a block."""

    def passes(self, sequences: int) -> float:
        """A part of one."""
        return min(1.0, 24 / sequences)


@pytest.fixture(autouse=True)
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default quantizer with few steps; what a process of its own runs is not shortened."""
    monkeypatch.setitem(QUANTIZERS, "block-ap", ShortTraining())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small OPT with the embedded tokenizer's vocabulary."""
    embedded = Path(__file__).parents[1] / "src/cptquant/models/embedded_data/opt-mini"
    config = OPTConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    path = tmp_path / "model"
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded / name, path / name)
    return path
