"""What a second local worker is worth: the same sweep on one and on two workers of Ray, everything included.

    python benchmarks/sweep_throughput.py --repeats 3

Each sweep has one size and six runs that continue the same base model, on general and law text of ../shared; wall time
is that of the command from its first task to its last file, Ray's own start told apart. Run it on an idle machine with
two cores or more; about 12 CPU minutes with three repeats. Writes results/sweep_throughput.json.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from results_file import SHARED, write_results

from cptquant.core.sweep import CorpusSpec, EvaluationSpec, PretrainSpec, SizeSpec, SweepPlan
from cptquant.stages.sweep import open_sweep, sweep_stage
from cptquant.stages.task_pool import Workers, import_ray, start_ray

TARGET = 1.6


def plan(tokens: int) -> SweepPlan:
    """Six runs of one size, as alike in length as runs are."""
    text = SHARED / "data/text"
    corpus = {
        name: CorpusSpec(train=(str(text / name / "train.txt"),), valid=str(text / name / "valid.txt"))
        for name in ("general", "law")
    }
    return SweepPlan(
        family=str(SHARED / "models/reference-llama"), sizes=(SizeSpec(name="S", hidden=128, layers=3),),
        pretrain=PretrainSpec(tokens=20_000), general=corpus["general"], domains={"law": corpus["law"]},
        ratios=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), tokens=tokens,
        evaluations=EvaluationSpec(count=3, first=tokens // 4, windows=32),
    )  # fmt: skip


def measure(wanted: SweepPlan, workers: int) -> dict[str, float]:
    """One sweep from nothing, its base model made before the clock starts."""
    output = Path(tempfile.mkdtemp()) / "sweep"
    chosen = Workers(count=workers)
    ray = import_ray(chosen)
    try:
        first = wanted.model_copy(update={"ratios": (0.5,), "evaluations": EvaluationSpec(count=1, windows=8),
                                          "tokens": 20_000})  # fmt: skip
        sweep_stage(open_sweep(first, output), output, Workers())  # base model, texts in the page cache
        setup = open_sweep(wanted, output)
        began = time.perf_counter()
        start_ray(ray, chosen)
        started = time.perf_counter()
        record = sweep_stage(setup, output, chosen)
        ended = time.perf_counter()
    finally:
        if ray.is_initialized():
            ray.shutdown()
        shutil.rmtree(output.parent, ignore_errors=True)
    busy = sum(task.wall_seconds or 0.0 for task in record.tasks if task.id in {run.id for run in record.runs})
    return {"ray_start_seconds": started - began, "sweep_seconds": ended - started, "task_seconds": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=120_000)
    choices = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for repeat in range(choices.repeats):
        for workers in (1, 2):
            rows.append({"repeat": repeat, "workers": workers, **measure(plan(choices.tokens), workers)})
            print(rows[-1], flush=True)
    seconds = {n: [row["sweep_seconds"] for row in rows if row["workers"] == n] for n in (1, 2)}
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    mean = sum(ratios) / len(ratios)
    spread = (
        math.sqrt(sum((r - mean) ** 2 for r in ratios) / (len(ratios) - 1) / len(ratios)) if len(ratios) > 1 else None
    )
    content = {
        "machine": describe_machine(), "runs": 6, "tokens": choices.tokens, "rows": rows, "throughput_ratio": mean,
        "stderr": spread, "n": len(ratios), "target": TARGET,
    }  # fmt: skip
    print(
        f"two workers against one: {mean:.2f} ± {spread or float('nan'):.2f}",
        write_results("sweep_throughput", content),
    )


if __name__ == "__main__":
    main()
