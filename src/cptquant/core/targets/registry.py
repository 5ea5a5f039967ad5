"""The spellings of `--target`."""

from cptquant.core.errors import FormatError
from cptquant.core.targets.base import Target
from cptquant.core.targets.compressed_tensors import DEFAULT_FORMATS, CompressedTensors
from cptquant.core.targets.gguf import GGUF
from cptquant.core.targets.onnx import ONNX
from cptquant.core.targets.torch_segments import TORCH
from cptquant.core.targets.vllm import VLLM

_DIVISIBILITY = "group sizes divide the row; else the largest power of two from 16 that does, else one scale a row"
_KEPT = "norms, biases, positions in 16 bits; embeddings in 8 (plain) or 16"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CompressedTensors(
            name="transformers",
            description="compressed-tensors safetensors, read by stock transformers",
            default_formats=DEFAULT_FORMATS,
            architectures=(),
            divisibility=_DIVISIBILITY,
            tied="none",
            kept=_KEPT,
        ),
        CompressedTensors(
            name="transformers-fused",
            description="the same with q/k/v and gate/up in one format each, for engines that fuse them",
            default_formats=DEFAULT_FORMATS,
            architectures=(),
            divisibility=_DIVISIBILITY,
            tied="q, k, v; gate, up",
            kept=_KEPT,
            fuses=True,
        ),
        GGUF,
        ONNX,
        VLLM,
        TORCH,
    )
}


def find_target(name: str) -> Target:
    """Look a target up by its `--target` spelling.

    Raises:
        FormatError: no such target.
    """
    if name not in TARGETS:
        raise FormatError(f"--target {name!r} is unknown; choose one of: {', '.join(TARGETS)}")
    return TARGETS[name]
