"""A product of two thin 8-bit factors that is added to the codes of a matrix, and its exact codec.

A matrix of format `int3-g64-r4` is codes as of `int3-g64` plus four products of a column and a row (docs/low-rank.md
describes the tensors):

    value = (code - zero) * scale  +  sum over k of  scale_k * column code_k * row code_k / 128
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.stored_tensors import check_tensors

_SCALE_DTYPES = (torch.float16, torch.bfloat16)
LEFT, RIGHT, PRODUCT_SCALES = "weight_low_rank_left", "weight_low_rank_right", "weight_low_rank_scale"
"""Names of the tensors in a file."""
RIGHT_UNIT = 128.0
"""Row codes count as parts of this, so that scales have the size of those of 8-bit weights, which float16 can hold."""


@dataclass(frozen=True)
class LowRankCorrection:
    """The sum of some products of a column and a row.

    Attributes:
        left: int8 (out_features, rank). right: int8 (rank, in_features).
        scales: float16 or bfloat16 (rank,), one a product. May be negative, never zero.
    """

    left: Tensor
    right: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        rank = len(self.scales)
        if self.scales.ndim != 1 or not rank or self.scales.dtype not in _SCALE_DTYPES:
            raise ValueError(f"scales are 16-bit floats (rank,), got {self.scales.dtype} {tuple(self.scales.shape)}")
        for name, codes, side in (("left", self.left, 1), ("right", self.right, 0)):
            if codes.ndim != 2 or codes.shape[side] != rank or codes.dtype is not torch.int8:
                raise ValueError(
                    f"{name} codes are int8 with {rank} {('rows', 'columns')[side]}, got {codes.dtype} "
                    f"{tuple(codes.shape)}"
                )

    def values(self) -> Tensor:
        """What is added, float32 (out_features, in_features).

        In float64 every product of codes and a 16-bit scale is exact and so is their sum but for the last bits, so the
        result does not depend on how many rows are asked for or on the order of the sum.
        """
        return (self.columns().double() @ self.right.double()).div_(RIGHT_UNIT).float()

    def columns(self) -> Tensor:
        """The left factor with its scales, float32 (out_features, rank), exact."""
        return self.left.float() * self.scales.float()

    @cached_property
    def _kept(self) -> Tensor:
        return self.values()

    def fits(self, fmt: QuantFormat, shape: tuple[int, int]) -> bool:
        """Whether it is a correction of that format for a matrix of that shape."""
        rows, columns = shape
        sides = (tuple(self.left.shape), tuple(self.right.shape))
        return fmt.storage == "low-rank" and sides == ((rows, fmt.rank), (fmt.rank, columns))

    def add_(
        self,
        values: Tensor,  # float32 (out_features, in_features)
    ) -> Tensor:
        """The same matrix with the correction added in place."""
        return values.add_(self.values())

    def added(
        self,
        values: Tensor,  # (out_features, in_features), any device
    ) -> Tensor:
        """A new matrix with the correction added; gradients pass. The product is made once and kept."""
        return values + self._kept.to(values.device)

    def without(
        self,
        values: Tensor,  # (out_features, in_features), any device
    ) -> Tensor:
        """A new matrix without the correction."""
        return values - self.values().to(values.device)

    @property
    def fixed_columns(self) -> Tensor | None:
        """Columns whose codes stay 0; none here."""
        return None

    def rows(self, index: slice | Tensor) -> "LowRankCorrection":
        """The correction of some rows."""
        return LowRankCorrection(self.left[index], self.right, self.scales)

    def joined(self, others: Sequence["LowRankCorrection"]) -> "LowRankCorrection":
        """This one and others, one below the other.

        Raises:
            ValueError: rows or scales of the products differ.
        """
        for other in others:
            if not torch.equal(other.right, self.right) or not torch.equal(other.scales, self.scales):
                raise ValueError("products of low rank can be joined where their rows and scales are the same")
        left = torch.cat([self.left, *(other.left for other in others)])
        return LowRankCorrection(left, self.right, self.scales)


def encode_low_rank(correction: LowRankCorrection) -> dict[str, Tensor]:
    """Tensors to write beside those of the codes; their bytes are `QuantFormat.correction_bytes(out, in)`.

    Returns:
        `weight_low_rank_left` int8 (out, rank), `weight_low_rank_right` int8 (rank, in), `weight_low_rank_scale` 16-bit
        (rank,).
    """
    return {
        LEFT: correction.left.contiguous(),
        RIGHT: correction.right.contiguous(),
        PRODUCT_SCALES: correction.scales.contiguous(),
    }


def decode_low_rank(tensors: Mapping[str, Tensor], fmt: QuantFormat, shape: tuple[int, int]) -> LowRankCorrection:
    """Inverse of `encode_low_rank`, exact.

    Raises:
        ArtifactError: a tensor is missing or of another shape or dtype than the format implies.
    """
    rows, columns = shape
    expected = {LEFT: ((torch.int8,), (rows, fmt.rank)), RIGHT: ((torch.int8,), (fmt.rank, columns)),
                PRODUCT_SCALES: (_SCALE_DTYPES, (fmt.rank,))}  # fmt: skip
    check_tensors(tensors, expected, fmt, shape)
    return LowRankCorrection(tensors[LEFT], tensors[RIGHT], tensors[PRODUCT_SCALES])
