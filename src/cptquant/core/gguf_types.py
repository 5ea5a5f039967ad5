"""The block formats of GGUF (llama.cpp) as values: how many weights share a block and how many bytes it takes.

A row of a matrix is a sequence of blocks; the row length is a multiple of the block. Inside a block a weight is an
affine function of its code, shared by the `sub_block` consecutive weights around it:

    value = d * sc * q - dmin * mn        ("affine" with integer scales: Q2_K, Q4_K, Q5_K)
    value = d * q + m                     ("affine" with a float minimum: Q4_1, Q5_1)
    value = d * sc * q                    ("symmetric": Q3_K, Q6_K; without sc: Q4_0, Q5_0, Q8_0)

with d, dmin, m in float16 once a block and sc, mn small integers once a sub-block. Codes q are counted here from
`lowest_code`, so that no offset is left in the formulas (Q4_0 stores q + 8).
"""

from dataclasses import dataclass
from typing import Literal, get_args

GgufType = Literal["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@dataclass(frozen=True)
class BlockLayout:
    """One block format.

    Attributes:
        type_id: number in the file's tensor table.
        block_columns: weights a block. block_bytes: bytes of a block.
        code_bits, lowest_code: codes lie in [lowest_code, lowest_code + 2^code_bits - 1].
        sub_block: consecutive weights with one scale.
        scale_range: smallest and largest integer `sc`; None where d itself is the scale (then a sub-block is a block).
        minimum: "none" (symmetric), "integer" (dmin * mn, mn in `minimum_range`) or "float" (m).
    """

    name: GgufType
    type_id: int
    block_columns: int
    block_bytes: int
    code_bits: int
    lowest_code: int
    sub_block: int
    scale_range: tuple[int, int] | None = None
    minimum: Literal["none", "integer", "float"] = "none"
    minimum_range: tuple[int, int] | None = None

    @property
    def highest_code(self) -> int:
        """Largest code."""
        return self.lowest_code + (1 << self.code_bits) - 1

    @property
    def symmetric(self) -> bool:
        """No minimum is stored."""
        return self.minimum == "none"


BLOCK_LAYOUTS: dict[GgufType, BlockLayout] = {
    layout.name: layout
    for layout in (
        BlockLayout("Q2_K", 10, 256, 84, 2, 0, 16, (0, 15), "integer", (0, 15)),
        BlockLayout("Q3_K", 11, 256, 110, 3, -4, 16, (-32, 31)),
        BlockLayout("Q4_K", 12, 256, 144, 4, 0, 32, (0, 63), "integer", (0, 63)),
        BlockLayout("Q5_K", 13, 256, 176, 5, 0, 32, (0, 63), "integer", (0, 63)),
        BlockLayout("Q6_K", 14, 256, 210, 6, -32, 16, (-128, 127)),
        BlockLayout("Q8_0", 8, 32, 34, 8, -128, 32),
        BlockLayout("Q4_0", 2, 32, 18, 4, -8, 32),
        BlockLayout("Q4_1", 3, 32, 20, 4, 0, 32, None, "float"),
        BlockLayout("Q5_0", 6, 32, 22, 5, -16, 32),
        BlockLayout("Q5_1", 7, 32, 24, 5, 0, 32, None, "float"),
    )
}
"""Sizes as in ggml's `ggml-quants`; the tests check them against the `gguf` package's own table."""

NARROW_ROW_TYPE: dict[GgufType, GgufType] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q4_1",
    "Q5_K": "Q5_0",
    "Q6_K": "Q5_1",
}
"""What a K type becomes where the row is a multiple of 32 but not of 256: the nearest type that is no narrower."""

FLOAT_TYPE_IDS = {"float32": 0, "float16": 1, "bfloat16": 30}


def find_block_type(name: str) -> GgufType | None:
    """The block format of that spelling, upper or lower case; None if there is none."""
    upper = name.upper()
    return next((known for known in get_args(GgufType) if known == upper), None)
