"""Does `cptquant evaluate` agree with the ruler on what the peers wrote? One kept cell of each tool.

    python benchmarks/peers_check.py [--model reference-llama] [--cache build/peers] [--tools llm-compressor_GPTQ]

`evaluate` reads compressed-tensors folders as they are (llm-compressor's want the original's tokenizer files beside
them). What others wrote it refuses with the advice to save it dequantized: that is done here, in float32, and told by
"as". Both read the same 64 x 256 tokens. Writes results/peers_check.json.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptq_vs_peers import TEST_WINDOWS, WINDOW_TOKENS, read_text
from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from results_file import FOLDER, REPOSITORY, model_folder, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer
from written_weights import DENSE, find_checkpoint, read_written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference-llama")
    parser.add_argument("--tools", nargs="*", help="names of their folders in the cache (default: all)")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "build" / "peers")
    args = parser.parse_args()
    path = FOLDER / "peers_check.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for tool in sorted((args.cache / args.model.replace(":", "_")).iterdir()):
        cells = [cell for cell in sorted(tool.iterdir()) if (cell / "judged.json").exists() and (cell / "out").is_dir()]
        if cells and (not args.tools or tool.name in args.tools):
            rows = [row for row in rows if row["tool"] != tool.name] + [compare(args.model, cells[0])]
            print(json.dumps(rows[-1]), flush=True)
            content = {"machine": describe_machine(), "model": args.model, "windows": TEST_WINDOWS, "rows": rows}
            write_results("peers_check", content)


def readable_folder(model: str, output: Path, target: Path) -> str:
    """What `evaluate` can read, with a tokenizer, in `target`; returns how it is stored."""
    original, stored = model_folder(model), "dequantized"
    if not (output / DENSE).exists():
        folder = find_checkpoint(output)
        config = json.loads((folder / "config.json").read_text())
        if config["quantization_config"]["quant_method"] == "compressed-tensors":
            shutil.copytree(folder, target)
            stored = "written"
    if stored == "dequantized":
        changed = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        parameters = dict(changed.named_parameters())
        with torch.no_grad():
            for name, weight in read_written(output, set(parameters)).weights.items():
                parameters[name].copy_(weight)
        changed.save_pretrained(target)
    AutoTokenizer.from_pretrained(original).save_pretrained(target)
    return stored


def compare(model: str, cell: Path) -> dict[str, Any]:
    """KL by the two rulers."""
    row: dict[str, Any] = {"tool": cell.parent.name, "setting": cell.name}
    ruler = json.loads((cell / "judged.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "test.txt"
        text.write_text(read_text(model, "test"), encoding="utf-8")
        row["as"] = readable_folder(model, cell / "out", Path(work) / "folder")
        command = [
            CPTQUANT, "evaluate", Path(work) / "folder", "--original", model_folder(model),
            "--eval-text", text, "--eval-sequences", str(TEST_WINDOWS), "--sequence-length", str(WINDOW_TOKENS),
            "--output", Path(work) / "evaluation.json",
        ]  # fmt: skip
        measured = run_measured(command, Path(work) / "log", environment={"HF_HUB_OFFLINE": "1"})
        if measured.return_code:
            said = [line.strip() for line in measured.output.splitlines() if line.strip()]
            return row | {"failure": " ".join(said[-3:])[:300]}
        measured_values = json.loads((Path(work) / "evaluation.json").read_text())["measurements"]
    (found,) = [value for value in measured_values if value["name"] == "kl_nats_per_token"]
    return row | {
        "ruler": ruler["kl_nats_per_token"], "evaluate": found["value"],
        "relative_difference": found["value"] / ruler["kl_nats_per_token"] - 1,
    }  # fmt: skip


if __name__ == "__main__":
    main()
