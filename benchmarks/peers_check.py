"""Does `cptquant evaluate` agree with the ruler on what the peers wrote? One kept cell of each tool that it can load.

    python benchmarks/peers_check.py [--model reference-llama] [--cache build/peers]

`evaluate` loads another tool's folder through transformers, which decodes compressed-tensors itself and needs the
peer's own package for other formats; a folder that does not load is reported with the reason. Both read the same
64 x 256 tokens. Writes results/peers_check.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from gptq_vs_peers import TEST_WINDOWS, WINDOW_TOKENS, read_text
from measured_process import CPTQUANT, run_measured
from results_file import REPOSITORY, model_folder, write_results
from written_weights import DENSE, find_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference-llama")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "build" / "peers")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tool in sorted((args.cache / args.model.replace(":", "_")).iterdir()):
        cells = [cell for cell in sorted(tool.iterdir()) if (cell / "judged.json").exists() and loads(cell / "out")]
        if cells:
            rows.append(compare(args.model, cells[0]))
            print(json.dumps(rows[-1]), flush=True)
    write_results("peers_check", {"rows": rows})


def loads(output: Path) -> bool:
    """A checkpoint of some kind, not weights that only we read."""
    return output.is_dir() and not (output / DENSE).exists()


def compare(model: str, cell: Path) -> dict[str, Any]:
    """KL by the two rulers."""
    row = {"tool": cell.parent.name, "setting": cell.name}
    ruler = json.loads((cell / "judged.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "test.txt"
        text.write_text(read_text(model, "test"), encoding="utf-8")
        command = [
            CPTQUANT, "evaluate", find_checkpoint(cell / "out"), "--original", model_folder(model),
            "--eval-text", text, "--eval-sequences", str(TEST_WINDOWS), "--sequence-length", str(WINDOW_TOKENS),
            "--output", Path(work) / "evaluation",
        ]  # fmt: skip
        measured = run_measured(command, Path(work) / "log", environment={"HF_HUB_OFFLINE": "1"})
        if measured.return_code:
            said = [line.strip() for line in measured.output.splitlines() if line.strip()]
            return row | {"failure": " ".join(said[-3:])[:300]}
        (path,) = Path(work).rglob("evaluation.json")
        metrics = json.loads(path.read_text())["metrics"]
    (found,) = [metric for metric in metrics if metric["name"] == "kl_nats_per_token"]
    return row | {
        "ruler": ruler["kl_nats_per_token"], "evaluate": found["value"],
        "relative_difference": found["value"] / ruler["kl_nats_per_token"] - 1,
    }  # fmt: skip


if __name__ == "__main__":
    main()
