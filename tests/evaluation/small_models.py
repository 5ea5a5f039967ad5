"""Small random models, saved and loaded the real way, and weights to put into them."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import QuantizedWeight, scale_shape

VOCABULARY = 97
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "max_position_embeddings": 32, "intermediate_size": 48}
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, max_position_embeddings=32, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2, n_positions=32, initializer_range=0.3)
    ),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE, initializer_range=0.3)),
    "classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDE, num_labels=4, initializer_range=0.3)),
    "regression": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDE, num_labels=1)),
    "encoder": lambda: hf.BertModel(hf.BertConfig(**WIDE, initializer_range=0.3)),
}


def save_tokenizer(folder: Path, *, shift: int = 0) -> None:
    """One word per number; `shift` renumbers them."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    words += [f"w{(number + shift) % (VOCABULARY - 5)}" for number in range(VOCABULARY - 5)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]",
    ).save_pretrained(folder)  # fmt: skip


def random_tokens(sequences: int = 9, length: int = 16, *, padded: bool = False, labels: bool = False) -> TokenSet:
    """Random text; every third sequence starts a document."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(sequences, length, dtype=torch.int64)
    if padded:
        for row in range(0, sequences, 2):
            mask[row, length - 1 - row % (length - 3) :] = 0
    ids = torch.randint(5, VOCABULARY, (sequences, length), generator=generator) * mask
    return TokenSet.build(
        ids,
        mask,
        torch.randint(0, 4, (sequences,), generator=generator) if labels else None,
        torch.arange(sequences) // 3,
        "random tokens",
    )


def round_to_nearest(site: Site, weight: torch.Tensor, fmt: QuantFormat) -> QuantizedWeight:
    """Plain rounding of one matrix, scales (and zero points) from the extremes of each group."""
    rows, columns = weight.shape
    shape = scale_shape(fmt, rows, columns)
    grouped = weight.float().reshape(math.prod(shape), -1)
    assert grouped.numel() == weight.numel(), f"{site.name}: {columns} columns do not split into groups of {fmt.name}"
    bottom, top = -(2 ** (fmt.code_bits - 1)), 2 ** (fmt.code_bits - 1) - 1
    low, high = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
    spread = torch.maximum(-low, high) / top if fmt.symmetric else (high - low) / (top - bottom)
    scales = spread.clamp(min=1e-6).half()
    zeros = torch.zeros_like(spread) if fmt.symmetric else (bottom - low / scales.float()).round()
    codes = (grouped / scales.float().unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(bottom, top).to(torch.int8)
    return QuantizedWeight(
        fmt,
        codes.reshape(rows, columns),
        scales.reshape(shape),
        None if fmt.symmetric else zeros.to(torch.int8).reshape(shape),
    )


def quantized_sites(model: LoadedModel, formats: dict[str, QuantFormat]) -> dict[str, QuantizedWeight]:
    """Rounded weights of the named sites."""
    state = model.module.state_dict()
    found: dict[str, QuantizedWeight] = {}
    for name, fmt in formats.items():
        site = model.layout.site_by_name[name]
        stored = state[site.parameter_name]
        found[name] = round_to_nearest(site, stored.t() if site.transposed else stored, fmt)
    return found


def block_formats(layout: ModelLayout, *names: str) -> dict[str, QuantFormat]:
    """The given formats in turn over the blocks' sites."""
    parsed = [QuantFormat.parse(name) for name in names]
    return {site.name: parsed[index % len(parsed)] for index, site in enumerate(layout.block_sites)}
