"""What a correction costs in ONNX Runtime beside the codes alone: columns (`int2-g64-c2`), low rank (`int2-g64-r4`).

    python benchmarks/correction_speed.py --kinds columns "low rank"

`float`: what is exported: a gather, a float product and an addition for columns; two thin float products and an
addition for low rank. `8 bits`, of columns: the gathered columns times their scales,
padded to a multiple of 16, through a second MatMulNBits with codes of 8 bits and scales of 1. One token, one thread,
random weights; `cold` walks through copies of the matrix that make 64 MB together. A round runs all graphs one after
another and a round's time is the least of its calls; reported are the median over rounds of the seconds and of the
ratio to the codes alone. Ranks are those that are offered for a model of that width. Writes
results/correction_speed.json; kinds that are not run again keep their rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from machine import describe_machine
from onnx import TensorProto
from results_file import FOLDER, write_results
from segment_speed import COLD_BYTES, random_weight

from cptquant.core.formats import QuantFormat
from cptquant.exporters.onnx.columns import columns_product
from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.exporters.onnx.low_rank import low_rank_product
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.low_rank import LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight

SHAPES = ((512, 512), (2048, 2048))
NAMES = ("int2-g64", "int4-g64")
SHARES = (10, 20, 40)
RANKS = {512: (1, 2, 4, 8), 1024: (2, 4, 8, 16), 2048: (4, 8, 16, 32), 4096: (8, 16, 32, 64)}
ALONE = "codes alone"
_PADDING = 16


def random_corrected(rows: int, columns: int, fmt: QuantFormat, seed: int) -> CorrectedWeight:
    """Codes, scales and a correction without a matrix behind them."""
    generator = torch.Generator().manual_seed(seed)
    base = random_weight(rows, columns, fmt.base, seed)
    assert isinstance(base, QuantizedWeight)
    if fmt.storage == "low-rank":
        left, right = (
            torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
            for size in ((rows, fmt.rank), (fmt.rank, columns))
        )
        return CorrectedWeight(fmt, base, LowRankCorrection(left, right, torch.full((fmt.rank,), 0.001).half()))
    count = fmt.column_count(columns)
    codes = torch.randint(-128, 128, (rows, count), generator=generator, dtype=torch.int8)
    numbers = torch.randperm(columns, generator=generator)[:count].sort().values
    return CorrectedWeight(fmt, base, ColumnCorrection(numbers, codes, torch.full((count,), 0.001).half()))


def float_product(graph: GraphBuilder, x: str, name: str, weight: CorrectedWeight) -> str:
    """As it is exported."""
    correction = weight.correction
    if isinstance(correction, LowRankCorrection):
        return low_rank_product(graph, x, name, weight.base, correction)
    return columns_product(graph, x, name, weight.base, correction)


def eight_bit_product(graph: GraphBuilder, x: str, name: str, weight: CorrectedWeight) -> str:
    """The corrected columns as a MatMulNBits of their own."""
    correction = weight.correction
    assert isinstance(correction, ColumnCorrection)
    count = len(correction.columns)
    padded = -(-count // _PADDING) * _PADDING
    codes = torch.nn.functional.pad(correction.codes, (0, padded - count))
    numbers = torch.nn.functional.pad(correction.columns, (0, padded - count)).numpy()
    scales = torch.nn.functional.pad(correction.scales.float(), (0, padded - count)).numpy()
    ones = torch.ones(len(codes), padded // _PADDING, dtype=torch.float16)
    fmt = QuantFormat(code_bits=8, granularity=_PADDING)
    chosen = graph.node("Gather", x, graph.constant(numbers), axis=-1)
    scaled = graph.node("Mul", chosen, graph.constant(scales))
    product = graph.block_product(scaled, f"{name}.correction", QuantizedWeight(fmt, codes, ones))
    return graph.node("Add", graph.block_product(x, name, weight.base), product)


def session(shape: tuple[int, int], fmt: QuantFormat, way: str, copies: int, folder: Path) -> Any:
    """y = sum over copies of x W_i'."""
    folder.mkdir()
    with open(folder / "m.data", "wb") as data:
        graph = GraphBuilder(data, "m.data", torch.float16)
        x, total = graph.input("x", TensorProto.FLOAT, ["batch", "tokens", shape[1]]), ""
        for copy in range(copies):
            weight = random_corrected(*shape, fmt, copy)
            if way == ALONE:
                product = graph.block_product(x, f"w{copy}", weight.base)
            elif way == "float":
                product = float_product(graph, x, f"w{copy}", weight)
            else:
                product = eight_bit_product(graph, x, f"w{copy}", weight)
            total = graph.node("Add", total, product) if total else product
        graph.output(total, "y", TensorProto.FLOAT, ["batch", "tokens", shape[0]])
        onnx.save_model(graph.model({}), folder / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "m.onnx", options)


def measure(shape: tuple[int, int], fmt: QuantFormat, rounds: int, cold: bool) -> dict[str, Any]:
    """Seconds of one product by way, and the ratios to the codes alone."""
    copies = max(1, COLD_BYTES * 8 // (fmt.code_bits * shape[0] * shape[1])) if cold else 1
    x = {"x": np.random.default_rng(0).standard_normal((1, 1, shape[1]), np.float32)}
    ways = (ALONE, "float", "8 bits") if fmt.storage == "columns" else (ALONE, "float")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as work:
        sessions = {way: session(shape, fmt, way, copies, Path(work) / way) for way in ways}
        calls = 3 if cold else 30
        for _ in range(rounds):
            for way, one in sessions.items():
                times: list[float] = []
                for _ in range(calls):
                    began = time.perf_counter()
                    one.run(None, x)
                    times.append(time.perf_counter() - began)
                seconds[way].append(min(times) / copies)
    ratios = {
        way: statistics.median(own / alone for own, alone in zip(values, seconds[ALONE], strict=True))
        for way, values in seconds.items()
    }
    return {
        "shape": shape, "format": fmt.name, "cold": cold, "copies": copies,
        "microseconds": {way: 1e6 * statistics.median(values) for way, values in seconds.items()}, "ratios": ratios,
    }  # fmt: skip


KINDS: dict[str, list[tuple[tuple[int, int], QuantFormat]]] = {
    "columns": [(s, QuantFormat.parse(name).with_columns(share)) for s in SHAPES for name in NAMES for share in SHARES],
    "low rank": [
        ((side, side), QuantFormat.parse(f"{name}-r{rank}")) for side, ranks in RANKS.items() for name in NAMES
        for rank in ranks
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-only", action="store_true", help="leave out the copies that come from memory")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    choices = parser.parse_args()
    path = FOLDER / "correction_speed.json"
    content = json.loads(path.read_text()) if path.exists() else {"kinds": {}}
    for kind in choices.kinds:
        rows: list[dict[str, Any]] = []
        for shape, fmt in KINDS[kind]:
            for cold in (False,) if choices.warm_only else (False, True):
                rows.append(measure(shape, fmt, choices.rounds, cold))
                print(rows[-1], flush=True)
        content["kinds"][kind] = {"machine": describe_machine(), "rounds": choices.rounds, "rows": rows}
        write_results("correction_speed", content)


if __name__ == "__main__":
    main()
