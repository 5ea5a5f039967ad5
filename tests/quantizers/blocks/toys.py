"""Small quantized models to train, and what their blocks' errors are, computed the slow way."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as hf
from quantizers.test_quantize import make_model, make_plan, make_tokens, run

from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_training import BlockLook, BlockMethod, FinishedBlock, Pace
from cptquant.quantizers.blocks.blockwise import Start, train_blocks
from cptquant.quantizers.held_out import split_held_out
from cptquant.quantizers.rtn import Rtn

PACE = Pace(epochs=4, batch_sequences=2, checks=4, held_out=0.25, coarse_products=False)


class Changed(MemoryWeights):
    """Quantized weights and other norms."""

    def __init__(self, weights: Mapping[str, StoredWeight], norms: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights)
        object.__setattr__(self, "norms", norms)

    def kept(self) -> Mapping[str, torch.Tensor]:
        return self.norms  # type: ignore[attr-defined]


@dataclass
class Trained:
    """What `train_blocks` handed over."""

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: dict[int, FinishedBlock] = field(default_factory=dict)
    looks: list[BlockLook] = field(default_factory=list)

    def keep(
        self, index: int, weights: dict[str, StoredWeight], norms: dict[str, torch.Tensor], look: BlockLook
    ) -> None:
        assert index == look.block_index
        self.blocks[index] = FinishedBlock(weights, norms)
        self.weights.update(weights)
        self.norms.update(norms)
        self.looks.append(look)


def toy(name: str, folder: Path) -> LoadedModel:
    """A model of `quantizers.test_quantize`, GPT-2 (linear layers stored the other way round), or a wider Llama."""
    torch.manual_seed(0)
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    elif name == "llama-wide":
        config = hf.LlamaConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    else:
        return make_model(name, folder)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_model(str(folder))


def rounded(model: LoadedModel, linear: str = "int3-g16", **exact: str) -> dict[str, StoredWeight]:
    """Min-max rounding to nearest: a start that leaves something to win."""
    return dict(run(model, make_plan(model, linear, **exact), Rtn(clip_search=False), None).weights)


def train(model: LoadedModel, start: Start, method: BlockMethod, tokens: TokenSet | None = None, **options) -> Trained:
    """All blocks."""
    trained = Trained()
    train_blocks(model, start, method, make_tokens() if tokens is None else tokens, trained.keep, **options)
    return trained


def slow_errors(model: LoadedModel, weights: Changed, tokens: TokenSet, pace: Pace) -> list[float]:
    """Relative squared error of every block's output on the held-out sequences, by two plain streams."""
    held, _ = split_held_out(tokens, pace.held_out, pace.seed)
    original, changed = ModelStream(model, held), ModelStream(model, held, weights=weights)
    real, errors = held.attention_mask.bool(), []
    for _ in range(model.layout.block_count):
        original.advance(original.load_block())
        changed.advance(changed.load_block())
        wanted, found = (torch.cat(stream.hidden)[real].double() for stream in (original, changed))
        errors.append(float((wanted - found).square().sum() / wanted.square().sum()))
    return errors
