"""A language model of a few thousand parameters and sources for it."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.token_files import TokenSource
from cptquant.models.text import TokenSet

VOCABULARY = 61


def toy(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == "opt":
        config = OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            dropout=0.1,
        )  # fmt: skip
        return OPTForCausalLM(config)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def source(name: str, tokens: int = 400, seed: int = 0, period: int = 5) -> TokenSource:
    """Tokens with something to learn: every one follows from the one before."""
    drawn = np.random.default_rng(seed)
    ids = (np.arange(tokens) * period + drawn.integers(0, 3, tokens)) % (VOCABULARY - 1) + 1
    starts = np.array([*range(0, tokens, 31), tokens], dtype=np.int64)
    return TokenSource.build(name, ids.astype(np.int32), starts)


def mixture(*, windows: int = 24, apart: bool = False, seed: int = 0) -> Mixture:
    return Mixture(
        [source("domain"), source("general", seed=1, period=7)], [0.6, 0.4], window_tokens=12,
        total_tokens=12 * windows, seed=seed, keep_documents_apart=apart,
    )  # fmt: skip


def held_out(windows: int = 6) -> TokenSet:
    ids = torch.from_numpy(source("x", 12 * windows, seed=9).tokens.astype(np.int64)).view(windows, 12)
    return TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(windows) // 2, "toy text")


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def fresh(path: Path, name: str) -> Path:
    folder = path / name
    folder.mkdir()
    return folder
