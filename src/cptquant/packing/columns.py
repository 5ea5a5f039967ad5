"""An 8-bit correction of a few input columns of a matrix, and its exact codec.

A matrix of format `int3-g64-c2` is codes as of `int3-g64` plus, on 2 % of its input columns, a correction in 8 bits
with one scale a column (docs/columns.md describes the tensors):

    value = (code - zero) * scale,  and on the chosen columns  + correction code * the column's scale
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.stored_tensors import check_tensors

_SCALE_DTYPES = (torch.float16, torch.bfloat16)
CODES, SCALES, COLUMNS = "weight_correction", "weight_correction_scale", "weight_correction_columns"
"""Names of the tensors in a file."""


@dataclass(frozen=True)
class ColumnCorrection:
    """What is added to some columns.

    Attributes:
        columns: int64 (count,), their numbers, ascending.
        codes: int8 (out_features, count).
        scales: float16 or bfloat16 (count,). May be negative, never zero.
    """

    columns: Tensor
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        count = len(self.columns)
        if self.columns.dtype is not torch.int64 or not count or not bool((self.columns.diff() > 0).all()):
            raise ValueError("columns are int64 numbers, at least one, ascending")
        if self.codes.ndim != 2 or self.codes.shape[1] != count or self.codes.dtype is not torch.int8:
            raise ValueError(f"codes are int8 (out, {count}), got {self.codes.dtype} {tuple(self.codes.shape)}")
        if tuple(self.scales.shape) != (count,) or self.scales.dtype not in _SCALE_DTYPES:
            raise ValueError(f"scales are 16-bit floats ({count},), got {self.scales.dtype} {tuple(self.scales.shape)}")

    def values(self) -> Tensor:
        """What is added, float32 (out_features, count)."""
        return self.codes.float() * self.scales.float()

    def fits(self, fmt: QuantFormat, shape: tuple[int, int]) -> bool:
        """Whether it is a correction of that format for a matrix of that shape."""
        rows, columns = shape
        count = fmt.column_count(columns)
        return tuple(self.codes.shape) == (rows, count) and int(self.columns[-1]) < columns

    def add_(
        self,
        values: Tensor,  # float32 (out_features, in_features)
    ) -> Tensor:
        """The same matrix with the correction added in place."""
        return values.index_add_(1, self.columns, self.values())

    def added(
        self,
        values: Tensor,  # (out_features, in_features), any device
    ) -> Tensor:
        """A new matrix with the correction added; gradients pass."""
        return values.index_add(1, self.columns.to(values.device), self.values().to(values.device))

    def without(
        self,
        values: Tensor,  # (out_features, in_features), any device
    ) -> Tensor:
        """A new matrix without the correction."""
        return values.index_add(1, self.columns.to(values.device), self.values().to(values.device), alpha=-1)

    @property
    def fixed_columns(self) -> Tensor | None:
        """Columns whose codes stay 0: a step of those is coarse beside the correction's 8 bits."""
        return self.columns

    def rows(self, index: slice | Tensor) -> "ColumnCorrection":
        """The correction of some rows."""
        return ColumnCorrection(self.columns, self.codes[index], self.scales)

    def joined(self, others: Sequence["ColumnCorrection"]) -> "ColumnCorrection":
        """This one and others, one below the other.

        Raises:
            ValueError: columns or scales differ.
        """
        for other in others:
            if not torch.equal(other.columns, self.columns) or not torch.equal(other.scales, self.scales):
                raise ValueError("corrected columns can be joined where the same columns are corrected alike")
        codes = torch.cat([self.codes, *(other.codes for other in others)])
        return ColumnCorrection(self.columns, codes, self.scales)


def encode_correction(correction: ColumnCorrection) -> dict[str, Tensor]:
    """Tensors to write beside those of the codes; their bytes are `QuantFormat.correction_bytes(out, in)`.

    Returns:
        `weight_correction` int8 (out, count), `weight_correction_scale` 16-bit (count,), `weight_correction_columns`
        uint16 (count,).
    """
    return {
        CODES: correction.codes.contiguous(),
        SCALES: correction.scales.contiguous(),
        COLUMNS: correction.columns.to(torch.uint16),
    }


def decode_correction(tensors: Mapping[str, Tensor], fmt: QuantFormat, shape: tuple[int, int]) -> ColumnCorrection:
    """Inverse of `encode_correction`, exact.

    Raises:
        ArtifactError: a tensor is missing or of another shape or dtype than the format implies, or names columns that
            the matrix does not have.
    """
    rows, columns = shape
    count = fmt.column_count(columns)
    expected = {CODES: ((torch.int8,), (rows, count)), SCALES: (_SCALE_DTYPES, (count,)),
                COLUMNS: ((torch.uint16,), (count,))}  # fmt: skip
    check_tensors(tensors, expected, fmt, shape)
    numbers = tensors[COLUMNS].to(torch.int64)
    if int(numbers[-1]) >= columns or not bool((numbers.diff() > 0).all()):
        raise ArtifactError(
            f"tensor {COLUMNS} of a {fmt.name} matrix {shape} does not name {count} of its columns in ascending order; "
            "quantize again"
        )
    return ColumnCorrection(numbers, tensors[CODES], tensors[SCALES])
