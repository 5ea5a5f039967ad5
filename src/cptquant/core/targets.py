"""What the engine that will run the checkpoint can hold. A plan is made under a target, so it is legal there."""

from collections.abc import Sequence
from dataclasses import dataclass

from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site, Tie


@dataclass(frozen=True)
class Target:
    """An engine's rules.

    Attributes:
        name: spelling of `--target`.
        fuses: whether the engine runs q/k/v and gate/up as one matrix, so that they must share a format.
        description: one line for people.
    """

    name: str
    fuses: bool
    description: str

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if fmt.is_float:
            return None
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


TARGETS = {
    target.name: target
    for target in (
        Target("transformers", fuses=False, description="compressed-tensors safetensors, read by stock transformers"),
        Target(
            "transformers-fused",
            fuses=True,
            description="the same with q/k/v and gate/up in one format each, for engines that fuse them",
        ),
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


def candidate_formats(
    site: Site, layout: ModelLayout, target: Target, formats: Sequence[QuantFormat]
) -> tuple[QuantFormat, ...]:
    """The formats that are legal for a site, 16 bits always among them, without repeats, in the order given.

    A packed 8-bit format offered to an embedding is translated to its plain twin; a group size that does not
    divide the row is replaced by the largest power of two (at least 16) that does, else by one scale per row.
    Both are stated in the plan by the format's own name.
    """
    candidates: dict[QuantFormat, None] = {}
    for fmt in formats:
        fitted = _fit(site, fmt)
        if target.refusal(site, fitted) is None:
            candidates[fitted] = None
    candidates[layout.keep_format] = None
    return tuple(candidates)


def _fit(site: Site, fmt: QuantFormat) -> QuantFormat:
    if fmt.is_float:
        return fmt
    changes: dict[str, object] = {}
    if _is_initialized_by_weight(site) and fmt.code_bits == 8:
        changes["storage"] = "plain"
    if isinstance(fmt.granularity, int) and site.in_features % fmt.granularity:
        size = fmt.granularity
        while size > 16 and site.in_features % size:
            size //= 2
        changes["granularity"] = size if size >= 16 and site.in_features % size == 0 else "channel"
    return QuantFormat.model_validate({**fmt.model_dump(), **changes}) if changes else fmt
