"""Quantization formats are values: how a weight matrix is held, and how many bytes that takes.

Byte counts follow compressed-tensors 0.20 (`pack-quantized` for linear layers, `int-quantized` for embeddings):
`code_bits`-wide integers packed densely along each row into int32 words, one 16-bit scale per group, an int64
`weight_shape` of two entries, and, where asymmetric, integer zero points. GGUF's block formats (`Q4_K`, `Q8_0`, ...)
are values of the same type with a `block`; their bytes are whole blocks (`core.gguf_types`). SliM-LLM's `slim2-g64`
mixes widths among the groups of one matrix, `int3-g64-c2` adds an 8-bit correction to 2 % of the input columns, and
`int3-g64-r4` adds the product of two thin 8-bit factors; they are stored in a form of our own (docs/segments.md,
docs/columns.md, docs/low-rank.md).
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
    r"int(?P<bits>[2-8])-(?P<granularity>g\d+|channel|tensor)(?P<asym>-asym)?"
    r"(?:(?P<plain>-plain)|-c(?P<percent>\d{1,2})(?:\.(?P<tenth>[1-9]))?|-r(?P<rank>\d{1,3}))?",
    re.ASCII,
)
_SLIM_NAME = re.compile(r"slim(?P<bits>[2-7])-g(?P<group>\d+)(?P<sorted>-sorted)?(?P<halves>-halves)?", re.ASCII)
SEGMENT_GROUP_MULTIPLE = 32
"""Columns of a group of mixed width are a multiple of this: a group of any width then fills whole 32-bit words."""
LARGEST_COLUMN_SHARE = 250
"""Of 1000 input columns, corrected ones: beyond a quarter, one more bit for all columns takes fewer bytes."""
LARGEST_RANK = 256
"""Of a low-rank correction; the rank must also be smaller than both sides of the matrix."""
_COLUMN_INDEX_BYTES = 2
_LARGEST_COLUMN_COUNT = 1 << 16

Granularity = int | Literal["channel", "tensor"]
"""Weights that share a scale: a group of that many consecutive input columns in a row, a row, or the matrix."""


class QuantFormat(BaseModel):
    """How one weight matrix of shape (out_features, in_features) is stored.

    Attributes:
        code_bits: width of the stored integers, 2 to 8; 16 for the two floating-point formats. "segments": N, 2 to 7:
            as many groups have N-1 bits as have N+1, the others N, so that N is the average whatever is chosen.
        granularity: input columns per scale (a positive int), "channel" (one scale a row) or "tensor".
        symmetric: codes in [-2^(b-1), 2^(b-1)-1] without (True) or with (False) an integer zero point.
        storage: "packed" (dense int32 words), "plain" (one byte a code: embeddings, which compressed-tensors cannot
            pack), "blocks" (GGUF), "segments" (groups of mixed width), "columns" (packed, and a correction of some
            input columns), "low-rank" (packed, and a product of two thin factors), or the name of a 16-bit float.
        block: GGUF's name of a block format, which fixes all other fields; None for every other storage.
        sorted_columns: "segments" only: columns are put into groups by salience, and their numbers are stored.
        halves: "segments" only: half of the groups have N-1 bits, half N+1, none N; 2 and 4 bits for N = 3, which ONNX
            Runtime multiplies.
        column_share: "columns" only: that many of 1000 input columns, at least one, have a correction in 8 bits with
            one scale a column.
        rank: "low-rank" only: of the product, whose factors have 8 bits and one scale for each column of one and row
            of the other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    code_bits: int
    granularity: Granularity = "channel"
    symmetric: bool = True
    storage: Literal["packed", "plain", "blocks", "segments", "columns", "low-rank", "float16", "bfloat16"] = "packed"
    block: GgufType | None = None
    sorted_columns: bool = False
    halves: bool = False
    column_share: int = 0
    rank: int = 0

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
        self._check_segments()
        self._check_columns()
        self._check_rank()
        return self

    def _check_rank(self) -> None:
        if self.storage != "low-rank":
            if self.rank:
                raise ValueError(f"only low-rank storage has a rank, not {self.storage} storage")
            return
        if self.code_bits > 7:
            raise ValueError("a low-rank correction has 8 bits, which 8-bit codes do not need; leave -r out")
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"a low-rank correction has rank 1 to {LARGEST_RANK}, got {self.rank}")

    def _check_columns(self) -> None:
        if self.storage != "columns":
            if self.column_share:
                raise ValueError(f"only columns storage corrects columns, not {self.storage} storage")
            return
        if self.code_bits > 7:
            raise ValueError("columns are corrected in 8 bits, which 8-bit codes do not need; leave -c out")
        if not 1 <= self.column_share <= LARGEST_COLUMN_SHARE:
            percent, most = self.column_share / 10, LARGEST_COLUMN_SHARE / 10
            raise ValueError(f"0.1 to {most:g} % of the columns can be corrected, got {percent:g}")

    def _check_segments(self) -> None:
        if self.storage != "segments":
            if self.sorted_columns or self.halves:
                raise ValueError(f"only segments have sorted columns or halves, not {self.storage} storage")
            return
        if self.code_bits > 7:
            raise ValueError(f"groups of mixed width average 2 to 7 bits, got {self.code_bits}")
        if not isinstance(self.granularity, int) or self.granularity % SEGMENT_GROUP_MULTIPLE:
            raise ValueError(
                f"groups of mixed width have a multiple of {SEGMENT_GROUP_MULTIPLE} columns, got {self.granularity}"
            )
        if not self.symmetric:
            raise ValueError("groups of mixed width have no zero points; leave -asym out")

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
        if self.storage == "segments":
            order, split = "-sorted" if self.sorted_columns else "", "-halves" if self.halves else ""
            return f"slim{self.code_bits}-g{self.granularity}{order}{split}"
        granularity = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        asym = "" if self.symmetric else "-asym"
        if self.storage == "columns":
            return f"int{self.code_bits}-{granularity}{asym}-c{self.column_share / 10:g}"
        if self.storage == "low-rank":
            return f"int{self.code_bits}-{granularity}{asym}-r{self.rank}"
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

    @property
    def is_corrected(self) -> bool:
        """Whether something is added to the values of the codes: corrected columns, or a product of low rank."""
        return self.storage in ("columns", "low-rank")

    @property
    def base(self) -> "QuantFormat":
        """The format of the codes alone: the same without its correction."""
        if not self.is_corrected:
            return self
        return QuantFormat(code_bits=self.code_bits, granularity=self.granularity, symmetric=self.symmetric)

    def on_base(self, base: "QuantFormat") -> "QuantFormat":
        """The same correction on other codes, of a packed format."""
        fields = {"storage": self.storage, "column_share": self.column_share, "rank": self.rank}
        return QuantFormat.model_validate({**base.model_dump(), **fields})

    def with_columns(self, column_share: int) -> "QuantFormat":
        """A packed format with that many of 1000 input columns corrected."""
        fields = {**self.model_dump(), "storage": "columns", "column_share": column_share}
        return QuantFormat.model_validate(fields)

    def column_count(self, in_features: int) -> int:
        """Corrected columns of a row: the share, rounded, at least one; 0 for storages that correct none."""
        if self.storage != "columns":
            return 0
        return max(1, (self.column_share * in_features + 500) // 1000)

    def correction_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the correction; 0 where there is none.

        Columns: a code for each row, a 16-bit scale and a 16-bit number a column. Low rank: for each of the products of
        a column and a row, their codes and one 16-bit scale.
        """
        if self.storage == "low-rank":
            return self.rank * (out_features + in_features + 2)
        return self.column_count(in_features) * (out_features + 2 + _COLUMN_INDEX_BYTES)

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes on disk of all tensors that hold one matrix: codes with padding, scales, zero points, shape record.

        Raises:
            ValueError: a block or a group of mixed width that does not divide the row, or a row too long to number its
            columns (targets refuse it before).
        """
        if self.is_float:
            return 2 * out_features * in_features
        blocks = self.block_layout
        if blocks is not None:
            if in_features % blocks.block_columns:
                raise ValueError(f"{self.name} has blocks of {blocks.block_columns} columns, the row has {in_features}")
            return out_features * (in_features // blocks.block_columns) * blocks.block_bytes
        if self.is_corrected:
            reason = self.correction_refusal(out_features, in_features)
            if reason is not None:
                raise ValueError(reason)
            return self.base.stored_bytes(out_features, in_features) + self.correction_bytes(out_features, in_features)
        scales = 2 * self.scale_count(out_features, in_features)
        if self.storage == "segments":
            reason = self.segments_refusal(in_features)
            if reason is not None:
                raise ValueError(reason)
            columns = _COLUMN_INDEX_BYTES * in_features if self.sorted_columns else 0
            bit_map = -(-self.group_count(in_features) // 4)
            return out_features * in_features * self.code_bits // 8 + scales + bit_map + columns + _WEIGHT_SHAPE_BYTES
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

    def segments_refusal(self, in_features: int) -> str | None:
        """Why a row of this length cannot have groups of mixed width, or None if it can."""
        if isinstance(self.granularity, int) and in_features % self.granularity:
            return f"{self.name} needs whole groups: {self.granularity} columns do not divide a row of {in_features}"
        if self.halves and self.group_count(in_features) % 2:
            count = self.group_count(in_features)
            return f"{self.name} needs an even number of groups: a row of {in_features} has {count}"
        if self.sorted_columns and in_features > _LARGEST_COLUMN_COUNT:
            return f"{self.name} numbers columns in 16 bits: a row of {in_features} is too long"
        return None

    def correction_refusal(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this size cannot have this correction, or None if it can."""
        if self.storage == "columns" and in_features > _LARGEST_COLUMN_COUNT:
            return f"{self.name} numbers columns in 16 bits: a row of {in_features} is too long"
        if self.storage == "low-rank" and self.rank >= min(out_features, in_features):
            return f"{self.name} has a rank that a {out_features} x {in_features} matrix itself cannot exceed"
        return None

    def promoted(self) -> "QuantFormat":
        """One width for the whole matrix that is no worse, for engines without mixed widths or corrections.

        Groups of mixed width become the widest of them, codes with a correction one bit wider; others stay.
        """
        if self.storage != "segments" and not self.is_corrected:
            return self
        return QuantFormat(code_bits=self.code_bits + 1, granularity=self.granularity, symmetric=self.symmetric)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits divided by weights: scales, zero points and padding included."""
        return 8 * self.stored_bytes(out_features, in_features) / (out_features * in_features)

    @classmethod
    def parse(cls, name: str) -> "QuantFormat":
        """Read a format from its name.

        Raises:
            FormatError: the name is not of the form `int4-g64`, `int8-channel`, `int4-tensor-asym`, `int3-g64-c2`,
            `int3-g64-r4`, `slim2-g64`, `Q4_K`, `float16`.
        """
        if name == "float16":
            return FLOAT16
        if name == "bfloat16":
            return BFLOAT16
        block = find_block_type(name)
        if block is not None:
            return block_format(block)
        slim = _SLIM_NAME.fullmatch(name)
        match = _NAME.fullmatch(name)
        if slim is not None:
            return cls._checked(
                name,
                {
                    "code_bits": int(slim["bits"]),
                    "granularity": int(slim["group"]),
                    "storage": "segments",
                    "sorted_columns": slim["sorted"] is not None,
                    "halves": slim["halves"] is not None,
                },
            )
        if match is None:
            raise FormatError(
                f"format {name!r} is not readable; write int<2..8>-g<group size>, int<2..8>-channel or "
                "int<2..8>-tensor, with -asym for a zero point (int4-g64, int8-channel, int4-tensor-asym), "
                "a block format of GGUF (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1), "
                "slim<2..7>-g<group size>[-sorted][-halves] for groups of mixed width, an int format of at most 7 bits "
                "with -c<percent> for columns corrected in 8 bits (int3-g64-c2) or -r<rank> for a product of two thin "
                "8-bit factors beside the codes (int3-g64-r4), or float16, bfloat16"
            )
        text = match["granularity"]
        return cls._checked(
            name,
            {
                "code_bits": int(match["bits"]),
                "granularity": int(text[1:]) if text[0] == "g" else text,
                "symmetric": match["asym"] is None,
                "storage": _storage_of(match),
                "column_share": 10 * int(match["percent"] or 0) + int(match["tenth"] or 0),
                "rank": int(match["rank"] or 0),
            },
        )

    @classmethod
    def _checked(cls, name: str, fields: dict[str, object]) -> "QuantFormat":
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise FormatError(f"format {name!r}: {reason}") from None


def _storage_of(match: re.Match[str]) -> str:
    named = {"plain": "plain", "percent": "columns", "rank": "low-rank"}
    return next((storage for group, storage in named.items() if match[group]), "packed")


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
