"""Train the small models of the PTQ grid on Python's standard library, each with an intermediate checkpoint.

    python runs/ptq_grid_models.py --output build/ptq_grid/models

Five shapes, two architectures, `STEPS` steps of `STEP_TOKENS` tokens each, the tokenizer of `embedded:opt-mini`.
The checkpoint after `EARLY_PART` of the steps is taken before the learning rate decays, the last one annealed. A model
whose folder stands is not trained again. Seeds are fixed; about six minutes of CPU time on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedded_text import build_corpus, select
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from cptquant.models.embedded import embedded_model_path

SEED = 31
LENGTH, STEP_TOKENS, STEPS, EARLY_PART = 256, 4096, 240, 0.4
PEAK_RATE, WARM_UP_STEPS, DECAY_FROM, WEIGHT_DECAY, CLIP = 3e-3, 12, 0.5, 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A small model: name, architecture and sizes."""

    name: str
    architecture: str
    width: int
    blocks: int
    inner: int


SHAPES = (
    Shape("opt-w64", "opt", 64, 4, 256),
    Shape("opt-w128", "opt", 128, 4, 512),
    Shape("llama-w64", "llama", 64, 6, 192),
    Shape("llama-w128", "llama", 128, 4, 384),
    Shape("llama-w192", "llama", 192, 3, 512),
)


def new_model(shape: Shape, vocabulary: int, eos: int, pad: int) -> PreTrainedModel:
    """The untrained model, residual projections scaled down by the square root of twice the depth."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.width // 32, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": pad,
    }  # fmt: skip
    model: PreTrainedModel
    if shape.architecture == "opt":
        sizes = {"ffn_dim": shape.inner, "word_embed_proj_dim": shape.width, "init_std": 0.05}
        model = OPTForCausalLM(OPTConfig(**common, **sizes, dropout=0.0, attention_dropout=0.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=shape.inner, initializer_range=0.05))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * shape.blocks))
    return model


def rate(step: int) -> float:
    """Warm-up, constant, then linear to zero."""
    decay = max(0.0, (step / STEPS - DECAY_FROM) / (1 - DECAY_FROM))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - decay)


def save(model: PreTrainedModel, folder: Path, facts: dict[str, Any]) -> None:
    """Float16 weights, tokenizer and facts; the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(partial)
    source = embedded_model_path("embedded:opt-mini")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, partial / name)
    (partial / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def train(shape: Shape, stream: torch.Tensor, tokenizer: Any, output: Path) -> None:
    """Train one shape and write both checkpoints."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = new_model(shape, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    began, loss = time.process_time(), torch.zeros(())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        starts = torch.randint(0, len(stream) - LENGTH - 1, (STEP_TOKENS // LENGTH,), generator=generator)
        batch = torch.stack([stream[s : s + LENGTH + 1] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done in (round(EARLY_PART * STEPS), STEPS):
            facts = {
                "seed": SEED, "shape": vars(shape), "tokens": done * STEP_TOKENS, "annealed": done == STEPS,
                "train_loss": loss.item(), "cpu_seconds": round(time.process_time() - began, 1),
            }  # fmt: skip
            save(model, output / f"{shape.name}-{'last' if done == STEPS else 'early'}", facts)
            print(json.dumps({**facts, "parameters": sum(p.numel() for p in model.parameters())}), flush=True)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/ptq_grid/models"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path("embedded:opt-mini"))
    stream: torch.Tensor | None = None
    for shape in SHAPES:
        if all((output / f"{shape.name}-{stage}").is_dir() for stage in ("early", "last")):
            continue
        if stream is None:
            documents = select(build_corpus(), "train")
            ids = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
            stream = torch.tensor([t for row in ids for t in (tokenizer.eos_token_id, *row)])
        train(shape, stream, tokenizer, output)


if __name__ == "__main__":
    main()
