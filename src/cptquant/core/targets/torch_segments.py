"""Our own checkpoint for torch: integer formats, groups of mixed width (docs/segments.md), corrected columns
(docs/columns.md), products of low rank (docs/low-rank.md)."""

from dataclasses import dataclass

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.core.targets.base import keep_correction, refuse_correction
from cptquant.core.targets.compressed_tensors import DEFAULT_FORMATS, CompressedTensors

METHOD = "cptquant-segments"
"""`quant_method` in config.json."""


@dataclass(frozen=True)
class TorchSegments(CompressedTensors):
    """The rules of compressed-tensors, and in linear layers groups of mixed width and corrections."""

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if site.transposed and not fmt.is_float:
            return "layers stored as (in, out), GPT-2's Conv1D, are not supported here"
        if fmt.is_corrected:
            return refuse_correction(self, site, fmt)
        if fmt.storage != "segments":
            return super().refusal(site, fmt)
        if site.kind != "linear":
            return f"{fmt.name} is for linear layers: SliM-LLM needs their inputs"
        return fmt.segments_refusal(site.in_features)

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The nearest legal format.

        Groups of mixed width that do not fit become one width that holds each of them; corrections stay where a
        group size that divides the row is all that is needed.
        """
        if self.refusal(site, fmt) is None:
            return fmt
        return keep_correction(self, site, fmt) or super().fit(site, fmt)


TORCH = TorchSegments(
    name="torch",
    description="safetensors with groups of mixed width or corrections, run by cptquant.load_segmented",
    default_formats=DEFAULT_FORMATS,  # mixed widths did not pay at equal bytes so far (docs/segments.md)
    low_rank_bases=tuple(f"int{bits}-g{group}" for bits in (2, 3, 4) for group in (64, 128)),
    architectures=(),
    divisibility="groups of mixed width are a multiple of 32 that divides the row, else as transformers",
    tied="none",
    kept="norms, biases, positions in 16 bits; embeddings in 8 (plain) or 16",
)
