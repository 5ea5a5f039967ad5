"""How large a model is: bytes of all its tensors, and what that is against float16 and float32."""

from collections.abc import Mapping
from pathlib import Path

from cptquant.core.evaluation import Measurement
from cptquant.core.layout import ModelLayout
from cptquant.models.weights import read_weight_files

_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a 64-bit little-endian integer."""


def measure_sizes(layout: ModelLayout, weight_bytes: Mapping[str, int]) -> list[Measurement]:
    """Sizes of several weight files of one model.

    Args:
        layout: the original: its parameters (each shared tensor once) are what every ratio is taken against, so that a
            subject that stores a tied head twice does not look better for it.
        weight_bytes: subject -> bytes of all its tensors (scales, zero points, shape records included; the safetensors
            header, a few kilobytes, is not).

    Returns:
        For each subject `weight_bytes`, `parameters`, `bits_per_weight`, `compression_vs_float16` and
        `compression_vs_float32`: exact counts, without standard error.
    """
    measurements: list[Measurement] = []
    for subject, size_bytes in weight_bytes.items():
        measurements += [
            Measurement(
                name="weight_bytes",
                subject=subject,
                value=size_bytes,
                unit="bytes",
                note="all tensors of the weight files; their headers come on top",
            ),
            Measurement(name="parameters", subject=subject, value=layout.parameters, unit="weights"),
            Measurement(
                name="bits_per_weight",
                subject=subject,
                value=8 * size_bytes / layout.parameters,
                unit="bits/weight",
                note="all stored bytes over all parameters",
            ),
            Measurement(
                name="compression_vs_float16",
                subject=subject,
                value=layout.bytes_at_16_bit / size_bytes,
                unit="ratio",
                note="every parameter in 16 bits, by bytes",
            ),
            Measurement(
                name="compression_vs_float32",
                subject=subject,
                value=layout.bytes_at_32_bit / size_bytes,
                unit="ratio",
                note="every parameter in 32 bits, by bytes",
            ),
        ]
    return measurements


def folder_weight_bytes(folder: Path) -> int:
    """Bytes of all tensors in a model folder's safetensors files, read from their headers alone.

    Raises:
        ModelError: no safetensors file, a missing shard, or one that is cut short or damaged.
    """
    size_bytes = 0
    for path in read_weight_files(folder).files:
        # Reading the headers checked that tensors cover each file without gaps: all but the header is tensor bytes.
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        size_bytes += path.stat().st_size - _LENGTH_BYTES - header_bytes
    return size_bytes
