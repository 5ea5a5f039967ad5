"""Quantization formats are values: how a weight matrix is held, and how many bytes that takes.

Byte counts follow compressed-tensors 0.20 (`pack-quantized` for linear layers, `int-quantized` for embeddings):
`code_bits`-wide integers packed densely along each row into int32 words, one 16-bit scale per group, an int64
`weight_shape` of two entries, and, where asymmetric, integer zero points. GGUF's block formats (`Q4_K`, `Q8_0`, ...)
are values of the same type with a `block`; their bytes are whole blocks (`core.gguf_types`).
"""

import re
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cptquant.core.errors import FormatError
from cptquant.core.gguf_types import BLOCK_LAYOUTS, BlockLayout, GgufType, find_block_type

INTEGER_CODE_BITS = (2, 3, 4, 5, 6, 7, 8)
_WEIGHT_SHAPE_BYTES = 16  # compressed-tensors stores (rows, columns) as two int64 beside each packed matrix
_NAME = re.compile(
    r"int(?P<bits>[2-8])-(?P<granularity>g\d+|channel|tensor)(?P<asym>-asym)?(?P<plain>-plain)?", re.ASCII
)

Granularity = int | Literal["channel", "tensor"]
"""Weights that share a scale: a group of that many consecutive input columns in a row, a row, or the matrix."""


class QuantFormat(BaseModel):
    """How one weight matrix of shape (out_features, in_features) is stored.

    Attributes:
        code_bits: width of the stored integers, 2 to 8; 16 for the two floating-point formats.
        granularity: input columns per scale (a positive int), "channel" (one scale a row) or "tensor".
        symmetric: codes in [-2^(b-1), 2^(b-1)-1] without (True) or with (False) an integer zero point.
        storage: "packed" (dense int32 words), "plain" (one byte a code: embeddings, which compressed-tensors cannot
            pack), "blocks" (GGUF), or the name of a 16-bit float.
        block: GGUF's name of a block format, which fixes all other fields; None for every other storage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    code_bits: int
    granularity: Granularity = "channel"
    symmetric: bool = True
    storage: Literal["packed", "plain", "blocks", "float16", "bfloat16"] = "packed"
    block: GgufType | None = None

    @model_validator(mode="after")
    def _check(self) -> "QuantFormat":
        if (self.block is not None) != (self.storage == "blocks"):
            raise ValueError(f"storage blocks and a block name go together, got {self.storage} and {self.block}")
        if self.block is not None:
            layout = BLOCK_LAYOUTS[self.block]
            fixed = (layout.code_bits, layout.sub_block, layout.symmetric)
            if (self.code_bits, self.granularity, self.symmetric) != fixed:
                raise ValueError(f"{self.block} has code_bits, granularity, symmetric = {fixed}")
        if self.is_float:
            if self.code_bits != 16:
                raise ValueError(f"a {self.storage} format has code_bits = 16, got {self.code_bits}")
        elif self.code_bits not in INTEGER_CODE_BITS:
            raise ValueError(f"code_bits must be one of {INTEGER_CODE_BITS}, got {self.code_bits}")
        if isinstance(self.granularity, int) and self.granularity < 1:
            raise ValueError(f"a group has at least 1 column, got {self.granularity}")
        if self.storage == "plain" and self.code_bits != 8:
            raise ValueError(f"plain storage holds 8-bit codes only, got code_bits = {self.code_bits}")
        return self

    @property
    def is_float(self) -> bool:
        """True for float16 and bfloat16: the weight is kept, only cast."""
        return self.storage in ("float16", "bfloat16")

    @property
    def block_layout(self) -> BlockLayout | None:
        """GGUF's block layout; None for other storages."""
        return None if self.block is None else BLOCK_LAYOUTS[self.block]

    @cached_property
    def name(self) -> str:
        """Spelling used in files and flags, e.g. `int4-g64`, `int8-channel`, `int4-tensor-asym`, `Q4_K`, `float16`."""
        if self.is_float:
            return self.storage
        if self.block is not None:
            return self.block
        granularity = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        asym = "" if self.symmetric else "-asym"
        return f"int{self.code_bits}-{granularity}{asym}{'-plain' if self.storage == 'plain' else ''}"

    def __str__(self) -> str:
        return self.name

    def group_count(self, in_features: int) -> int:
        """Scales per row (for "tensor": 1, shared by all rows). The last group may be shorter."""
        if isinstance(self.granularity, int):
            return -(-in_features // self.granularity)
        return 1

    def scale_count(self, out_features: int, in_features: int) -> int:
        """Scales of the whole matrix."""
        return 1 if self.granularity == "tensor" else out_features * self.group_count(in_features)

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes on disk of all tensors that hold one matrix: codes with padding, scales, zero points, shape record.

        Raises:
            ValueError: a block format whose block does not divide the row (targets refuse it before).
        """
        if self.is_float:
            return 2 * out_features * in_features
        blocks = self.block_layout
        if blocks is not None:
            if in_features % blocks.block_columns:
                raise ValueError(f"{self.name} has blocks of {blocks.block_columns} columns, the row has {in_features}")
            return out_features * (in_features // blocks.block_columns) * blocks.block_bytes
        scales = 2 * self.scale_count(out_features, in_features)
        if self.storage == "plain":
            zeros = 0 if self.symmetric else self.scale_count(out_features, in_features)
            return out_features * in_features + scales + zeros
        codes = 4 * out_features * (-(-in_features * self.code_bits // 32))
        if self.symmetric:
            zeros = 0
        elif self.granularity == "tensor":
            zeros = 1  # one int8
        else:  # packed down the rows
            zeros = 4 * (-(-out_features * self.code_bits // 32)) * self.group_count(in_features)
        return codes + scales + zeros + _WEIGHT_SHAPE_BYTES

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits divided by weights: scales, zero points and padding included."""
        return 8 * self.stored_bytes(out_features, in_features) / (out_features * in_features)

    @classmethod
    def parse(cls, name: str) -> "QuantFormat":
        """Read a format from its name.

        Raises:
            FormatError: the name is not of the form `int4-g64`, `int8-channel`, `int4-tensor-asym`, `Q4_K`, `float16`.
        """
        if name == "float16":
            return FLOAT16
        if name == "bfloat16":
            return BFLOAT16
        block = find_block_type(name)
        if block is not None:
            return block_format(block)
        match = _NAME.fullmatch(name)
        if match is None:
            raise FormatError(
                f"format {name!r} is not readable; write int<2..8>-g<group size>, int<2..8>-channel or "
                "int<2..8>-tensor, with -asym for a zero point (int4-g64, int8-channel, int4-tensor-asym), "
                "a block format of GGUF (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1), "
                "or float16, bfloat16"
            )
        text = match["granularity"]
        granularity: Granularity = int(text[1:]) if text[0] == "g" else text  # type: ignore[assignment]
        try:
            return cls(
                code_bits=int(match["bits"]),
                granularity=granularity,
                symmetric=match["asym"] is None,
                storage="plain" if match["plain"] else "packed",
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise FormatError(f"format {name!r}: {reason}") from None


FLOAT16 = QuantFormat(code_bits=16, storage="float16")
BFLOAT16 = QuantFormat(code_bits=16, storage="bfloat16")


def block_format(block: GgufType) -> QuantFormat:
    """The format of a GGUF block type."""
    layout = BLOCK_LAYOUTS[block]
    return QuantFormat(
        code_bits=layout.code_bits,
        granularity=layout.sub_block,
        symmetric=layout.symmetric,
        storage="blocks",
        block=block,
    )
