"""Ours and AutoRound's mixed plans at equal bytes of the blocks' matrices: KL on held-out text, CPU seconds, memory.

    python benchmarks/peer_frontier.py --autoround-python VENV/bin/python [--models reference-llama] [--bits 2.5 3 4]

For each model and size AutoRound runs its best recipe (AutoScheme and SignRound), the bits of its codes and scales are
counted from what it wrote (its stored zero points of symmetric groups are not), and every recipe of ours gets that many
bytes. All calibrate on the same text, run one after another with the same threads, and are judged by `ruler.py`, which
uses nothing of cptquant. Finished cells are kept in build/peer_frontier and not run again.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptq_vs_peers import SCRIPTS, TEST_WINDOWS, WINDOW_TOKENS, read_text
from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from results_file import REPOSITORY, model_folder, write_results
from ruler import Ruler, cut_windows, decode_checkpoint

MODELS = ("reference-llama", "reference-opt", "embedded:opt-mini")
RECIPES = {"cptquant": ""}
SEQUENCES, TEXT_TOKENS = 128, 260
"""Texts have a few tokens more than a window: decoded and cut again, some come out shorter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoround-python", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5, 3, 3.5, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="NAME=FLAGS", help="one of ours more, e.g. rtn=--quantizer rtn"
    )
    args = parser.parse_args()
    recipes = RECIPES | dict(recipe.split("=", 1) for recipe in args.recipe)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        test = cut_windows(model_folder(model), read_text(model, "test"), TEST_WINDOWS, WINDOW_TOKENS)
        ruler = Ruler(model_folder(model), test)
        for bits in args.bits:
            work = REPOSITORY / "build" / "peer_frontier" / model.replace(":", "_") / f"{bits:g}"
            rows += run_case(Case(model, bits, work, ruler, args.threads), args.autoround_python.absolute(), recipes)
            write_results("peer_frontier", {"machine": describe_machine(), "recipes": recipes, "rows": rows})


@dataclass(frozen=True)
class Case:
    """One model at one of AutoRound's sizes."""

    model: str
    bits: float
    work: Path
    ruler: Ruler
    threads: int

    @property
    def folder(self) -> Path:
        """Of the original."""
        return model_folder(self.model)


def run_case(case: Case, python: Path, recipes: dict[str, str]) -> list[dict[str, Any]]:
    """AutoRound first, then every recipe of ours at its bytes."""
    case.work.mkdir(parents=True, exist_ok=True)
    write_texts(case)
    theirs = cell(case.work / "autoround.json", run_autoround, case, python)
    rows = [{"model": case.model, "tool": "AutoRound", **theirs}]
    for name, flags in recipes.items():
        path = case.work / f"{name.replace(' ', '_')}.json"
        rows.append({"model": case.model, "tool": name, **cell(path, run_ours, case, theirs["bits_per_weight"], flags)})
    for row in rows:
        print(
            f"{case.model} {case.bits:g}: {row['tool']} {row['bits_per_weight']:.4f} bpw, KL "
            f"{row['kl_nats_per_token']:.5f} ± {row['stderr']:.5f}, {row['cpu_seconds']:.0f} CPU s", flush=True,
        )  # fmt: skip
    return rows


def cell(path: Path, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """One tool's figures, from an earlier run where there was one."""
    if not path.exists():
        path.write_text(json.dumps(make(*arguments)))
    return json.loads(path.read_text())


def write_texts(case: Case) -> None:
    """The calibration text as AutoRound reads it and as ours does, and the text of our guard."""
    from transformers import AutoTokenizer

    text, tokenizer = read_text(case.model, "train"), AutoTokenizer.from_pretrained(case.folder)
    pieces = [tokenizer.decode(row) for row in cut_windows(case.folder, text, SEQUENCES, TEXT_TOKENS)]
    (case.work / "texts.json").write_text(json.dumps([{"text": piece} for piece in pieces]))
    (case.work / "calibration.txt").write_text("".join(pieces))
    (case.work / "guard.txt").write_text(text[-300_000:])


def run_autoround(case: Case, python: Path) -> dict[str, Any]:
    """AutoScheme and SignRound at an average width."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "out"
        command = [python, SCRIPTS / "autoround_scheme.py", case.folder, case.work / "texts.json", str(case.bits),
                   output, "--threads", str(case.threads)]  # fmt: skip
        measured = measure(command, Path(name) / "log", case.threads)
        (checkpoint,) = {path.parent for path in output.rglob("model.safetensors")}
        return judge(checkpoint, case.ruler, measured)


def run_ours(case: Case, bits: float, flags: str) -> dict[str, Any]:
    """`cptquant quantize` at no more bytes of codes and scales."""
    model = case.model if case.model.startswith("embedded:") else case.folder
    with tempfile.TemporaryDirectory() as name:
        command = [CPTQUANT, "quantize", model, "--budget", f"{bits - 5e-5:.4f}bpw@sites",
                   "--calibration", case.work / "calibration.txt", "--eval-text", case.work / "guard.txt",
                   "--output", Path(name) / "run", *shlex.split(flags)]  # fmt: skip
        measured = measure(command, Path(name) / "log", case.threads)
        return judge(Path(name) / "run" / "checkpoint", case.ruler, measured)


def measure(command: list[Any], log: Path, threads: int) -> dict[str, Any]:
    """A command that must succeed, and what it took."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    measured = run_measured(command, log, environment=environment)
    if measured.return_code:
        sys.exit(f"return code {measured.return_code}\n{measured.output[-3000:]}")
    return measured.figures()


def judge(checkpoint: Path, ruler: Ruler, measured: dict[str, Any]) -> dict[str, Any]:
    """KL, and bits of codes and 16-bit scales per weight of the quantized matrices."""
    weights = decode_checkpoint(checkpoint)
    found = asdict(ruler.judge(weights))
    return {
        "bits_per_weight": count_bits(checkpoint) / sum(weight.numel() for weight in weights.values()),
        "kl_nats_per_token": found["kl_nats_per_token"], "stderr": found["stderr"], "windows": found["windows"],
        **measured,
    }  # fmt: skip


def count_bits(checkpoint: Path) -> int:
    """Bits of packed codes and scales."""
    from safetensors import safe_open

    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith((".qweight", ".weight_packed", ".scales", ".weight_scale")):
                    tensor = file.get_tensor(name)
                    total += 8 * tensor.numel() * tensor.element_size()
    return total


if __name__ == "__main__":
    main()
