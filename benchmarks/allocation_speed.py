"""Time of the knapsack against HiGHS, on the same instances in one run.

    OMP_NUM_THREADS=1 python benchmarks/allocation_speed.py

Times are CPU seconds of this process, so that other work on the machine does not enter; both solvers run on one
thread. HiGHS is called through scipy.optimize.milp with mip_rel_gap = 0 and a time limit.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray
from results_file import write_results
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from cptquant.allocation.allocate import allocate
from cptquant.allocation.knapsack import Knapsack, solve_knapsack
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.sensitivity import Damage, SensitivityTable
from cptquant.core.targets import TARGETS

CODE_BITS = np.array([2, 3, 4, 5, 6, 7, 8, 16])
Instance = tuple[NDArray[np.int64], NDArray[np.float64]]


def transformer(rng: np.random.Generator, sites: int) -> Instance:
    """Seven matrices a block of two shapes, damage falling about fourfold per bit: what real tables look like."""
    weights = np.array([4096 * 4096] * 4 + [4096 * 11008] * 3)[np.arange(sites) % 7]
    return _quantized(weights, rng)


def many_shapes(rng: np.random.Generator, sites: int) -> Instance:
    """The same with a shape of its own for every matrix."""
    return _quantized(rng.integers(500, 5000, sites) * rng.integers(500, 5000, sites), rng)


def unrelated(rng: np.random.Generator, sites: int) -> Instance:
    """Sizes and damages drawn apart, damages over fourteen orders of magnitude."""
    sizes = np.sort(rng.integers(10_000, 10_000_000, (sites, 8)), axis=1)
    return sizes, -np.sort(-(10.0 ** rng.uniform(-12, 2, (sites, 8))), axis=1)


def nearly_linear(rng: np.random.Generator, sites: int) -> Instance:
    """Damage almost proportional to the bytes saved: the known hard case, which no measured table resembles."""
    sizes = np.sort(rng.integers(10_000, 1_000_000, (sites, 8)), axis=1)
    saved = sizes.max(axis=1)[:, None] - sizes
    return sizes, (saved + 1000.0 * (saved > 0)) / 1e6


def _quantized(weights: NDArray[np.int64], rng: np.random.Generator) -> Instance:
    scales = (weights[:, None] // 64 * 2 + 16) * (CODE_BITS < 16)
    sizes = weights[:, None] * CODE_BITS // 8 + scales
    fragility = 10.0 ** rng.uniform(-4, 1, (len(weights), 1))
    return sizes, fragility * 4.0**-CODE_BITS * rng.uniform(0.7, 1.3, sizes.shape)


def solve_with_highs(sizes: NDArray[np.int64], damages: NDArray[np.float64], limit: int, seconds: float) -> object:
    groups, width = sizes.shape
    return milp(
        damages.ravel() / damages.max(),
        constraints=[
            LinearConstraint(csr_array(kron(eye_array(groups), np.ones((1, width)))), 1, 1),
            LinearConstraint(csr_array(sizes.ravel()[None, :] / limit), ub=1),
        ],
        integrality=np.ones(groups * width),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "time_limit": seconds},
    )


def made_model(sites: int, rng: np.random.Generator) -> tuple[ModelLayout, SensitivityTable, tuple[QuantFormat, ...]]:
    """A layout and a table, to time the whole verb with its digests, notes and checks."""
    formats = tuple(QuantFormat.parse(f"int{bits}-g64") for bits in CODE_BITS[:-1])
    shapes = ([(1024, 1024)] * 4 + [(4096, 1024)] * 2 + [(1024, 4096)]) * (sites // 7 + 1)
    listed = tuple(
        Site(name=f"layers.{i // 7}.{i % 7}", out_features=rows, in_features=columns, block_index=i // 7)
        for i, (rows, columns) in enumerate(shapes[:sites])
    )
    parameters = sum(site.weight_count for site in listed)
    layout = ModelLayout(
        architecture="Made", model_type="made", task="causal_lm", source="made", source_digest="0",
        source_dtype="float16", storage_dtype="float16", source_bytes=2 * parameters, parameters=parameters,
        block_count=(sites - 1) // 7 + 1, hidden_size=1024, max_positions=None, vocabulary_size=0, sites=listed,
    )  # fmt: skip
    fragility = 10.0 ** rng.uniform(-4, 1, sites)
    damages = {
        site.name: {fmt.name: Damage(value=float(fragility[i] * 4.0**-fmt.code_bits)) for fmt in formats}
        for i, site in enumerate(listed)
    }
    return layout, SensitivityTable(method="made", unit="relative", damages=damages), formats


def cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "n": len(seconds)}


def compare(kind: Callable[..., Instance], sites: int, repeats: int, highs_seconds: float) -> dict[str, object]:
    rng = np.random.default_rng(0)
    ours: list[float] = []
    highs: list[float] = []
    proven = highs_proven = highs_over_limit = 0
    gaps: list[float] = []
    highs_excess: list[float] = []
    for _ in range(repeats):
        sizes, damages = kind(rng, sites)
        share = rng.uniform(0.1, 0.4)
        limit = int((1 - share) * sizes.min(axis=1).sum() + share * sizes.max(axis=1).sum())
        begin = time.process_time()
        columns, excess, _ = solve_knapsack(sizes, damages, limit)
        ours.append(time.process_time() - begin)
        value = float(damages[np.arange(sites), columns].sum())
        proven += excess == 0
        gaps.append(excess / value)
        if highs_seconds > 0:
            begin = time.process_time()
            answer = solve_with_highs(sizes, damages, limit, highs_seconds)
            highs.append(time.process_time() - begin)
            highs_proven += answer.status == 0
            if answer.x is not None:
                picked = answer.x.reshape(sizes.shape).argmax(axis=1)
                highs_over_limit += int(sizes[np.arange(sites), picked].sum()) > limit
                highs_excess.append(float(damages[np.arange(sites), picked].sum()) / value - 1)
    row: dict[str, object] = {
        "instance": kind.__name__, "sites": sites, "formats": 8, "knapsack_cpu_seconds": spread(ours),
        "proven_optimal": int(proven), "largest_gap": max(gaps),
    }  # fmt: skip
    if highs:
        row |= {
            "highs_cpu_seconds": spread(highs), "highs_proven_optimal": int(highs_proven),
            "highs_over_the_byte_limit": highs_over_limit,
            "highs_damage_over_ours_minus_1": {"min": min(highs_excess), "max": max(highs_excess)}
            if highs_excess else None,
        }  # fmt: skip
    return row


def whole_verb(repeats: int) -> dict[str, object]:
    layout, table, formats = made_model(1000, np.random.default_rng(0))

    def work() -> None:
        allocate(layout, table, Budget.parse("4bpw@sites"), TARGETS["transformers"], Knapsack(), formats=formats)

    return {"instance": "allocate, all of it", "sites": 1000, "formats": 8,
            "knapsack_cpu_seconds": spread([cpu_seconds(work) for _ in range(repeats)])}  # fmt: skip


def rows(repeats: int, highs_seconds: float) -> Iterator[dict[str, object]]:
    for sites in (100, 1000):
        for kind in (transformer, many_shapes, unrelated, nearly_linear):
            yield compare(kind, sites, repeats, highs_seconds)
    yield whole_verb(repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--highs-seconds", type=float, default=30.0, help="time limit of HiGHS per instance; 0: skip")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    for row in rows(options.repeats, options.highs_seconds):
        print(json.dumps(row), flush=True)
        results.append(row)
    print(write_results("allocation_speed", {"machine": describe_machine(), "rows": results}))


if __name__ == "__main__":
    main()
