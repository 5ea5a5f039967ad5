"""What corrected columns (`int2-g64-c2`) cost in ONNX Runtime beside the codes alone: two ways to multiply them.

    python benchmarks/column_speed.py

`float`: gather, a float product, an addition (what is exported). `8 bits`: the gathered columns times their scales,
padded to a multiple of 16, through a second MatMulNBits with codes of 8 bits and scales of 1. One token, one thread,
random weights; `cold` walks through copies of the matrix that make 64 MB together. A round runs all graphs one after
another and a round's time is the least of its calls; reported are the median over rounds of the seconds and of the
ratio to the codes alone. Writes results/column_speed.json.
"""

from __future__ import annotations

import argparse
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
from results_file import write_results
from segment_speed import COLD_BYTES, random_weight

from cptquant.core.formats import QuantFormat
from cptquant.exporters.onnx.columns import columns_product
from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.packing.columns import ColumnCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, QuantizedWeight

SHAPES = ((512, 512), (2048, 2048))
NAMES = ("int2-g64", "int4-g64")
SHARES = (10, 20, 40)
WAYS = ("codes alone", "float", "8 bits")
_PADDING = 16


def random_columns(rows: int, columns: int, fmt: QuantFormat, seed: int) -> CorrectedWeight:
    """Codes, scales and a correction without a matrix behind them."""
    generator = torch.Generator().manual_seed(seed)
    base = random_weight(rows, columns, fmt.base, seed)
    assert isinstance(base, QuantizedWeight)
    count = fmt.column_count(columns)
    codes = torch.randint(-128, 128, (rows, count), generator=generator, dtype=torch.int8)
    numbers = torch.randperm(columns, generator=generator)[:count].sort().values
    return CorrectedWeight(fmt, base, ColumnCorrection(numbers, codes, torch.full((count,), 0.001).half()))


def eight_bit_product(graph: GraphBuilder, x: str, name: str, weight: CorrectedWeight) -> str:
    """The correction as a MatMulNBits of its own."""
    correction = weight.correction
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
            weight = random_columns(*shape, fmt, copy)
            if way == "codes alone":
                product = graph.block_product(x, f"w{copy}", weight.base)
            elif way == "float":
                assert isinstance(weight.correction, ColumnCorrection)
                product = columns_product(graph, x, f"w{copy}", weight.base, weight.correction)
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
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as work:
        sessions = {way: session(shape, fmt, way, copies, Path(work) / way) for way in WAYS}
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
        way: statistics.median(own / alone for own, alone in zip(values, seconds[WAYS[0]], strict=True))
        for way, values in seconds.items()
    }
    return {
        "shape": shape, "format": fmt.name, "cold": cold, "copies": copies,
        "microseconds": {way: 1e6 * statistics.median(values) for way, values in seconds.items()}, "ratios": ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-only", action="store_true", help="leave out the copies that come from memory")
    choices = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for name in NAMES:
            for share in SHARES:
                for cold in (False,) if choices.warm_only else (False, True):
                    rows.append(measure(shape, QuantFormat.parse(name).with_columns(share), choices.rounds, cold))
                    print(rows[-1], flush=True)
    print(write_results("column_speed", {"machine": describe_machine(), "rounds": choices.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
