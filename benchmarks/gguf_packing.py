"""Speed of the GGUF packers: codes and scales in memory to bytes of a file, on one core.

    python benchmarks/gguf_packing.py

MB of float16 weights a second (2 bytes a weight), median and spread of n runs; unpacking beside it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_machine
from results_file import write_results

from cptquant.core.formats import block_format
from cptquant.core.gguf_types import BLOCK_LAYOUTS
from cptquant.packing.block_weight import BlockWeight

ROWS, COLUMNS, REPEATS = 2048, 2048, 7


def random_weight(name: Any) -> BlockWeight:
    layout, generator = BLOCK_LAYOUTS[name], torch.Generator().manual_seed(0)
    blocks, subs = COLUMNS // layout.block_columns, COLUMNS // layout.sub_block

    def integers(low: int, high: int, columns: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (ROWS, columns), generator=generator).to(torch.int8)

    return BlockWeight(
        block_format(name),
        integers(layout.lowest_code, layout.highest_code, COLUMNS),
        torch.rand(ROWS, blocks, generator=generator).half(),
        integers(*layout.scale_range, subs) if layout.scale_range else None,
        None if layout.symmetric else torch.rand(ROWS, blocks, generator=generator).half(),
        integers(*layout.minimum_range, subs) if layout.minimum_range else None,
    )


def megabytes_per_second(work: Callable[[], object]) -> list[float]:
    work()
    speeds: list[float] = []
    for _ in range(REPEATS):
        start = time.process_time()  # the machine may be busy with other work
        work()
        speeds.append(2 * ROWS * COLUMNS / 1e6 / (time.process_time() - start))
    return sorted(speeds)


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in BLOCK_LAYOUTS:
        weight = random_weight(name)
        packed = weight.pack()
        for direction, work in (
            ("pack", weight.pack),
            ("unpack", lambda w=weight, p=packed: BlockWeight.unpack(w.format, p, COLUMNS)),
        ):
            speeds = megabytes_per_second(work)
            row = {"type": name, "direction": direction,
                   "median_mb_per_cpu_second": round(statistics.median(speeds), 1),
                   "least": round(speeds[0], 1), "most": round(speeds[-1], 1), "n": REPEATS}  # fmt: skip
            print(row)
            rows.append(row)
    write_results("gguf_packing", {"machine": describe_machine(), "shape": [ROWS, COLUMNS], "rows": rows})


if __name__ == "__main__":
    main()
