"""Wall time of `cptquant quantize embedded:opt-mini --budget 4bpw`, evaluation and report included.

    python benchmarks/end_to_end.py

Every run is a fresh process with a fresh run folder. The target is a median under 60 seconds on two cores.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from machine import describe_machine
from measured_process import CPTQUANT, run_measured
from rehearsal import stage_seconds
from results_file import write_results

LIMIT_SECONDS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:opt-mini")
    parser.add_argument("--budget", default="4bpw")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    machine, runs = describe_machine(), []
    for number in range(args.runs):
        with tempfile.TemporaryDirectory() as work:
            command = [
                CPTQUANT, "quantize", args.model, "--budget", args.budget,
                "--output", Path(work) / "run",
            ]  # fmt: skip
            measured = run_measured(command, Path(work) / "log", environment={"HF_HUB_OFFLINE": "1"})
            if measured.return_code:
                raise SystemExit(f"return code {measured.return_code}\n{measured.output[-3000:]}")
            runs.append({**measured.figures(), "stages": stage_seconds(Path(work) / "run")})
        print(f"run {number + 1}: {measured.wall_seconds:.1f} s wall, {measured.cpu_seconds:.1f} s CPU", flush=True)
    content = {
        "command": f"cptquant quantize {args.model} --budget {args.budget}",
        "machine": machine | {"load_average_1_5_15_at_the_end": describe_machine()["load_average_1_5_15"]},
        "wall_seconds_median": statistics.median(run["wall_seconds"] for run in runs),
        "wall_seconds_lowest": min(run["wall_seconds"] for run in runs),
        "wall_seconds_highest": max(run["wall_seconds"] for run in runs),
        "cpu_seconds_median": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "limit_wall_seconds": LIMIT_SECONDS,
        "runs": runs,
    }
    write_results("end_to_end", content)
    for stage in runs[-1]["stages"]:
        print(f"  {stage['file']:32} {stage['wall_seconds']:6.1f} s wall {stage['cpu_seconds']:6.1f} s CPU")
    print(
        f"median {content['wall_seconds_median']:.1f} s ({content['wall_seconds_lowest']:.1f} to "
        f"{content['wall_seconds_highest']:.1f}), {content['cpu_seconds_median']:.1f} s CPU; "
        f"target {LIMIT_SECONDS:.0f} s"
    )


if __name__ == "__main__":
    main()
