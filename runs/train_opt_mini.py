"""Train the embedded causal language model ``opt-mini`` on Python's standard library.

    python runs/train_opt_mini.py --minutes 43 --output opt-mini
    python runs/train_opt_mini.py --evaluate src/cptquant/models/embedded_data/opt-mini

Hardware and time: one thread of an AMD EPYC (Zen 5, avx512_bf16), shared with other work; the
shipped model took 43 minutes on the clock (about 20 of CPU time): 2039 steps, 8.35 million tokens.
bfloat16 autocast was 1.8 times as fast there as float32.  The schedule follows the clock, so a
slower machine trains on fewer tokens, but always ends annealed; ``training.json`` in the output
folder states what a run took.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from embedded_text import Document, build_corpus, select
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEED = 20
VOCABULARY = 2048
PAD, EOS = "<pad>", "</s>"
HIDDEN, BLOCKS, HEADS, POSITIONS = 128, 12, 4, 512
SHORT = 256  # length of the sequences of the first part; the last part uses all positions
SHORT_PART = 0.7
STEP_TOKENS = 4096
PEAK_RATE, WARM_UP, WEIGHT_DECAY, CLIP = 3e-3, 0.03, 0.1, 1.0
INIT_STD = 0.05


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the train split; ``</s>`` both begins and ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


_future: dict[tuple[int, torch.dtype], torch.Tensor] = {}


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention for full sequences: 1.6 times the training speed of sdpa on this CPU."""
    b, h, n, d = query.shape
    if (n, query.dtype) not in _future:
        _future[n, query.dtype] = torch.full((n, n), -1e4).triu(1).to(query.dtype)
    flat = (b * h, n, d)
    bias = _future[n, query.dtype].expand(b * h, n, n)
    scale = 1.0 if scaling is None else scaling
    scores = torch.baddbmm(bias, query.reshape(flat), key.reshape(flat).transpose(1, 2), alpha=scale)
    out = torch.bmm(torch.softmax(scores, -1), value.reshape(flat))
    return out.view(b, h, n, d).transpose(1, 2).contiguous(), None


def new_model(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """The untrained model; residual projections start smaller, since 24 of them add up."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=BLOCKS,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=INIT_STD,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ALL_ATTENTION_FUNCTIONS.register("plain_causal", causal_attention)
    config._attn_implementation = "plain_causal"
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.div_(math.sqrt(2 * BLOCKS))
    return model


@dataclass
class Packed:
    """Endless training batches: shuffled documents, ``</s>`` before each, cut into sequences."""

    documents: list[list[int]]
    eos: int
    generator: torch.Generator
    epochs: float = 0.0
    _rest: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def _epoch(self) -> torch.Tensor:
        order = torch.randperm(len(self.documents), generator=self.generator).tolist()
        flat = [t for i in order for t in (self.eos, *self.documents[i])]
        shift = int(torch.randint(0, POSITIONS, (1,), generator=self.generator))
        return torch.tensor(flat[shift:], dtype=torch.long)

    def batches(self, length: int) -> Iterator[torch.Tensor]:
        """One epoch of batches of ``STEP_TOKENS`` tokens, each row with one token more as target."""
        flat = self._epoch()
        rows = flat[: (len(flat) - 1) // length * length]
        starts = torch.randperm(len(rows) // length, generator=self.generator) * length
        size = STEP_TOKENS // length
        for at in range(0, len(starts) - size + 1, size):
            self.epochs += size * length / len(flat)
            yield torch.stack([flat[s : s + length + 1] for s in starts[at : at + size].tolist()])


def rate(part: float) -> float:
    """Learning rate after ``part`` of the time: warm-up, then linear to zero."""
    return PEAK_RATE * min(part / WARM_UP, max(0.0, (1 - part) / (1 - WARM_UP)))


def step_loss(model: OPTForCausalLM, batch: torch.Tensor, offset: int) -> torch.Tensor:
    """Mean next-token loss; ``offset`` shifts short sequences so that every position is trained."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    positions = torch.arange(offset, offset + inputs.shape[1]).expand_as(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def plain_tokenizer_class(folder: Path) -> None:
    """Name the tokenizer class that transformers 4 and 5 both know."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, facts: Any) -> None:
    """Write float16 weights, config and tokenizer; each file is replaced in one move."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        half = OPTForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        plain_tokenizer_class(Path(folder))
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, output / file.name)


