"""Our GPTQ loop against the textbook one, on matrices of real shapes: processor seconds and output error.

    OMP_NUM_THREADS=2 python benchmarks/gptq_speed.py [--small]

The textbook loop is written here from the paper's algorithm 1 (blocks of 128 columns, H inverted and factored again,
min-max scales on entering a group). It has no clip search, no descent and no choice of sign, so the errors show what
those bring, and the first of our settings, without them, what the same answer costs. Whole tools are compared by
gptq_vs_peers.py.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from machine import describe_machine
from results_file import write_results
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.quantizers.gptq import Gptq, relative_output_error

SHAPES = {"OPT-125M q, k, v": (2304, 768), "OPT-125M fc2": (768, 3072), "Qwen3-0.6B gate, up": (6144, 1024)}
SMALL_SHAPES = {"reference-llama gate, up": (1408, 256), "reference-llama down": (256, 704)}
SETTINGS = {
    "ours, no search, no descent": Gptq(clip_search=False, diagonal_importance=False, descent_rounds=0),
    "ours, no descent": Gptq(descent_rounds=0),
    "ours": Gptq(),
}


def make_problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random weight and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns // 4, generator=generator) @ mixing / (columns // 4) ** 0.5
    inputs = (inputs + 0.3 * torch.randn(inputs.shape, generator=generator)) * (
        torch.rand(columns, generator=generator) + 0.2
    )
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / len(inputs)


def textbook_gptq(weight: Tensor, hessian: Tensor, fmt: QuantFormat, damping: float = 0.01) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with groups; returns the dequantized weight."""
    group, block = int(fmt.granularity), 128
    low, high = -(2 ** (fmt.code_bits - 1)), 2 ** (fmt.code_bits - 1) - 1
    weight, values = weight.clone(), torch.empty_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scale = torch.ones(weight.shape[0])
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.zeros(weight.shape[0], stop - start)
        for column in range(start, stop):
            if column % group == 0:
                scale = (weight[:, column : column + group].abs().amax(dim=1) / (high + 0.5)).half().float()
            current = weight[:, column]
            values[:, column] = (current / scale).round().clamp(low, high) * scale
            errors[:, column - start] = (current - values[:, column]) / upper[column, column]
            weight[:, column:stop] -= (
                errors[:, column - start : column - start + 1] @ upper[column : column + 1, column:stop]
            )
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return values


def measure(run: Callable[[], Tensor], repeats: int = 3) -> tuple[float, Tensor]:
    """Least processor seconds of some repeats, and the result."""
    best, values = float("inf"), run()
    for _ in range(repeats):
        begin = time.process_time()
        values = run()
        best = min(best, time.process_time() - begin)
    return best, values


def compare(weight: Tensor, hessian: Tensor, fmt: QuantFormat) -> Iterator[tuple[str, float, float | None]]:
    """Method, processor seconds and relative output error of the textbook loop and of our settings."""
    contestants: dict[str, Callable[[], Tensor]] = {"textbook": lambda: textbook_gptq(weight, hessian, fmt)}
    for name, gptq in SETTINGS.items():
        contestants[name] = lambda gptq=gptq: gptq(weight, hessian, fmt, torch.float16).weight.dequantize()
    for name, run in contestants.items():
        seconds, values = measure(run)
        yield name, seconds, relative_output_error((values - weight).t(), weight.t(), hessian)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes only")
    small = parser.parse_args().small
    table: list[dict[str, object]] = []
    for label, (rows, columns) in (SMALL_SHAPES if small else {**SMALL_SHAPES, **SHAPES}).items():
        weight, hessian = make_problem(rows, columns)
        for bits in (2, 4):
            fmt = QuantFormat(code_bits=bits, granularity=64)
            for method, seconds, error in compare(weight, hessian, fmt):
                row = {"shape": label, "rows": rows, "columns": columns, "format": fmt.name, "method": method}
                table.append({**row, "cpu_seconds": seconds, "relative_output_error": error})
                print(f"{label:26} {fmt.name:9} {method:28} {seconds:8.3f} s   error {error:.5f}", flush=True)
    content = {"machine": describe_machine(), "threads": torch.get_num_threads(), "repeats": 3, "rows": table}
    print(write_results("gptq_speed", content))


if __name__ == "__main__":
    main()
