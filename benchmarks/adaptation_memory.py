"""Peak memory of reading the text of an adaptation: checked, held out, cleaned, tokenised, and every window read once.

    python benchmarks/adaptation_memory.py
    python benchmarks/adaptation_memory.py --source ../earlier/src --label "held in memory"   # another version

A domain text of drawn words in paragraphs is written for each size and read by `cptquant adapt`'s own text stage, in a
process of its own, with the embedded tokenizer. Peak: the kernel's high-water mark of the resident set (VmHWM, Linux).
It is taken before the text, after the stage, and after every window of the mixture was read in its order, which maps
the pages of the token file: those can be given back at any time, and are not counted as the process's own.
"""

import argparse
import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from results_file import FOLDER, write_results

MODEL = "embedded:opt-mini"
NAME = "adaptation_memory"


def write_text(path: Path, size_bytes: int) -> None:
    """Paragraphs of drawn words, a few of them frequent as in real text."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("etaoinshrdlucmfw", k=drawn.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size_bytes:
            written += file.write(" ".join(drawn.choices(words, weights, k=120)) + ".\n\n")


def read(path: Path, folder: Path) -> dict[str, Any]:
    """In a process of its own: the stage, and the peaks."""
    from cptquant.adaptation.methods import find_method
    from cptquant.core.adaptation import AdaptationRequest
    from cptquant.models.load import load_model
    from cptquant.stages.adapt_text import read_adaptation_text

    model = load_model(MODEL)
    model.require_tokenizer()("a first text")
    window = 64
    tokens = path.stat().st_size // 8
    request = AdaptationRequest(
        model=MODEL, domain=(str(path),), method="cpt", tokens=tokens, window=window, eval_sequences=64
    )
    start, began = peak_bytes(), time.perf_counter()
    streams = "folder" in inspect.signature(read_adaptation_text).parameters
    more: tuple[Path, ...] = (folder,) if streams else ()
    text = read_adaptation_text(model, request, find_method("cpt"), *more)  # type: ignore[call-arg]
    after, seconds = peak_bytes(), time.perf_counter() - began
    for index in range(len(text.mixture)):
        _ = text.mixture[index]
    return {
        "tokens": len(text.mixture.sources[0].tokens), "digest": text.mixture.digest, "start_bytes": start,
        "stage_bytes": after, "windows_bytes": peak_bytes(), "seconds": seconds,
    }  # fmt: skip


def peak_bytes() -> int:
    """High-water mark of this process's resident set."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no VmHWM; this benchmark needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 20, 80], help="megabytes of text")
    parser.add_argument("--source", default="", help="src folder of another version of cptquant")
    parser.add_argument("--label", default="streamed")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(read(*map(Path, args.child))))
        return
    path = FOLDER / f"{NAME}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    with tempfile.TemporaryDirectory() as place:
        for size in args.sizes:
            text = Path(place) / f"{size}.txt"
            write_text(text, size * 10**6)
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            if args.source:
                environment["PYTHONPATH"] = args.source
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(text), str(Path(place) / f"tokens-{size}")],
                capture_output=True, text=True, env=environment, check=True,
            )  # fmt: skip
            row = {"way": args.label, "text_mb": size, **json.loads(done.stdout.splitlines()[-1])}
            others = [each for each in found["rows"] if (each["way"], each["text_mb"]) != (args.label, size)]
            found = {"machine": describe_machine(), "rows": [*others, row]}
            write_results(NAME, found)
            text.unlink()
            grown = (row["stage_bytes"] - row["start_bytes"]) / 1e6
            start, windows = row["start_bytes"] / 1e6, row["windows_bytes"] / 1e6
            print(
                f"{args.label:>16} {size} MB {row['tokens']:,} tokens: {start:.0f} MB before, {grown:+.0f} MB for it,"
            )
            print(f"{'':>16} {windows:.0f} MB after all windows were read, {row['seconds']:.1f} s")


if __name__ == "__main__":
    main()
