"""A matrix in GGUF blocks: integers and scales in memory, packed rows on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import BlockLayout
from cptquant.packing.gguf_blocks import Fields, pack_blocks, unpack_blocks


@dataclass(frozen=True)
class BlockWeight:
    """One matrix on the grid of a block format (`core.gguf_types`).

    Attributes:
        format: with a `block`.
        codes: int8 (out_features, in_features), in the layout's code range.
        d: float16 (out_features, blocks). scales: int8 (out_features, sub-blocks), None where d is the scale itself.
        minimum: float16 (out_features, blocks), dmin or m; None where the type is symmetric.
        minimum_codes: int8 (out_features, sub-blocks); None without integer minima.
    """

    format: QuantFormat
    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    minimum: Tensor | None = None
    minimum_codes: Tensor | None = None

    def __post_init__(self) -> None:
        layout = self.layout
        rows, columns = self.codes.shape
        if columns % layout.block_columns:
            raise ValueError(f"{layout.name} has blocks of {layout.block_columns} columns, the row has {columns}")
        blocks, subs = (rows, columns // layout.block_columns), (rows, columns // layout.sub_block)
        expected = {
            "codes": (torch.int8, (rows, columns)),
            "d": (torch.float16, blocks),
            "scales": (torch.int8, subs) if layout.scale_range else None,
            "minimum": None if layout.symmetric else (torch.float16, blocks),
            "minimum_codes": (torch.int8, subs) if layout.minimum_range else None,
        }
        for name, wanted in expected.items():
            found = getattr(self, name)
            described = None if found is None else (found.dtype, tuple(found.shape))
            if described != wanted:
                raise ValueError(f"{name} of a {layout.name} matrix must be {wanted}, got {described}")

    @property
    def layout(self) -> BlockLayout:
        """The format's blocks."""
        layout = self.format.block_layout
        if layout is None:
            raise ValueError(f"{self.format.name} has no blocks")
        return layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def sub_scales(self) -> Tensor:
        """Scale of every sub-block, float32 (out_features, sub-blocks); d * sc as ggml multiplies them."""
        d = self.d.float()
        if self.scales is None:
            return d
        return d.repeat_interleave(self.layout.block_columns // self.layout.sub_block, dim=1) * self.scales.float()

    def sub_offsets(self) -> Tensor | None:
        """Offset of every sub-block, float32 (out_features, sub-blocks): -dmin * mn, or m; None if there is none."""
        if self.minimum is None:
            return None
        minimum = self.minimum.float()
        if self.minimum_codes is None:
            return minimum
        spread = minimum.repeat_interleave(self.layout.block_columns // self.layout.sub_block, dim=1)
        return -(spread * self.minimum_codes.float())

    def dequantize(self) -> Tensor:
        """The matrix as float32 (out_features, in_features), bit for bit as the `gguf` package dequantizes it."""
        rows, columns = self.shape
        values = self.codes.float().view(rows, -1, self.layout.sub_block)
        values = values * self.sub_scales()[:, :, None]
        offsets = self.sub_offsets()
        if offsets is not None:
            values += offsets[:, :, None]
        return values.view(rows, columns)

    def rows(self, index: slice | Tensor) -> "BlockWeight":
        """Some rows of the matrix, in the order given."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return BlockWeight(
            self.format, self.codes[index], self.d[index], cut(self.scales), cut(self.minimum), cut(self.minimum_codes)
        )

    def scaled(self, power_of_two: float) -> "BlockWeight":
        """The same matrix times a power of two: d and the minimum carry it, codes and integer scales stay.

        Raises:
            ValueError: not exact in float16 (beyond 65504, or below its smallest steps).
        """
        d = self.d.float() * power_of_two
        minimum = None if self.minimum is None else self.minimum.float() * power_of_two
        for exact in (d, minimum):
            if exact is not None and not torch.equal(exact.half().float(), exact):
                raise ValueError(f"scales times {power_of_two:g} do not fit float16: largest {exact.abs().max():.4g}")
        return replace(self, d=d.half(), minimum=None if minimum is None else minimum.half())

    def pack(self) -> Tensor:
        """Rows as they stand in the file: uint8 (out_features, bytes a row)."""
        rows, columns = self.shape
        blocks = columns // self.layout.block_columns
        count = rows * blocks

        def flat(values: Tensor) -> np.ndarray:
            return values.contiguous().numpy().reshape(count, -1)

        def halves(values: Tensor) -> np.ndarray:
            return values.contiguous().numpy().reshape(count)

        fields = Fields(
            flat(self.codes),
            halves(self.d),
            None if self.scales is None else flat(self.scales),
            None if self.minimum is None else halves(self.minimum),
            None if self.minimum_codes is None else flat(self.minimum_codes),
        )
        packed = pack_blocks(self.layout.name, fields)
        return torch.from_numpy(packed.reshape(rows, blocks * self.layout.block_bytes))

    @classmethod
    def unpack(cls, fmt: QuantFormat, packed: Tensor, in_features: int) -> "BlockWeight":
        """Inverse of `pack`, exact.

        Args:
            packed: uint8 (out_features, bytes a row).
        """
        layout = fmt.block_layout
        if layout is None:
            raise ValueError(f"{fmt.name} has no blocks")
        rows, blocks = packed.shape[0], in_features // layout.block_columns
        fields = unpack_blocks(layout.name, packed.contiguous().numpy().reshape(rows * blocks, layout.block_bytes))

        def back(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(np.ascontiguousarray(values)).view(rows, -1)

        codes, d = back(fields.codes), back(fields.d)
        assert codes is not None and d is not None
        return cls(fmt, codes, d, back(fields.scales), back(fields.minimum), back(fields.minimum_codes))


def join_block_rows(parts: Sequence[BlockWeight]) -> BlockWeight:
    """Matrices of one format set one below the other."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    codes, d = join("codes"), join("d")
    assert codes is not None and d is not None
    return BlockWeight(parts[0].format, codes, d, join("scales"), join("minimum"), join("minimum_codes"))
