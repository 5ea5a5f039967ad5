"""Train the embedded classifier ``bert-mini``: from which package does a snippet come?

    python runs/train_bert_mini.py --minutes 33 --output bert-mini
    python runs/train_bert_mini.py --continue-from bert-mini --minutes 11 --rate 5e-4 \\
        --output bert-mini-2
    python runs/train_bert_mini.py --evaluate src/cptquant/models/embedded_data/bert-mini

Masked-language-model training on the whole train split, then fine-tuning on snippets of the ten
label packages, once for each learning rate of ``FINE_RATES``; the validation accuracy chooses.
``--evaluate`` also fits the TF-IDF + logistic-regression baseline on the same train modules.

Hardware and time: one thread of an AMD EPYC (Zen 5, avx512_bf16) with bfloat16 autocast, shared
with other work; the shipped model took 35 and then 11 minutes on the clock (about 15 of CPU time).
The schedules follow the clock: a slower machine takes fewer steps, but always ends annealed;
``training.json`` in the output folder states what a run took.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from embedded_text import (
    LABELS,
    SNIPPET_CHARS,
    SNIPPET_LINES,
    Document,
    build_corpus,
    classification_records,
    hide_label,
    select,
    snippets,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

SEED = 21
VOCABULARY, HIDDEN, BLOCKS, HEADS, LENGTH = 4096, 128, 6, 4, 128
PRETRAIN_PART = 0.64
PRETRAIN_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.05, 0.1
FINE_RATES = (3e-4, 1e-3)
ROWS, MASKED, DROPOUT, SMOOTHING, TOKEN_DROP = 32, 0.2, 0.1, 0.1, 0.1
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A cased WordPiece tokenizer that splits at spaces and punctuation, as BERT's does.

    Its trainer breaks ties at random: two runs differed in 6 of the 4096 entries.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, limit_alphabet=160, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_config(vocabulary: int) -> BertConfig:
    """The architecture, with the labels' names in the config."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        problem_type="single_label_classification",
        attn_implementation="eager",
    )


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)


