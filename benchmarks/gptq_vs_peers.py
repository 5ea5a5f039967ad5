"""GPTQ of cptquant, llm-compressor and GPTQModel: same model, calibration tokens, bits and groups, one ruler.

    python benchmarks/gptq_vs_peers.py --llmcompressor-python VENV/bin/python --gptqmodel-python VENV/bin/python

Every contestant runs in a fresh process of its own interpreter; repeats are interleaved, so that whatever else the
machine does falls on all of them alike. Compared are the processor seconds of the GPTQ step alone (no import, loading
or saving; ours writes each finished block, GPTQModel packs as it goes) and the KL divergence from the original on
held-out text, by benchmarks/ruler.py, which uses nothing of cptquant. benchmarks/README.md says how to make the venvs.
"""

import argparse
import gzip
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_machine
from measured_process import run_measured
from results_file import SHARED, model_folder, write_results

SCRIPTS = Path(__file__).parent / "peers"
MODELS = ("reference-llama", "reference-opt", "embedded:opt-mini")
CALIBRATION_WINDOWS, TEST_WINDOWS, WINDOW_TOKENS = 128, 64, 256
LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Contestant:
    """A tool in one setting."""

    name: str
    script: str
    python: Path
    options: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What one contestant did in one case; `failure` says why there is nothing more."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: set[str] = field(default_factory=set)
    divergence: dict[str, Any] | None = None
    weight_bytes: int | None = None
    failure: str | None = None

    def summary(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "gptq_cpu_seconds": spread([run["gptq_cpu_seconds"] for run in self.runs]),
            "gptq_wall_seconds": spread([run["gptq_wall_seconds"] for run in self.runs]),
            "process_cpu_seconds": spread([run["process_cpu_seconds"] for run in self.runs]),
            "process_wall_seconds": spread([run["process_wall_seconds"] for run in self.runs]),
            "peak_memory_bytes": max((run["process_peak_memory_bytes"] for run in self.runs), default=None),
            "divergence": self.divergence,
            "weight_bytes": self.weight_bytes,
            "same_bits_in_every_run": len(self.checkpoints) == 1 if self.runs else None,
            "runs": len(self.runs),
            "recipe": self.runs[0]["recipe"] if self.runs else None,
            "versions": self.runs[0]["versions"] if self.runs else None,
            "threads": self.runs[0]["threads"] if self.runs else None,
            "failure": self.failure,
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and range."""
    if not values:
        return None
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    args = read_arguments()
    contestants = list_contestants(args)
    cases = [
        (model, int(bits), int(group))
        for model in args.models
        for bits, group in (case.split("-") for case in args.cases)
    ]
    content: dict[str, Any] = {
        "settings": {
            "calibration": f"{CALIBRATION_WINDOWS} windows of {WINDOW_TOKENS} tokens",
            "test": f"first {TEST_WINDOWS} windows of {WINDOW_TOKENS} tokens",
            "threads": args.threads,
            "peer_batch_size": args.peer_batch_size,
            "peer_dtype": args.peer_dtype,
            "repeats": args.repeats,
        },
        "machine": describe_machine(),
        "cases": [],
    }
    for model, bits, group in cases:
        if not divides(model_folder(model), group):
            print(f"{model} W{bits} g{group}: left out, {group} does not divide every row", flush=True)
            continue
        content["cases"].append(run_case(model, bits, group, contestants, args))
        content["machine"]["load_average_1_5_15_at_the_end"] = describe_machine()["load_average_1_5_15"]
        write_results(args.name, content)
    print_table(content)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor-python", type=Path, help="interpreter with llmcompressor; left out if absent")
    parser.add_argument("--gptqmodel-python", type=Path, help="interpreter with gptqmodel; left out if absent")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--cases", nargs="+", default=["4-64", "3-64", "4-128"], help="BITS-GROUP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="torch threads of all; each tool's own if absent")
    parser.add_argument("--peer-batch-size", type=int, default=8, help="calibration sequences at a time; theirs is 1")
    parser.add_argument("--peer-dtype", default="auto", help="dtype the peers load the model in; auto: as it is stored")
    parser.add_argument(
        "--variants", action="store_true", help="also the peers with their own clip search and ours without it"
    )
    parser.add_argument("--name", default="gptq_vs_peers", help="of the results file")
    return parser.parse_args()


def list_contestants(args: argparse.Namespace) -> list[Contestant]:
    """Ours first, then the peers whose interpreters were given."""
    batch = ("--batch-size", str(args.peer_batch_size), "--dtype", args.peer_dtype)
    found = [
        Contestant("cptquant", "cptquant_gptq.py", Path(sys.executable)),
        Contestant("cptquant, no descent", "cptquant_gptq.py", Path(sys.executable), ("--descent-rounds", "0")),
    ]
    peers = (("llm-compressor", "llmcompressor", args.llmcompressor_python),
             ("GPTQModel", "gptqmodel", args.gptqmodel_python))  # fmt: skip
    for name, script, python in peers:
        if python is None:
            print(f"{name} is left out: --{script}-python was not given", flush=True)
            continue
        # Not resolved: the interpreter of a venv is a link, and resolving it would leave the venv.
        found.append(Contestant(name, f"{script}_gptq.py", python.absolute(), batch))
        if args.variants:
            found.append(
                Contestant(f"{name}, clip search", f"{script}_gptq.py", python.absolute(), (*batch, "--clip-search"))
            )
    if args.variants:
        found.append(
            Contestant("cptquant, no clip search", "cptquant_gptq.py", Path(sys.executable), ("--no-clip-search",))
        )
    return found


def divides(folder: Path, group: int) -> bool:
    """Whether every row of the blocks' linear layers is a multiple of the group."""
    config = json.loads((folder / "config.json").read_text())
    widths = [config.get(name) for name in ("hidden_size", "intermediate_size", "ffn_dim")]
    return all(width % group == 0 for width in widths if width)


def read_text(model: str, split: str) -> str:
    """General English for the reference models; for embedded ones the package's own text, which they were made for."""
    if model.startswith("embedded:"):
        from cptquant.models.embedded import embedded_text_path

        name = {"train": "calibration", "test": "test"}[split]
        with gzip.open(embedded_text_path(name, labelled=False), "rt", encoding="utf-8") as file:
            return "\n\n".join(json.loads(line)["text"] for line in file)
    return (SHARED / "data" / "text" / "general" / f"{split}.txt").read_text(encoding="utf-8")


def run_case(
    model: str, bits: int, group: int, contestants: list[Contestant], args: argparse.Namespace
) -> dict[str, Any]:
    """All contestants and repeats of one model, width and group size."""
    from ruler import Ruler, cut_windows
    from safetensors.torch import save_file

    folder = model_folder(model)
    outcomes = {contestant.name: Outcome() for contestant in contestants}
    with tempfile.TemporaryDirectory() as work_name:
        work = Path(work_name)
        calibration = cut_windows(folder, read_text(model, "train"), CALIBRATION_WINDOWS, WINDOW_TOKENS)
        save_file({"input_ids": calibration}, work / "tokens.safetensors")
        for repeat in range(args.repeats):
            for place, contestant in enumerate(contestants):
                outcome = outcomes[contestant.name]
                if outcome.failure:
                    continue
                output = work / f"{place}-{repeat}"
                command = [
                    contestant.python, SCRIPTS / contestant.script, folder, work / "tokens.safetensors", bits, group,
                    output, *contestant.options, *(("--threads", args.threads) if args.threads else ()),
                ]  # fmt: skip
                run_once(command, output, outcome, args.threads)
                print_progress(model, bits, group, contestant.name, repeat, outcome)
        ruler = Ruler(folder, cut_windows(folder, read_text(model, "test"), TEST_WINDOWS, WINDOW_TOKENS))
        for place, contestant in enumerate(contestants):
            judge(ruler, work / f"{place}-0", outcomes[contestant.name])
    return {
        "model": model,
        "bits": bits,
        "group_size": group,
        "contestants": {name: outcome.summary() for name, outcome in outcomes.items()},
        "ours_over_theirs": compare(outcomes),
    }


def run_once(command: list[Any], output: Path, outcome: Outcome, threads: int | None) -> None:
    """One process; a failure is kept in the tool's own words."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    measured = run_measured(command, output.with_suffix(".log"), environment=environment, limit_seconds=LIMIT_SECONDS)
    lines = [line for line in measured.output.splitlines() if line.startswith("RESULT ")]
    if measured.return_code or not lines:
        said = [line.strip() for line in measured.output.splitlines() if line.strip()]
        outcome.failure = f"return code {measured.return_code}: {said[-1][:300] if said else 'no output'}"
        return
    outcome.runs.append(json.loads(lines[-1].removeprefix("RESULT ")))
    digest = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        digest.update(path.read_bytes())
    outcome.checkpoints.add(digest.hexdigest())


def judge(ruler: Any, folder: Path, outcome: Outcome) -> None:
    """KL of the first run's checkpoint, and its size on disk."""
    from ruler import decode_checkpoint

    if not outcome.runs:
        return
    outcome.weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        outcome.divergence = asdict(ruler.judge(decode_checkpoint(folder)))
    except (KeyError, ValueError) as error:
        outcome.failure = f"the checkpoint cannot be read: {error!r}"


def compare(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float | None]]:
    """Ratios of ours to each other contestant: below 1 is better."""
    ours = outcomes["cptquant"]
    ratios: dict[str, dict[str, float | None]] = {}
    for name, other in outcomes.items():
        if name == "cptquant" or not (ours.divergence and other.divergence):
            continue
        # Repeat by repeat: neighbours in time saw the same load.
        paired = [
            mine["gptq_cpu_seconds"] / theirs["gptq_cpu_seconds"]
            for mine, theirs in zip(ours.runs, other.runs, strict=False)
        ]
        ratios[name] = {
            "gptq_cpu_seconds": statistics.median(paired),
            "gptq_cpu_seconds_lowest": min(paired),
            "gptq_cpu_seconds_highest": max(paired),
            "kl": ours.divergence["kl_nats_per_token"] / other.divergence["kl_nats_per_token"],
        }
    return ratios


