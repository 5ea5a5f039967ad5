"""How fast, how large and how hungry engines are with a model (bench.json)."""

from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen

BASELINE = "transformers bf16"
"""What ratios are taken to."""


class Spread(Frozen):
    """One figure over rounds: median, least and largest, and the number of rounds."""

    median: float
    low: float
    high: float
    n: int


class BenchVariant(Frozen):
    """One engine with one file.

    Attributes:
        name: for people and tables, e.g. `onnx`, `transformers bf16`. engine: name and version.
        file_bytes: of the weight files. bytes_per_token: of weights read to decode one token, as they lie in memory.
        figures: `decode_tokens_per_second`, `prefill_128_tokens_per_second`, `encode_128_ms`, `load_seconds`,
            `peak_bytes` over rounds.
        ratios: of the speeds to the bf16 baseline, round by round (above 1 is faster).
        bandwidth_share: bytes_per_token × decode speed ÷ the bandwidth of the same round; None for encoders.
        problem: why there are no figures; empty if there are.
    """

    name: str
    engine: str = ""
    file_bytes: int = 0
    bytes_per_token: int | None = None
    figures: dict[str, Spread] = {}
    ratios: dict[str, Spread] = {}
    bandwidth_share: Spread | None = None
    problem: str = ""


class BenchRecord(Artifact):
    """Result of `bench`.

    Attributes:
        model: as named. threads: of every engine and of the bandwidth probe. rounds: each runs every variant once.
        bandwidth_bytes_per_second: sequential read of a buffer larger than the caches.
        variants: in the order they ran.
    """

    SCHEMA: ClassVar[str] = "cptquant.bench"
    MADE_BY: ClassVar[str] = "cptquant bench RUN"

    model: str
    parameters: int
    threads: int
    rounds: int
    bandwidth_bytes_per_second: Spread
    variants: tuple[BenchVariant, ...]


def spread(values: list[float]) -> Spread:
    """Median, least and largest of at least one value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(median=median, low=ordered[0], high=ordered[-1], n=len(ordered))
