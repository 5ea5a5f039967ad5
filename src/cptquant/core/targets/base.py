"""What the engine that will run the checkpoint can hold. A plan is made under a target, so it is legal there."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cptquant.core.formats import LARGEST_RANK, QuantFormat
from cptquant.core.layout import ModelLayout, Site, Tie


@dataclass(frozen=True)
class Target(ABC):
    """An engine's rules: which formats a site may have, which sites go together, and what the file then weighs.

    Attributes:
        name: spelling of `--target`. description: one line for people.
        default_formats: candidates beside 16 bits where the person names none.
        encoder_formats: the same for models that do not decode, where the engine runs others faster; empty: no others.
        low_rank_bases: codes that are offered with products of low rank beside them too, of ranks that follow the
            model's width (`low_rank_names`); empty where the engine has none. Not where encoders have formats of their
            own.
        architectures: `model_type`s that the engine runs; empty means whatever transformers runs.
        divisibility, tied, kept: the rules in words, for people; `refusal`, `ties`, `kept_bytes` are what counts.
    """

    name: str
    description: str
    default_formats: tuple[str, ...]
    architectures: tuple[str, ...]
    divisibility: str
    tied: str
    kept: str
    encoder_formats: tuple[str, ...] = ()
    low_rank_bases: tuple[str, ...] = ()

    def formats_for(self, layout: ModelLayout) -> tuple[str, ...]:
        """Candidates beside 16 bits for this model where the person names none."""
        if self.encoder_formats and layout.task != "causal_lm":
            return self.encoder_formats
        return (*self.default_formats, *low_rank_names(self.low_rank_bases, layout.hidden_size))

    @abstractmethod
    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""

    @abstractmethod
    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The legal format nearest to the one asked for; the same format where there is none or it is legal already."""

    def refuse_model(self, layout: ModelLayout) -> str | None:
        """Why the engine cannot run this model at all, with what it can run; None if it can."""
        return None

    def ties(self, layout: ModelLayout) -> tuple[Tie, ...]:
        """Sites that must share a format here, in this model."""
        return ()

    def shares_head(self, layout: ModelLayout) -> bool:
        """Whether an embedding and a head that are one tensor stay one tensor once they are quantized."""
        return False

    # What the tensors of the written file weigh. Defaults: compressed-tensors, everything kept in 16 bits.

    def site_bytes(self, layout: ModelLayout, site: Site, fmt: QuantFormat) -> int:
        """Bytes of one site."""
        return fmt.stored_bytes(site.out_features, site.in_features)

    def kept_bytes(self, layout: ModelLayout) -> int:
        """Bytes of all tensors that are no site."""
        return layout.kept_bytes

    def shared_head_bytes(self, layout: ModelLayout, embedding_format: QuantFormat, head_format: QuantFormat) -> int:
        """Bytes of an embedding and a head that are one tensor in the original."""
        return layout.shared_head_bytes(embedding_format, head_format)

    def plan_bytes(self, layout: ModelLayout, formats: Mapping[str, QuantFormat]) -> int:
        """Bytes of all tensors of a file in which each site has the given format (16 bits if not named)."""
        chosen = {site.name: formats.get(site.name, layout.keep_format) for site in layout.sites}
        total = self.kept_bytes(layout)
        if layout.shared_head is not None:
            embedding, head = layout.shared_head
            total += self.shared_head_bytes(layout, chosen.pop(embedding), chosen.pop(head))
        return total + sum(self.site_bytes(layout, layout.site_by_name[name], fmt) for name, fmt in chosen.items())

    def block_site_bytes(self, layout: ModelLayout, formats: Mapping[str, QuantFormat]) -> int:
        """Bytes of the blocks' linear sites alone: what an `@sites` budget limits."""
        return sum(
            self.site_bytes(layout, site, formats.get(site.name, layout.keep_format)) for site in layout.block_sites
        )


def low_rank_names(bases: Sequence[str], width: int) -> tuple[str, ...]:
    """Formats with products of low rank for a model of that width: 1/512, 1/256, 1/128 and 1/64 of it, at least 1.

    A rank of 1/256 takes 1/16 of a bit a weight in a square matrix, whatever its size.
    """
    ranks = dict.fromkeys(max(1, width * share // 512) for share in (1, 2, 4, 8))
    return tuple(f"{base}-r{rank}" for base in bases for rank in ranks if rank <= LARGEST_RANK)


def keep_correction(target: Target, site: Site, fmt: QuantFormat) -> QuantFormat | None:
    """Corrected columns or a product of low rank on the nearest legal codes of the same width; None where none are."""
    if not fmt.is_corrected:
        return None
    base = target.fit(site, fmt.base)
    if base.storage != "packed" or base.code_bits != fmt.code_bits:
        return None
    fitted = fmt.on_base(base)
    return fitted if target.refusal(site, fitted) is None else None


def refuse_correction(target: Target, site: Site, fmt: QuantFormat) -> str | None:
    """Why a site cannot have a corrected format under an engine that can run them, or None if it can."""
    if site.kind != "linear":
        return f"{fmt.name} is for linear layers: their inputs say what is corrected"
    return target.refusal(site, fmt.base) or fmt.correction_refusal(site.out_features, site.in_features)


def candidate_formats(
    site: Site, layout: ModelLayout, target: Target, formats: Sequence[QuantFormat]
) -> tuple[QuantFormat, ...]:
    """The formats that are legal for a site, 16 bits always among them, without repeats, in the order given.

    A format that the site cannot hold is replaced by the nearest one it can (`Target.fit`), which the plan states by
    the format's own name, or left out.
    """
    candidates: dict[QuantFormat, None] = {}
    for fmt in formats:
        fitted = target.fit(site, fmt)
        if target.refusal(site, fitted) is None:
            candidates[fitted] = None
    candidates[layout.keep_format] = None
    return tuple(candidates)


def list_refusals(layout: ModelLayout, target: Target, formats: Mapping[str, QuantFormat]) -> list[str]:
    """What of a plan is illegal under a target, a line a reason: the site, its format, why, and the nearest legal one.

    Ties count: sites that must share a format and do not. Empty if the plan is legal.
    """
    refused = target.refuse_model(layout)
    if refused is not None:
        return [refused]
    lines: list[str] = []
    for site in layout.sites:
        fmt = formats.get(site.name, layout.keep_format)
        reason = target.refusal(site, fmt)
        if reason is None:
            continue
        nearest = target.fit(site, fmt)
        legal = nearest if target.refusal(site, nearest) is None else layout.keep_format
        lines.append(f"{site.name}: {fmt.name} is illegal ({reason}); nearest legal format: {legal.name}")
    for names, reason in _tied(layout, target):
        held = dict.fromkeys(formats.get(name, layout.keep_format).name for name in names)
        if len(held) > 1:
            lines.append(f"{', '.join(names)} have {', '.join(held)}, but must share one format: {reason}")
    return lines


def _tied(layout: ModelLayout, target: Target) -> list[tuple[tuple[str, ...], str]]:
    tied = [(tie.sites, tie.reason) for tie in target.ties(layout)]
    if layout.shared_head is not None and target.shares_head(layout):
        tied.append((layout.shared_head, "embedding and head are one tensor in this file"))
    return tied
