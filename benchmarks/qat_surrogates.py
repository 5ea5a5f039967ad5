"""Do smooth surrogates of rounding and clamping help training on the grid? The experiment of arXiv 2410.10849.

    OMP_NUM_THREADS=1 python benchmarks/qat_surrogates.py                       # goes on where an earlier call stopped
    OMP_NUM_THREADS=1 python benchmarks/qat_surrogates.py --settings W2 --seeds 0

{straight-through, sigmoid with T = 4, 6, 8} x {hard clamp, soft clamp with three gates} on embedded:opt-mini from the
same GPTQ start, same text, steps and rates; three seeds of the order of the text. W2 and W3 are weights alone in groups
of 64; W4A8 trains with 8-bit activations, a step a token; the figures judge the weights. The rates were chosen for the
straight-through estimator with the hard clamp, on validation text (at most an advantage for the baseline); the page
reports test text. Writes results/qat_surrogates.json.
"""

import argparse
import json
import math
import statistics
from typing import Any

from machine import describe_machine
from recovery_lab import Start, start_row, train, training_text
from results_file import FOLDER, write_results

from cptquant.core.recovery import RecoveryRequest

SETTINGS: dict[str, tuple[str, int | None]] = {
    "W2": ("int2-g64", None),
    "W3": ("int3-g64", None),
    "W4A8": ("int4-g64", 8),
}
ROUNDINGS = {"STE": ("ste", 4.0), "sigmoid T=4": ("sigmoid", 4.0), "sigmoid T=6": ("sigmoid", 6.0),
             "sigmoid T=8": ("sigmoid", 8.0)}  # fmt: skip
CLAMPS = {"clamp": ("hard", "sigmoid", 4.0), "soft, phi": ("soft", "phi", 4.0),
          "soft, sigmoid 1": ("soft", "sigmoid", 1.0), "soft, sigmoid 4": ("soft", "sigmoid", 4.0)}  # fmt: skip
STEPS, BATCH, SEQUENCES = 60, 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--clamps", nargs="+", default=list(CLAMPS), choices=list(CLAMPS))
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=list(ROUNDINGS))
    args = parser.parse_args()
    path = FOLDER / "qat_surrogates.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in args.settings:
        fmt, activation_bits = SETTINGS[name]
        start = Start("embedded:opt-mini", fmt, "gptq")
        done = {(row["setting"], row["rounding"], row["clamp"], row["seed"]) for row in rows}
        if (name, "none", "none", 0) not in done:
            rows.append({"setting": name, "rounding": "none", "clamp": "none", "seed": 0, **start_row(start)})
        texts = training_text(start, SEQUENCES, 0, None)
        for seed in args.seeds:
            for rounding in args.roundings:
                for clamp in args.clamps:
                    if (name, rounding, clamp, seed) in done:
                        continue
                    request = make_request(rounding, clamp, seed, activation_bits)
                    row = train(start, request, texts, ("test",))
                    rows.append({"setting": name, "rounding": rounding, "clamp": clamp, "seed": seed, **row})
                    write_results(
                        "qat_surrogates", {"machine": describe_machine(), "summary": summarise(rows), "rows": rows}
                    )
                    print(name, rounding, clamp, seed, row["test"]["kl_nats_per_token"]["value"], flush=True)
    for line in summarise(rows):
        print(line)


def make_request(rounding: str, clamp: str, seed: int, activation_bits: int | None) -> RecoveryRequest:
    """One arm."""
    kind, sharpness = ROUNDINGS[rounding]
    limit, gate, beta = CLAMPS[clamp]
    return RecoveryRequest(
        method="qat", rounding=kind, sharpness=sharpness, clamp=limit, gate=gate, gate_beta=beta, steps=STEPS,
        batch_sequences=BATCH, seed=seed, activation_bits=activation_bits,
    )  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each setting and arm: mean over seeds, its standard error, and the paired difference to the baseline."""
    found: list[dict[str, Any]] = []
    arms = dict.fromkeys((row["setting"], row["rounding"], row["clamp"]) for row in rows)
    for setting, rounding, clamp in arms:
        mine = {r["seed"]: r for r in rows if (r["setting"], r["rounding"], r["clamp"]) == (setting, rounding, clamp)}
        base = {r["seed"]: r for r in rows if (r["setting"], r["rounding"], r["clamp"]) == (setting, "STE", "clamp")}
        entry: dict[str, Any] = {"setting": setting, "rounding": rounding, "clamp": clamp, "seeds": sorted(mine)}
        for name in ("kl_nats_per_token", "nll_increase_nats_per_token", "perplexity"):
            values = {seed: row["test"][name]["value"] for seed, row in mine.items()}
            entry[name] = mean_and_error(list(values.values()))
            paired = [values[seed] - base[seed]["test"][name]["value"] for seed in values if seed in base]
            if paired and rounding != "none":
                entry[f"{name}_minus_baseline"] = mean_and_error(paired)
        found.append(entry)
    return found


def mean_and_error(values: list[float]) -> dict[str, float | int | None]:
    """Over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "n": len(values)}


if __name__ == "__main__":
    main()
