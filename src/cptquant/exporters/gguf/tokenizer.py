"""The tokenizer inside a GGUF file, from the model's `tokenizer.json`.

Three kinds exist in llama.cpp for our families: byte-level BPE (`gpt2`), whose text is cut first by the regular
expression that `tokenizer.ggml.pre` names; SentencePiece's BPE with byte fallback (`llama`); and WordPiece (`bert`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gguf

from cptquant.core.errors import ModelError
from cptquant.models.load import LoadedModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_GPT2_REGEX,): "gpt-2",
    (_LLAMA3_REGEX,): "llama-bpe",
    (_LLAMA3_REGEX.replace("{1,3}", ""),): "qwen2",
    ("digits", _GPT2_REGEX): "smollm",
}
"""How a pre-tokenizer cuts text, step by step -> its name in llama.cpp."""


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as llama.cpp wants it.

    Attributes:
        model: `gpt2`, `llama` or `bert`. pre: name of the pre-tokenizer, byte-level BPE only.
        tokens, types: one a row of the embedding. merges: byte-level BPE. scores: SentencePiece.
        special: `bos`, `eos`, `unknown`, `padding`, `seperator`, `cls`, `mask` -> id.
        flags: `add_bos_token` and the like. chat_template: if the model has one.
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    merges: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    special: dict[str, int] = field(default_factory=dict[str, int])
    flags: dict[str, bool] = field(default_factory=dict[str, bool])
    chat_template: str | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """All `tokenizer.*` keys."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token_id in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(model: LoadedModel) -> GgufVocabulary:
    """The model's tokenizer for llama.cpp.

    Raises:
        ModelError: no tokenizer.json, or a kind or pre-tokenizer that llama.cpp does not have.
    """
    path = model.path / "tokenizer.json"
    model.require_tokenizer()
    if not path.is_file():
        raise ModelError(
            f"{model.layout.source} has no tokenizer.json, from which the GGUF tokenizer is made; save it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kind = content["model"].get("type")
    rows = model.layout.vocabulary_size
    if kind == "WordPiece":
        base = _wordpiece(content, rows, path)
    elif kind == "BPE" and content["model"].get("byte_fallback"):
        base = _sentencepiece(content, rows)
    elif kind == "BPE":
        base = _byte_level(content, rows, path)
    else:
        raise ModelError(
            f"{path}: a tokenizer of kind {kind!r} cannot be written to GGUF here; byte-level BPE, SentencePiece BPE "
            "and WordPiece can"
        )
    base.special.update(_special_ids(model))
    base.flags.update(_flags(model))
    template = getattr(model.tokenizer, "chat_template", None)
    return base if not isinstance(template, str) else GgufVocabulary(**{**vars(base), "chat_template": template})


def _token_rows(content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every id's token and type; rows of the embedding without a token are unused."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [_UNUSED] * rows
    for token, index in cast(dict[str, int], content["model"]["vocab"]).items():
        if index < rows:
            tokens[index], types[index] = token, _NORMAL
    for added in content.get("added_tokens", []):
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, types


def _byte_level(content: dict[str, Any], rows: int, path: Path) -> GgufVocabulary:
    tokens, types = _token_rows(content, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    steps = tuple(_cuts(content.get("pre_tokenizer")))
    pre = PRE_TOKENIZERS.get(steps)
    if pre is None:
        raise ModelError(
            f"{path}: its pre-tokenizer cuts text by {list(steps)}, for which no name in llama.cpp is known here; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS.values()))}"
        )
    return GgufVocabulary("gpt2", tokens, types, pre=pre, merges=merges)


def _cuts(pre_tokenizer: dict[str, Any] | None) -> Iterator[str]:
    """The regular expressions by which a byte-level pre-tokenizer cuts text, in order."""
    if pre_tokenizer is None:
        return
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _cuts(part)
    elif kind == "Split":
        yield str(pre_tokenizer["pattern"].get("Regex", pre_tokenizer["pattern"].get("String")))
    elif kind == "Digits":
        yield "digits" if pre_tokenizer.get("individual_digits") else "runs of digits"
    elif kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            yield "a space in front of the text"
        if pre_tokenizer.get("use_regex", True):
            yield _GPT2_REGEX
    else:
        yield kind


def _sentencepiece(content: dict[str, Any], rows: int) -> GgufVocabulary:
    """SentencePiece's BPE: llama.cpp merges the pair whose result scores highest, so a score is minus the rank."""
    tokens, types = _token_rows(content, rows)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    lowest = float(len(ranks))
    scores = [-float(ranks[token]) if token in ranks else -lowest for token in tokens]
    unknown = content["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = _BYTE
        elif token == unknown:
            types[index] = _UNKNOWN
    prepends = any(
        part.get("type") in ("Prepend", "Metaspace") and part.get("prepend_scheme", "always") != "never"
        for part in _parts(content.get("normalizer"), content.get("pre_tokenizer"))
    )
    return GgufVocabulary("llama", tokens, types, pre="default", scores=scores, flags={"add_space_prefix": prepends})


def _parts(*roots: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    for root in roots:
        if root is None:
            continue
        yield root
        yield from _parts(*root.get("normalizers", ()), *root.get("pretokenizers", ()))


def _wordpiece(content: dict[str, Any], rows: int, path: Path) -> GgufVocabulary:
    """llama.cpp marks the beginnings of words instead of their continuations."""
    normalizer = content.get("normalizer") or {}
    lowers = normalizer.get("lowercase", False)
    strips = normalizer.get("strip_accents")
    if not lowers or strips is False:
        raise ModelError(
            f"{path}: llama.cpp's WordPiece lowers case and strips accents, this tokenizer has lowercase = {lowers}, "
            f"strip_accents = {strips}; its token ids would differ"
        )
    tokens, types = _token_rows(content, rows)
    prefix = content["model"].get("continuing_subword_prefix", "##")
    for index, token in enumerate(tokens):
        if types[index] == _NORMAL:
            tokens[index] = token[len(prefix) :] if token.startswith(prefix) else "\u2581" + token
    return GgufVocabulary("bert", tokens, types, pre="default")


def _special_ids(model: LoadedModel) -> dict[str, int]:
    tokenizer = model.require_tokenizer()
    config: Any = model.module.config
    wordpiece = model.layout.model_type == "bert"
    names: dict[str, Any] = {
        "bos": tokenizer.cls_token_id if wordpiece else tokenizer.bos_token_id,
        "eos": tokenizer.sep_token_id if wordpiece else tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "seperator": tokenizer.sep_token_id,
        "cls": tokenizer.cls_token_id,
        "mask": tokenizer.mask_token_id,
    }
    if names["bos"] is None and isinstance(getattr(config, "bos_token_id", None), int):
        names["bos"] = config.bos_token_id
    if names["eos"] is None and isinstance(getattr(config, "eos_token_id", None), int):
        names["eos"] = config.eos_token_id
    return {name: int(value) for name, value in names.items() if value is not None}


def _flags(model: LoadedModel) -> dict[str, bool]:
    """Whether encoding a text adds tokens at its ends, found out by encoding one."""
    tokenizer = model.require_tokenizer()
    plain = cast(list[int], tokenizer.encode("a", add_special_tokens=False))
    whole = cast(list[int], tokenizer.encode("a", add_special_tokens=True))
    front = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole[:1]
    added = len(whole) - len(plain)
    starts = added > 0 and whole[: len(plain)] != plain and bool(front)
    return {"add_bos_token": starts, "add_eos_token": added > 0 and whole[-len(plain) :] != plain}