def train(minutes: float, output: Path, save_every: float = 300.0) -> None:
    """Train for ``minutes`` of wall-clock time and write the model, the last time annealed."""
    torch.manual_seed(SEED)
    corpus = build_corpus()
    documents = select(corpus, "train")
    tokenizer = train_tokenizer(documents)
    ids = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    data = Packed(ids, tokenizer.eos_token_id, torch.Generator().manual_seed(SEED))
    model = new_model(tokenizer).train()
    optimizer = make_optimizer(model)
    facts: dict[str, Any] = {"seed": SEED, "train_tokens": sum(map(len, ids)), "planned_minutes": minutes}
    save(model, tokenizer, output, {**facts, "minutes": 0.0})
    start = saved = time.monotonic()
    steps, tokens, running = 0, 0, 0.0
    while (part := (time.monotonic() - start) / (60 * minutes)) < 1:
        length = SHORT if part < SHORT_PART else POSITIONS
        for batch in data.batches(length):
            part = (time.monotonic() - start) / (60 * minutes)
            if part >= 1 or (length == SHORT and part >= SHORT_PART):
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(part)
            loss = step_loss(model, batch, (steps % 2) * SHORT if length == SHORT else 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            steps, tokens = steps + 1, tokens + batch[:, 1:].numel()
            running = loss.item() if steps == 1 else 0.98 * running + 0.02 * loss.item()
            if steps % 100 == 0:
                print(f"{part:.3f} step {steps} tokens {tokens} loss {running:.4f}", flush=True)
            if time.monotonic() - saved > save_every:
                saved = time.monotonic()
                progress = {"minutes": round((saved - start) / 60, 1), "steps": steps, "tokens": tokens}
                save(model, tokenizer, output, {**facts, **progress, "epochs": round(data.epochs, 2)})
    done = {"minutes": round((time.monotonic() - start) / 60, 1), "steps": steps, "tokens": tokens}
    save(model, tokenizer, output, {**facts, **done, "epochs": round(data.epochs, 2)})


def document_bits(model: torch.nn.Module, ids: list[int], eos: int, window: int = POSITIONS) -> float:
    """Bits of one document: windows that overlap by half, so each token sees half a window at least.

    The first half window of the document is the exception: its context is all there is before it.
    The end-of-document token is not counted, as the compressor does not code it either.
    """
    sequence, half, bits = [eos, *ids], window // 2, 0.0
    for start in range(0, max(1, len(sequence) - 1 - half), half):
        chunk = torch.tensor([sequence[start : start + window + 1]])
        with torch.inference_mode():
            logits = model(input_ids=chunk[:, :-1], use_cache=False).logits.float()[0]
        first = half if start else 0
        bits += float(functional.cross_entropy(logits[first:], chunk[0, 1 + first :], reduction="sum"))
    return bits / math.log(2)


def bits_per_byte(model: torch.nn.Module, tokenizer: Any, documents: list[Document]) -> dict[str, Any]:
    """Bits per byte over ``documents``, its standard error over documents, and ``xz -9e`` beside it."""
    texts = [d.text for d in documents]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bits = torch.tensor([document_bits(model, x, tokenizer.eos_token_id) for x in ids], dtype=torch.float64)
    sizes = torch.tensor([len(t.encode()) for t in texts], dtype=torch.float64)
    ratio, n = float(bits.sum() / sizes.sum()), len(texts)
    spread = ((bits - ratio * sizes) ** 2).sum() * n / (n - 1)
    joined = "".join(texts).encode()
    packed = lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
    return {
        "documents": n,
        "bytes": len(joined),
        "tokens": sum(map(len, ids)),
        "bits_per_byte": round(ratio, 4),
        "stderr": round(float(spread.sqrt() / sizes.sum()), 4),
        "token_perplexity": round(2 ** float(bits.sum() / sum(map(len, ids))), 3),
        "xz_9e_bits_per_byte": round(8 * len(packed) / len(joined), 4),
        "window": POSITIONS,
        "stride": POSITIONS // 2,
    }


def evaluate(folder: Path) -> dict[str, Any]:
    """The figures of a saved model: its float16 weights, run in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    corpus = build_corpus()
    figures = {s: bits_per_byte(model, tokenizer, select(corpus, s)) for s in ("validation", "test")}
    return {"parameters": sum(p.numel() for p in model.parameters()), **figures}


def main() -> None:
    """Train or, with ``--evaluate``, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--output", type=Path, default=Path("opt-mini"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", type=Path, default=None, help="measure this folder and train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.evaluate is None:
        train(options.minutes, options.output)
    print(json.dumps(evaluate(options.evaluate or options.output), indent=1))


if __name__ == "__main__":
    main()
