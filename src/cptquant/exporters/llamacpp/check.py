"""Held-out tokens through the engine and through our own model: does the file mean in llama.cpp what we think?

Two files are compared. The first holds our dequantized weights in float32, so that the engine computes with float
activations: it must agree with our model within the bound, or graph, metadata or row orders are wrong. The second is
the exported file itself; the engine rounds activations to 8 bits for its integer products, and what that costs is
measured and stated, apart from the weights.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cptquant.core.errors import CptquantError
from cptquant.core.export import EngineComparison
from cptquant.core.plan import Plan
from cptquant.exporters.gguf.tensors import list_tensors
from cptquant.exporters.gguf.write import write_file
from cptquant.exporters.llamacpp.engine import LlamaCpp
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource
from cptquant.models.text import TokenSet
from cptquant.packing.shards import ShardFolder

BOUND_NATS = 1e-3
_LOGIT_ENTRIES = 1 << 26
"""Logits compared, at most (256 MB in float32)."""
_MOST_SEQUENCES = 8
MIXED_TEXT = (
    "The quick brown fox, 1234567 jumps; it's O'Neill's — “quoted”!\n\n\tdef f(x):\n        return x ** 2  # π≈3.14\n"
    "Zażółć gęślą jaźń. Ünïcödé naïve café. Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया. "
    "你好，世界。こんにちは世界。안녕하세요 세계. 🙂 ½ ²  trailing   spaces   \r\n"
    "<html>&amp;</html> don't WE'LL 00 3.0e-7"
)


def check_token_ids(engine: LlamaCpp, file: Path, model: LoadedModel) -> bool:
    """Whether the engine cuts mixed text, line by line and whole, into Hugging Face's token ids."""
    texts = [MIXED_TEXT, *[line for line in MIXED_TEXT.splitlines() if line.strip()]]
    tokenizer = model.require_tokenizer()
    theirs = engine.tokenize(file, texts, special=True)
    return theirs == [cast(list[int], tokenizer.encode(text, add_special_tokens=True)) for text in texts]


def compare_in_engine(
    engine: LlamaCpp, file: Path, model: LoadedModel, plan: Plan, shards: ShardFolder, tokens: TokenSet
) -> tuple[EngineComparison, ...]:
    """KL per token and top-1 agreement (cosine distance for encoders) of "dequantized" and "file".

    Raises:
        CptquantError: "dequantized" differs by more than the bound, or the engine fails.
    """
    used = _pick(model, tokens)
    reference = _reference(model, used, shards)
    ids = used.input_ids.tolist()
    with tempfile.TemporaryDirectory(prefix="cptquant-") as folder:
        wide = Path(folder) / "dequantized.gguf"
        write_file(wide, model, list_tensors(model, plan, shards, in_float32=True))
        compared = [_compare(engine, path, label, model, ids, reference) for label, path in
                    (("dequantized", wide), ("file", file))]  # fmt: skip
    if compared[0].kl_nats_per_token > BOUND_NATS:
        raise CptquantError(
            f"llama.cpp computes something else than our model from the same weights: "
            f"{compared[0].kl_nats_per_token:.3g} nats per token, at most {BOUND_NATS:g} is allowed; every tensor of "
            "the file is bit for bit ours, so metadata or the engine's graph differ"
        )
    return tuple(compared)


def _pick(model: LoadedModel, tokens: TokenSet) -> TokenSet:
    """A few sequences without padding."""
    full = torch.nonzero(tokens.attention_mask.all(dim=1)).flatten()
    if not len(full):
        shortest = int(tokens.attention_mask.sum(dim=1).min())
        cut = TokenSet.build(
            tokens.input_ids[:, :shortest], tokens.attention_mask[:, :shortest], tokens.labels, tokens.documents,
            tokens.description,
        )  # fmt: skip
        return _pick(model, cut)
    per_sequence = tokens.input_ids.shape[1] * model.layout.vocabulary_size
    count = max(1, min(_MOST_SEQUENCES, _LOGIT_ENTRIES // per_sequence))
    return tokens.subset(full[:count])


def _reference(model: LoadedModel, tokens: TokenSet, weights: WeightSource) -> Tensor:
    """Our model's outputs: log-probabilities (n, T, vocabulary), or hidden states (n, T, width) for encoders."""
    stream = ModelStream(model, tokens, weights=weights)
    for _ in range(model.layout.block_count):
        stream.advance(stream.load_block())
    with torch.no_grad():
        found = torch.cat([stream.finish(index, hidden) for index, hidden in enumerate(stream.hidden)])
    return found.mean(dim=1) if model.layout.task == "encoder" else found.log_softmax(dim=-1)


def _compare(
    engine: LlamaCpp, file: Path, label: str, model: LoadedModel, ids: Sequence[Sequence[int]], reference: Tensor
) -> EngineComparison:
    if model.layout.task == "encoder":
        found = torch.from_numpy(engine.embeddings(file, ids))
        distance = 1 - torch.nn.functional.cosine_similarity(found, reference, dim=-1)
        return _summary(label, distance[:, None], None)
    logits = torch.from_numpy(np.ascontiguousarray(engine.logits(file, ids)[..., : reference.shape[-1]]))
    theirs = logits.log_softmax(dim=-1)
    kl = (reference.exp() * (reference - theirs)).sum(dim=-1)
    agree = (theirs.argmax(-1) == reference.argmax(-1)).float().mean()
    return _summary(label, kl, float(agree))


def _summary(label: str, per_token: Tensor, agreement: float | None) -> EngineComparison:
    by_sequence = per_token.double().mean(dim=1)
    count = len(by_sequence)
    stderr = float(by_sequence.std() / count**0.5) if count > 1 else None
    return EngineComparison(
        weights=label,
        kl_nats_per_token=float(per_token.double().mean()),
        kl_stderr=stderr,
        top1_agreement=agreement,
        n=per_token.numel(),
    )
