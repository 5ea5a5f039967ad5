"""Small random models that llama.cpp knows, with real tokenizers, and their quantized pieces."""

import shutil
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.load import LoadedModel, load_model
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.rtn import Rtn

EMBEDDED = Path(__file__).parents[2] / "src/cptquant/models/embedded_data"
GGUF = find_target("gguf")
FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "float16")
_VOCABULARY = 2048
_LLAMA = dict(
    vocab_size=_VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
_BERT = dict(
    vocab_size=600, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TOYS: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "llama-untied": hf.LlamaConfig(**_LLAMA, tie_word_embeddings=False, attention_bias=True),
    "llama-3": hf.LlamaConfig(**_LLAMA, rope_parameters=LLAMA3_ROPE),
    "mistral": hf.MistralConfig(**_LLAMA, sliding_window=48),
    "qwen2": hf.Qwen2Config(**_LLAMA),
    "qwen3": hf.Qwen3Config(**_LLAMA, head_dim=64),
    "gpt2": hf.GPT2Config(
        vocab_size=_VOCABULARY, n_embd=256, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1
    ),
    "gpt_neox": hf.GPTNeoXConfig(
        vocab_size=_VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
    ),
    "opt": hf.OPTConfig(
        vocab_size=_VOCABULARY, hidden_size=256, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=256, init_std=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    ),
    "bert": hf.BertConfig(**_BERT),
}  # fmt: skip
_CLASSES = {"gpt2": "GPT2LMHeadModel", "bert": "BertModel", "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM",
            "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """A loaded model, its plan under `--target gguf`, and its pieces."""

    model: LoadedModel
    plan: Plan
    shards: ShardFolder


def save_toy(name: str, folder: Path, *, dtype: torch.dtype = torch.float16, **changes: object) -> Path:
    """Save a random model of the family with a tokenizer of its kind."""
    config = type(TOYS[name])(**{**TOYS[name].to_dict(), **changes})
    torch.manual_seed(0)
    model = getattr(hf, _CLASSES.get(name, "LlamaForCausalLM"))(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that a wrong place would show
                parameter.add_(torch.randn(parameter.shape) * 0.05)
            assert path
    model.to(dtype).save_pretrained(folder)
    if name == "bert":
        train_wordpiece().save_pretrained(folder)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(EMBEDDED / "opt-mini" / file, folder / file)
    return folder


def quantize_toy(source: Path, work: Path, formats: tuple[str, ...] = FORMATS) -> Quantized:
    """Round every group of sites to another format, in turn."""
    model = load_model(str(source))
    layout = model.layout
    parsed = cycle([QuantFormat.parse(name) for name in formats])
    chosen: dict[str, QuantFormat] = {}
    tied = {name: tie.sites for tie in GGUF.ties(layout) for name in tie.sites}
    tied.update({name: layout.shared_head for name in layout.shared_head or ()})
    for site in layout.sites:
        if site.name not in chosen:
            fmt = candidate_formats(site, layout, GGUF, [next(parsed)])[0]
            chosen.update(dict.fromkeys(tied.get(site.name, (site.name,)), fmt))
    plan = plan_of(model, chosen)
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    shards = ShardFolder(work, plan.quant_formats, shapes)
    quantize_sites(model, plan, Rtn(), None, lambda index, weights, records: shards.save(str(index), weights, records))
    return Quantized(model, plan, shards)


def plan_of(model: LoadedModel, formats: dict[str, QuantFormat]) -> Plan:
    """A plan as the allocator writes it, with these formats and their true bytes."""
    from cptquant.allocation.allocate import allocate

    layout = model.layout
    at_16_bit = GGUF.plan_bytes(layout, {})
    made = allocate(
        layout, None, Budget(at_16_bit, "bytes"), GGUF, find_allocator("uniform"), formats=[QuantFormat.parse("Q8_0")]
    )
    return made.model_copy(
        update={
            "formats": {name: fmt.name for name, fmt in formats.items()},
            "size_bytes": GGUF.plan_bytes(layout, formats),
        }
    )


def train_wordpiece() -> hf.PreTrainedTokenizerFast:
    """A lower-casing WordPiece, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def train_sentencepiece() -> hf.PreTrainedTokenizerFast:
    """A BPE with byte fallback and ▁ for spaces, as Llama 2's."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _sentences() -> list[str]:
    text = (EMBEDDED / "text").rglob("*.py")
    found = [path.read_text(encoding="utf-8", errors="ignore")[:20000] for path in sorted(text)[:3]]
    return found or [Path(__file__).read_text(encoding="utf-8")]
