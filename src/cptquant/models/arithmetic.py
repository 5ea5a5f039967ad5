"""Coarser, faster matrix products for passes whose results are only statistics.

Calibration passes feed Hessians and gradients. There, factors of a matrix product may be rounded to bfloat16 while the
sums stay float32: the rounding adds about 1e-5 of an input's power to the Hessian's diagonal, a thousandth of what
GPTQ's damping adds on purpose, and X'X of rounded inputs is still positive semidefinite (docs/decisions/0005).
Everything that is reported (NLL, KL, the guard) and every factorisation stays in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch


@cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; without that, coarse products would be slower."""
    capabilities = cast(dict[str, Any], torch.cpu.get_capabilities())
    return bool(
        torch.backends.mkldnn.is_available() and (capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    )


def describe_arithmetic(coarse: bool) -> str:
    """What `coarse_products(coarse)` means on this machine, for an artifact's settings."""
    return "bfloat16 products, float32 sums" if coarse and has_fast_bfloat16() else "float32"


@contextmanager
def coarse_products(wanted: bool = True) -> Iterator[None]:
    """Let matrix products on the CPU round their factors to bfloat16 within a `with`, where that is faster.

    A model's layers go through autocast, so their outputs are bfloat16 too, while residuals and norms stay float32.
    Plain products of float32 tensors, such as a Hessian's, keep float32 sums.

    The switch is the process's; threads of torch's own pool follow it, other Python threads would too.
    """
    if not (wanted and has_fast_bfloat16()):
        yield
        return
    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        matmul.fp32_precision = before
