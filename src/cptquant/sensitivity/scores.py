"""What a sensitivity method returns, and the one rule that turns a block's score into damages of its sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.sensitivity.estimates import Estimate

SiteFormats = Mapping[str, Sequence[QuantFormat]]
"""Site name -> candidate formats."""

FormatValues = Mapping[str, Mapping[str, float]]
"""Site name -> format name -> value."""

SCORE_RULE = (
    "damage = score of the site's block x relative error of the site in that format; a site before the blocks "
    "(embedding) takes the first block's score, a site after them (pooler, head) the last's"
)


@dataclass(frozen=True)
class Scores:
    """A method's findings, before they become a `SensitivityTable`.

    Attributes:
        unit: of the damages. damages: site name -> format name -> estimate, integer formats only.
        block_scores: one per block. metadata, curves: as in the table.
    """

    unit: str
    damages: Mapping[str, Mapping[str, Estimate]]
    block_scores: Sequence[Estimate]
    metadata: Mapping[str, str | int | float | bool | None]
    curves: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class SensitivityMethod(Protocol):
    """A frozen dataclass of hyper-parameters that measures a model."""

    name: ClassVar[str]

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """Measure every integer format of `formats` on calibration text."""
        ...


def spread_over_sites(
    block_scores: Sequence[Estimate],
    errors: FormatValues,
    layout: ModelLayout,
    *,
    site_scores: Mapping[str, Estimate] | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Apply `SCORE_RULE`.

    The error of a product is taken from the score alone: the relative error is an exact sum over the calibration
    inputs, and its own spread over texts is small beside the score's.

    Args:
        block_scores: one per block. errors: relative error of each site and format.
        site_scores: scores of single sites, which go before their block's.
    """
    own = site_scores or {}
    return {
        name: {
            fmt: own.get(name, block_scores[owner_block(layout.site_by_name[name], layout)]).scaled(error)
            for fmt, error in row.items()
        }
        for name, row in errors.items()
    }


def owner_block(site: Site, layout: ModelLayout) -> int:
    """The block whose score a site takes: its own, the first for sites before the blocks, the last for those after."""
    if site.block_index is not None:
        return site.block_index
    return 0 if site in entry_sites(layout) else layout.block_count - 1


def entry_sites(layout: ModelLayout) -> tuple[Site, ...]:
    """Sites the text passes before the first block; the layout lists sites in forward order."""
    inside = [index for index, site in enumerate(layout.sites) if site.block_index is not None]
    return layout.sites[: inside[0]] if inside else layout.sites


def exit_sites(layout: ModelLayout) -> tuple[Site, ...]:
    """Sites after the last block: projection, pooler, head."""
    before = len(entry_sites(layout))
    return tuple(site for site in layout.sites[before:] if site.block_index is None)