class Clock:
    """Wall-clock budget with warm-up and a linear decay to zero."""

    def __init__(self, minutes: float, peak: float) -> None:
        self.start, self.seconds, self.peak = time.monotonic(), 60 * minutes, peak

    def part(self) -> float:
        """The part of the budget that has passed."""
        return (time.monotonic() - self.start) / self.seconds

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        """One optimizer step at the rate of this moment."""
        part = self.part()
        for group in optimizer.param_groups:
            group["lr"] = self.peak * min(part / WARM_UP, max(0.0, (1 - part) / (1 - WARM_UP)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def masked_batch(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay."""
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids >= len(SPECIAL))
    how = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), VOCABULARY, ids.shape, generator=generator)
    inputs = torch.where(chosen & (how < 0.8), torch.tensor(4), ids)
    return torch.where(chosen & (how >= 0.9), noise, inputs), chosen


def pretrain(config: BertConfig, flat: torch.Tensor, minutes: float) -> tuple[BertForMaskedLM, int]:
    """Masked-language-model training on ``flat``, cut at random into sequences."""
    generator = torch.Generator().manual_seed(SEED)
    model = BertForMaskedLM(config).train()
    optimizer, clock, steps, running = make_optimizer(model), Clock(minutes, PRETRAIN_RATE), 0, 0.0
    body = LENGTH - 2
    ends = torch.tensor([2]).expand(ROWS, 1), torch.tensor([3]).expand(ROWS, 1)
    while clock.part() < 1:
        starts = torch.randint(0, len(flat) - body, (ROWS,), generator=generator).tolist()
        rows = torch.cat([ends[0], torch.stack([flat[s : s + body] for s in starts]), ends[1]], 1)
        inputs, chosen = masked_batch(rows, generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.bert(input_ids=inputs).last_hidden_state[chosen]
            logits = model.cls(hidden)
        loss = functional.cross_entropy(logits.float(), rows[chosen])
        clock.step(model, optimizer, loss)
        steps += 1
        running = loss.item() if steps == 1 else 0.98 * running + 0.02 * loss.item()
        if steps % 200 == 0:
            print(f"mlm {clock.part():.3f} step {steps} loss {running:.4f}", flush=True)
    return model, steps


class SnippetSampler:
    """Random snippets of the train modules, starting at any line, as the shipped ones are made."""

    def __init__(self, documents: list[Document], tokenizer: Any, dropped: float = 0.0) -> None:
        self.random, self.sources, self.dropped = random.Random(SEED), [], dropped
        for document in documents:
            lines = [x.rstrip() for x in hide_label(document.text).splitlines()]
            lines = [x for x in lines if x.strip()]
            if document.label and len(lines) >= SNIPPET_LINES[0]:
                ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
                self.sources.append((ids, [len(x) + 1 for x in lines], LABELS.index(document.label)))
        self.weights = [len(ids) for ids, _, _ in self.sources]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, attention mask and labels of ``ROWS`` snippets."""
        rows, labels = [], []
        for ids, sizes, label in self.random.choices(self.sources, self.weights, k=ROWS):
            first = self.random.randrange(len(ids) - SNIPPET_LINES[0] + 1)
            last = min(len(ids), first + self.random.randint(*SNIPPET_LINES))
            while last - first > SNIPPET_LINES[0] and sum(sizes[first:last]) > SNIPPET_CHARS:
                last -= 1
            tokens = [t for line in ids[first:last] for t in line]
            if self.dropped:  # so that no single identifier of a module decides
                tokens = [4 if self.random.random() < self.dropped else t for t in tokens]
            rows.append([2, *tokens[: LENGTH - 2], 3])
            labels.append(label)
        width = max(map(len, rows))
        inputs = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        return inputs, (inputs != 0).long(), torch.tensor(labels)


def fine_tune(model: torch.nn.Module, sampler: SnippetSampler, minutes: float, peak: float) -> int:
    """Train a classifier with dropout and label smoothing; the number of steps that it took."""
    model.train()
    optimizer, clock, steps, running = make_optimizer(model), Clock(minutes, peak), 0, 0.0
    while clock.part() < 1:
        inputs, mask, labels = sampler.batch()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, attention_mask=mask).logits
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        clock.step(model, optimizer, loss)
        steps += 1
        running = loss.item() if steps == 1 else 0.98 * running + 0.02 * loss.item()
        if steps % 200 == 0:
            print(f"fine {peak} {clock.part():.3f} step {steps} loss {running:.4f}", flush=True)
    model.eval()
    return steps


def classifier(base: BertForMaskedLM) -> BertForSequenceClassification:
    """A classifier on a copy of the pre-trained blocks."""
    torch.manual_seed(SEED)
    config = copy.deepcopy(base.config)
    config.hidden_dropout_prob = DROPOUT  # dropout of attention would double the time of a step here
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(base.bert.state_dict(), strict=False)
    return model


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, output: Path, facts: Any) -> None:
    """Write float16 weights, config and tokenizer; each file is replaced in one move."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        folder = Path(name)
        half: Any = copy.deepcopy(model).half()
        half.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"  # name the class that transformers 4 and 5 both know
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("backend", None)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
            os.replace(file, output / file.name)


def predictions(model: torch.nn.Module, tokenizer: Any, texts: list[str]) -> list[str]:
    """The predicted label of each text."""
    found: list[str] = []
    for at in range(0, len(texts), 64):
        some = texts[at : at + 64]
        batch = tokenizer(some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found.extend(LABELS[i] for i in logits.argmax(-1).tolist())
    return found


def accuracy(found: list[str], records: list[dict[str, str]]) -> dict[str, float | int]:
    """Accuracy with its standard error: over snippets as if independent, and over whole modules."""
    right = [float(f == r["label"]) for f, r in zip(found, records, strict=True)]
    n, mean = len(right), sum(right) / len(right)
    modules: dict[str, float] = defaultdict(float)
    for value, record in zip(right, records, strict=True):
        modules[record["module"]] += value - mean
    m = len(modules)
    clustered = math.sqrt(sum(x * x for x in modules.values()) * m / (m - 1)) / n
    simple = math.sqrt(mean * (1 - mean) / n)
    numbers = {"accuracy": mean, "stderr": simple, "stderr_over_modules": clustered}
    return {"n": n, "modules": m, **{k: round(v, 4) for k, v in numbers.items()}}


def train(minutes: float, output: Path) -> None:
    """Pre-train, fine-tune at each rate, keep the best on validation, and save it."""
    torch.manual_seed(SEED)
    corpus = build_corpus()
    documents = select(corpus, "train")
    texts = [hide_label(d.text) for d in documents]
    tokenizer = train_tokenizer(texts)
    coded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    flat = torch.tensor([t for ids in coded for t in (*ids, 3)])
    config = new_config(len(tokenizer))
    facts: dict[str, Any] = {"seed": SEED, "planned_minutes": minutes, "train_tokens": len(flat)}
    save(BertForSequenceClassification(config), tokenizer, output, facts)
    start = time.monotonic()
    base, steps = pretrain(config, flat, minutes * PRETRAIN_PART)
    facts["pretrain"] = {"steps": steps, "tokens": steps * ROWS * LENGTH}
    held_out = classification_records(corpus, "validation")
    best = -1.0
    for peak in FINE_RATES:
        sampler = SnippetSampler(documents, tokenizer)
        model = classifier(base)
        steps = fine_tune(model, sampler, minutes * (1 - PRETRAIN_PART) / len(FINE_RATES), peak)
        score = accuracy(predictions(model, tokenizer, [r["text"] for r in held_out]), held_out)
        facts[f"fine_tune_{peak}"] = {"steps": steps, "snippets": steps * ROWS, "validation": score}
        print(json.dumps(facts), flush=True)
        facts["minutes"] = round((time.monotonic() - start) / 60, 1)
        if score["accuracy"] > best:
            best, facts["chosen_rate"] = float(score["accuracy"]), peak
            save(model, tokenizer, output, facts)
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def continue_tuning(source: Path, minutes: float, peak: float, output: Path) -> None:
    """Fine-tune a saved classifier further with dropped tokens; keep it only if validation gains."""
    torch.manual_seed(SEED)
    corpus = build_corpus()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    model.set_attn_implementation("eager")
    held_out = classification_records(corpus, "validation")
    texts = [r["text"] for r in held_out]
    before = accuracy(predictions(model.eval(), tokenizer, texts), held_out)
    sampler = SnippetSampler(select(corpus, "train"), tokenizer, TOKEN_DROP)
    steps = fine_tune(model, sampler, minutes, peak)
    after = accuracy(predictions(model, tokenizer, texts), held_out)
    facts = json.loads((source / "training.json").read_text(encoding="utf-8"))
    kept = after["accuracy"] > before["accuracy"]
    numbers = {"minutes": minutes, "rate": peak, "steps": steps, "snippets": steps * ROWS, "kept": kept}
    facts["continued"] = {**numbers, "validation_before": before, "validation": after}
    print(json.dumps(facts), flush=True)
    best = model if kept else AutoModelForSequenceClassification.from_pretrained(source)
    save(best, tokenizer, output, facts)


def baseline(corpus: list[Document]) -> dict[str, Any]:
    """TF-IDF + logistic regression on snippets of the same train modules, tuned on validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = [r for d in corpus if d.split == "train" for offset in (0, 4) for r in snippets(d, offset)]
    sets = {s: classification_records(corpus, s) for s in ("validation", "test")}
    kinds: dict[str, dict[str, Any]] = {
        "words": {"token_pattern": r"\w+", "ngram_range": (1, 2)},
        "word_parts": {"token_pattern": r"[A-Za-z0-9]+|[^\w\s]", "ngram_range": (1, 2), "lowercase": False},
        "characters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
    }
    best: dict[str, Any] = {"validation": {"accuracy": -1.0}}
    for kind, options in kinds.items():
        vectors = TfidfVectorizer(sublinear_tf=True, min_df=2, **options)
        table = vectors.fit_transform([r["text"] for r in rows])
        held_out = {s: vectors.transform([r["text"] for r in records]) for s, records in sets.items()}
        for strength in (3.0, 10.0, 30.0, 100.0):
            model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
            model.fit(table, [r["label"] for r in rows])
            score = accuracy(list(model.predict(held_out["validation"])), sets["validation"])
            print(kind, strength, score, flush=True)
            if score["accuracy"] > best["validation"]["accuracy"]:
                tested = accuracy(list(model.predict(held_out["test"])), sets["test"])
                best = {"features": kind, "C": strength, "validation": score, "test": tested}
    return {"train_snippets": len(rows), **best}


def evaluate(folder: Path) -> dict[str, Any]:
    """The figures of a saved model: its float16 weights, run in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    corpus = build_corpus()
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for split in ("validation", "test"):
        records = classification_records(corpus, split)
        figures[split] = accuracy(predictions(model, tokenizer, [r["text"] for r in records]), records)
    train_labels = Counter(d.label for d in corpus if d.split == "train" and d.label for _ in snippets(d))
    majority = max(train_labels, key=lambda x: train_labels[x])
    records = classification_records(corpus, "test")
    figures["majority"] = {"label": majority, "test": accuracy([majority] * len(records), records)}
    return figures


def main() -> None:
    """Train or, with ``--evaluate``, measure beside the baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=Path("bert-mini"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--continue-from", type=Path, default=None, help="fine-tune this classifier further")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate with --continue-from")
    parser.add_argument("--evaluate", type=Path, default=None, help="measure this folder and train nothing")
    parser.add_argument("--no-baseline", action="store_true", help="leave out TF-IDF + logistic regression")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.continue_from is not None:
        continue_tuning(options.continue_from, options.minutes, options.rate, options.output)
    elif options.evaluate is None:
        train(options.minutes, options.output)
    figures = evaluate(options.evaluate or options.output)
    if not options.no_baseline:
        figures["tfidf_logistic_regression"] = baseline(build_corpus())
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
