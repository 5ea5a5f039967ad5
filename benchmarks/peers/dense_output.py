"""Weights of a tool whose own files the ruler does not decode, as float32 beside the bits they take in its storage.

Imported by the peers' scripts under the peers' own interpreters: torch and safetensors only.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_dense(output: Path, weights: dict[str, Tensor], bits: dict[str, int]) -> None:
    """Write `dense.safetensors`: all changed weights by parameter name; bits of the quantized ones in its metadata."""
    output.mkdir(parents=True, exist_ok=True)
    content = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
    save_file(content, output / "dense.safetensors", metadata={"bits": json.dumps(bits)})
