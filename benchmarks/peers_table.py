"""Every peer and ours on the same model and tokens, judged by one ruler: KL against bits, CPU seconds, peak memory.

    python benchmarks/peers_table.py --python autoround=VENV/bin/python gptqmodel=... [--models reference-llama]

Each peer runs in its own environment (benchmarks/README.md) with its documented best recipe, one process at a time and
the same number of threads. `ruler.py` judges the weights that were written; it uses nothing of cptquant. Finished cells
are kept in `--cache` and not run again. Writes results/peers.json, docs/peers.md and docs/peers.png (`--page` remakes
both pictures of what the results hold and runs nothing).
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from gptq_vs_peers import MODELS, TEST_WINDOWS, WINDOW_TOKENS, read_text
from machine import describe_machine
from measured_process import CPTQUANT
from peer_cells import Bench, Setting, Tool, cell_folder, measure_cell, peer_command
from peer_tools import TOOLS, applicable, write_calibration
from peers_page import is_ours, write_page
from results_file import FOLDER, REPOSITORY, model_folder, write_results
from ruler import Ruler, cut_windows

RECIPES = {
    "cptquant gptq": "--quantizer gptq --own-text 0",
    "cptquant gptq, own text": "--quantizer gptq --own-text 256",
    "cptquant block-ap": "--quantizer block-ap",  # the default of models of this size
    "cptquant kl-rounding": "--quantizer kl-rounding",
    "cptquant block-ap, low rank": "--quantizer block-ap --target torch",
    "cptquant kl-rounding, low rank": "--quantizer kl-rounding --target torch",
}
BUDGETS = (2.5, 3.0, 3.5, 4.0)


def main() -> None:
    args = read_arguments()
    if not args.page:
        pythons = dict(pair.split("=", 1) for pair in args.python)
        if strangers := [pair for pair in args.recipe if not is_ours(pair) or "=" not in pair]:
            sys.exit(f"--recipe {strangers[0]!r}: write NAME=FLAGS with a name that begins with cptquant")
        recipes = {name: RECIPES[name] for name in args.ours} | dict(pair.split("=", 1) for pair in args.recipe)
        for model in args.models:
            run_model(model, args, pythons, recipes)
    write_page()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], metavar="ENVIRONMENT=PATH", help="interpreters of the peers")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tools", nargs="*", default=[tool.name for tool in TOOLS], help="peers to run")
    parser.add_argument(
        "--ours", nargs="*", default=list(RECIPES), choices=list(RECIPES), help="recipes of ours to run"
    )
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="NAME=FLAGS", help="one of ours more, e.g. rtn=--quantizer rtn"
    )
    parser.add_argument("--settings", default="", metavar="REGEX", help="only the peers' settings whose label matches")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="bpw@sites of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / "build" / "peers", help="where cells are kept")
    parser.add_argument("--page", action="store_true", help="only remake the table and the picture")
    return parser.parse_args()


def run_model(model: str, args: argparse.Namespace, pythons: dict[str, str], recipes: dict[str, str]) -> None:
    """All cells of one model; the results file is written after each."""
    folder = model_folder(model)
    files = write_calibration(model, args.cache / model.replace(":", "_") / "calibration")
    ruler = Ruler(folder, cut_windows(folder, read_text(model, "test"), TEST_WINDOWS, WINDOW_TOKENS))
    bench = Bench(model, folder, args.cache, files, ruler, args.threads)
    for tool in TOOLS:
        if tool.name not in args.tools:
            continue
        for setting in (found for found in applicable(tool, folder) if re.search(args.settings, found.label)):
            keep_row(run_peer(tool, setting, bench, pythons))
    for name, flags in recipes.items():
        for budget in args.budgets:
            keep_row(run_ours(name, flags, budget, bench))


def run_peer(tool: Tool, setting: Setting, bench: Bench, pythons: dict[str, str]) -> dict[str, Any] | None:
    """One cell of a peer; None where neither an earlier run nor an interpreter is there."""
    python = pythons.get(tool.environment)
    cell = cell_folder(bench, tool.name, setting.label)
    if python is None and not (cell / "run.json").exists():
        return None
    # Not resolved: the interpreter of an environment is a link, and resolving it would leave the environment.
    command = peer_command(tool, setting, bench, Path(python or sys.executable).absolute(), cell / "out")
    return named(bench.model, tool.name, setting.label) | measure_cell(bench, cell, command)


def run_ours(name: str, flags: str, budget: float, bench: Bench) -> dict[str, Any]:
    """`cptquant quantize` at a budget of the blocks' matrices."""
    label = f"{budget:g} bpw@sites"
    cell = cell_folder(bench, f"{name} {flags}", label)  # other flags under the same name are another cell
    command = [
        CPTQUANT, "quantize", bench.model if bench.model.startswith("embedded:") else bench.folder,
        "--budget", f"{budget:g}bpw@sites", "--calibration", bench.calibration["text"],
        "--eval-text", bench.calibration["guard"], "--output", cell / "out", *shlex.split(flags),
    ]  # fmt: skip
    return named(bench.model, name, label) | {"flags": flags} | measure_cell(bench, cell, command)


def named(model: str, tool: str, setting: str) -> dict[str, Any]:
    """What a row is told by."""
    return {"model": model, "tool": tool, "setting": setting}


def keep_row(row: dict[str, Any] | None) -> None:
    """Into results/peers.json in the place of an earlier row of the same cell."""
    if row is None:
        return
    path = FOLDER / "peers.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = [old for old in content["rows"] if any(old[name] != row[name] for name in named("", "", ""))]
    write_results("peers", {"machine": describe_machine(), "rows": [*rows, row]})
    said = row.get("failure") or (
        f"{row['bits_per_weight']:.4f} bpw, KL {row['kl_nats_per_token']:.5f} ± {row['stderr']:.5f}"
    )
    print(f"{row['model']} | {row['tool']} | {row['setting']}: {said}, {row['cpu_seconds']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