def print_progress(model: str, bits: int, group: int, name: str, repeat: int, outcome: Outcome) -> None:
    said = outcome.failure or f"gptq {outcome.runs[-1]['gptq_cpu_seconds']:.1f} CPU s"
    print(f"{model} W{bits} g{group} {name}, run {repeat + 1}: {said}", flush=True)


def print_table(content: dict[str, Any]) -> None:
    """One row a contestant and case."""
    print(
        "\n| model | format | tool | GPTQ CPU s (range) | process CPU s | peak MB | KL nats/token "
        "| ours/theirs CPU, KL |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in content["cases"]:
        where = f"{case['model']} | W{case['bits']} g{case['group_size']}"
        for name, row in case["contestants"].items():
            if row["divergence"] is None:
                print(f"| {where} | {name} | failed: {row['failure']} | | | | |")
                continue
            cpu, divergence = row["gptq_cpu_seconds"], row["divergence"]
            ratio = case["ours_over_theirs"].get(name)
            compared = f"{ratio['gptq_cpu_seconds']:.2f}, {ratio['kl']:.2f}" if ratio else ""
            print(
                f"| {where} | {name} | {cpu['median']:.1f} ({cpu['lowest']:.1f}–{cpu['highest']:.1f}) "
                f"| {row['process_cpu_seconds']['median']:.1f} | {row['peak_memory_bytes'] / 1e6:.0f} "
                f"| {divergence['kl_nats_per_token']:.5f} ± {divergence['stderr']:.5f} | {compared} |"
            )


if __name__ == "__main__":
    main()
