"""A matrix in halves of 2 and 4 bits (`slim3-g64-halves`) in ONNX Runtime against uniform matrices of equal bytes.

    python benchmarks/segment_speed.py --threads 1 2

There is no product of 3 bits in ONNX Runtime, so a uniform matrix of as many bytes is the mean of the 2-bit and the
4-bit one: ratio = (t2 + t4) / 2 / t(halves). Each round runs all four graphs one after another; a round's time is the
median of its calls; reported are mean and standard error of the ratio over rounds. Random weights and activations;
`cold` walks through as many copies of the matrix as make 64 MB, so that weights come from memory as in a large model.
Writes results/segment_speed.json.
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

from cptquant.core.formats import QuantFormat
from cptquant.exporters.onnx.graph import GraphBuilder
from cptquant.exporters.onnx.segments import segment_product
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.packing.segments import SegmentedWeight

SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
FORMATS = ("int2-g64", "int4-g64", "slim3-g64-halves", "slim3-g64-sorted-halves")
COLD_BYTES = 64_000_000


def random_weight(rows: int, columns: int, fmt: QuantFormat, seed: int) -> QuantizedWeight | SegmentedWeight:
    """Codes and scales without a matrix behind them."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // 64
    scales = (torch.rand(rows, groups, generator=generator) * 0.01).half()
    if fmt.storage != "segments":
        half = 1 << (fmt.code_bits - 1)
        codes = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
        return QuantizedWeight(fmt, codes, scales)
    order = torch.randperm(groups, generator=generator)
    widths = torch.full((groups,), 2, dtype=torch.uint8)
    widths[order[: groups // 2]] = 4
    if fmt.sorted_columns:
        widths = widths.sort(descending=True).values
    half = (1 << (widths.long() - 1)).repeat_interleave(64)
    codes = (torch.rand(rows, columns, generator=generator) * 2 * half - half).floor().to(torch.int8)
    return SegmentedWeight(
        fmt, widths, codes, scales, order=torch.randperm(columns, generator=generator) if fmt.sorted_columns else None
    )


def session(shape: tuple[int, int], name: str, copies: int, threads: int, folder: Path) -> onnxruntime.InferenceSession:
    """y = sum over copies of x W_i'."""
    rows, columns = shape
    with open(folder / "m.data", "wb") as data:
        graph = GraphBuilder(data, "m.data", torch.float16)
        x, total = graph.input("x", TensorProto.FLOAT, ["batch", "tokens", columns]), ""
        for copy in range(copies):
            weight = random_weight(rows, columns, QuantFormat.parse(name), copy)
            if isinstance(weight, SegmentedWeight):
                product = segment_product(graph, x, f"w{copy}", weight)
            else:
                product = graph.block_product(x, f"w{copy}", weight)
            total = graph.node("Add", total, product) if total else product
        graph.output(total, "y", TensorProto.FLOAT, ["batch", "tokens", rows])
        onnx.save_model(graph.model({}), folder / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(folder / "m.onnx", options)


def measure(shape: tuple[int, int], tokens: int, threads: int, rounds: int, cold: bool) -> dict[str, Any]:
    """Seconds of one product by format, and the ratios."""
    copies = max(1, COLD_BYTES * 8 // (3 * shape[0] * shape[1])) if cold else 1
    x = {"x": np.random.default_rng(0).standard_normal((1, tokens, shape[1]), np.float32)}
    with tempfile.TemporaryDirectory() as work:
        sessions: dict[str, onnxruntime.InferenceSession] = {}
        for name in FORMATS:
            (folder := Path(work) / name).mkdir()
            sessions[name] = session(shape, name, copies, threads, folder)
        calls = {}
        for name, one in sessions.items():
            one.run(None, x)
            began = time.perf_counter()
            one.run(None, x)
            calls[name] = max(3, min(200, int(0.05 / (time.perf_counter() - began))))
        seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
        for _ in range(rounds):
            for name, one in sessions.items():
                times = []
                for _ in range(calls[name]):
                    began = time.perf_counter()
                    one.run(None, x)
                    times.append(time.perf_counter() - began)
                seconds[name].append(statistics.median(times) / copies)
    found: dict[str, Any] = {
        "shape": shape, "tokens": tokens, "threads": threads, "copies": copies,
        "microseconds": {name: 1e6 * statistics.mean(values) for name, values in seconds.items()},
    }  # fmt: skip
    for name in FORMATS[2:]:
        ratios = [
            (two + four) / 2 / own
            for two, four, own in zip(seconds["int2-g64"], seconds["int4-g64"], seconds[name], strict=True)
        ]
        found[name] = {"ratio": statistics.mean(ratios), "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    choices = parser.parse_args()
    rows = []
    for threads in choices.threads:
        for shape in SHAPES:
            for tokens, cold in ((1, False), (1, True), (128, False)):
                rows.append({"cold": cold, **measure(shape, tokens, threads, choices.rounds, cold)})
                print(rows[-1], flush=True)
    print(write_results("segment_speed", {"machine": describe_machine(), "rounds": choices.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
