"""compressed-tensors safetensors, as stock transformers reads them (decision 0002)."""

from dataclasses import dataclass

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site, Tie
from cptquant.core.targets.base import Target

_WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS_OF_64 = tuple(f"int{bits}-g64" for bits in _WIDTHS)
DEFAULT_FORMATS = tuple(f"int{bits}-g{group}" for bits in _WIDTHS for group in (64, 128))
"""Two group sizes a width: docs/decisions/0008-two-group-sizes.md."""


@dataclass(frozen=True)
class CompressedTensors(Target):
    """The rules of compressed-tensors 0.20 in transformers 5.23.

    Attributes:
        fuses: whether the engine runs q/k/v and gate/up as one matrix, so that they must share a format.
    """

    fuses: bool = False

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if fmt.is_float:
            return None
        if fmt.storage == "blocks":
            return f"{fmt.name} is a block format of GGUF, which compressed-tensors does not have"
        if fmt.storage == "segments":
            return f"{fmt.name} mixes widths in one matrix, which compressed-tensors cannot; --target torch can"
        if fmt.storage == "columns":
            return f"{fmt.name} corrects columns in 8 bits, which compressed-tensors cannot; --target torch can"
        if fmt.storage == "low-rank":
            return f"{fmt.name} adds a product of low rank, which compressed-tensors cannot; --target torch can"
        if _is_initialized_by_weight(site):
            if fmt.storage == "plain" and fmt.symmetric:
                return _divisibility(site, fmt)
            return (
                "transformers 5.23 cannot load an embedding (or an output projection of GPT-2) packed by "
                "compressed-tensors 0.20: its initializer reads a `weight` that packing removed; these are held in 8 "
                "bits plain (int8-channel-plain) or 16"
            )
        if fmt.storage == "plain":
            return "plain storage is for embeddings and GPT-2's output projections; other linear layers are packed"
        if not fmt.symmetric and fmt.granularity != "tensor":
            return (
                "compressed-tensors 0.20 writes packed zero points that transformers 5.23 cannot load (the meta-device "
                "layout leaves them unpacked); use the symmetric format, or one zero point per tensor"
            )
        return _divisibility(site, fmt)

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The nearest format that compressed-tensors can hold.

        A packed 8-bit format offered to an embedding is translated to its plain twin; a group size that does not
        divide the row is replaced by the largest power of two (at least 16) that does, else by one scale per row; a
        block format of GGUF becomes groups of 64 of the same width; groups of mixed width become one width that
        holds each of them, codes with a correction one bit wider.
        """
        return _fit(site, fmt)

    def ties(self, layout: ModelLayout) -> tuple[Tie, ...]:
        """Sites that must share a format here."""
        return layout.ties if self.fuses else ()


def _is_initialized_by_weight(site: Site) -> bool:
    """Embeddings, and GPT-2's c_proj in its GPT-BigCode form (decision 0003): packing would leave them unloadable."""
    return site.kind == "embedding" or (site.transposed and site.role in ("o", "down"))


def _divisibility(site: Site, fmt: QuantFormat) -> str | None:
    if isinstance(fmt.granularity, int) and site.in_features % fmt.granularity:
        return (
            f"compressed-tensors needs the group size to divide the row: {site.in_features} columns, "
            f"groups of {fmt.granularity}"
        )
    return None


def _fit(site: Site, fmt: QuantFormat) -> QuantFormat:
    if fmt.is_float:
        return fmt
    fmt = fmt.promoted()
    if fmt.storage == "blocks":
        fmt = QuantFormat(code_bits=fmt.code_bits, granularity=64)
    changes: dict[str, object] = {}
    if _is_initialized_by_weight(site) and fmt.code_bits == 8:
        changes["storage"] = "plain"
    if isinstance(fmt.granularity, int) and site.in_features % fmt.granularity:
        size = fmt.granularity
        while size > 16 and site.in_features % size:
            size //= 2
        changes["granularity"] = size if size >= 16 and site.in_features % size == 0 else "channel"
    return QuantFormat.model_validate({**fmt.model_dump(), **changes}) if changes else fmt
