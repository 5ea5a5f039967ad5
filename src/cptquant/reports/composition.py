"""What the bytes of a plan are made of: by format, by role, with everything that is no site."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.reports.figures.arrangement import row_label


@dataclass(frozen=True)
class Portion:
    """Sites that share a format or a role, and the bytes they take together.

    Attributes:
        code_bits: width of the format; None for a portion of several formats or of kept tensors.
        formats: format name -> number of sites.
    """

    name: str
    site_count: int
    weight_count: int
    size_bytes: int
    code_bits: int | None = None
    formats: tuple[tuple[str, int], ...] = ()


def site_bytes(plan: Plan, layout: ModelLayout) -> dict[str, int]:
    """Stored bytes of every site; a head that shares the embedding's 16-bit tensor takes none of its own."""
    sizes: dict[str, int] = {}
    formats = plan.quant_formats
    target = find_target(plan.target)
    for site in layout.sites:
        sizes[site.name] = target.site_bytes(layout, site, formats.get(site.name, layout.keep_format))
    if layout.shared_head is not None:
        embedding, head = (formats.get(name, layout.keep_format) for name in layout.shared_head)
        sizes[layout.shared_head[1]] = target.shared_head_bytes(layout, embedding, head) - sizes[layout.shared_head[0]]
    return sizes


def portions_by_format(plan: Plan, layout: ModelLayout) -> list[Portion]:
    """One portion per format from few bits to many, then norms, biases and other kept tensors; sums to the plan."""
    portions = _group(plan, layout, lambda site: plan.formats.get(site.name, layout.keep_format.name))
    bits = {fmt.name: fmt.code_bits for fmt in plan.quant_formats.values()} | {layout.keep_format.name: 16}
    ordered = sorted(portions, key=lambda portion: (bits[portion.name], portion.name))
    named = [replace(portion, code_bits=bits[portion.name]) for portion in ordered]
    kept = Portion("norms, biases, positions", 0, 0, find_target(plan.target).kept_bytes(layout))
    return [*named, kept] if layout.kept else named


def portions_by_role(plan: Plan, layout: ModelLayout) -> list[Portion]:
    """One portion per role in forward order, then kept tensors; sums to the plan."""
    portions = _group(plan, layout, row_label)
    kept = Portion("norms, biases, positions", 0, 0, find_target(plan.target).kept_bytes(layout))
    return [*portions, kept] if layout.kept else portions


def _group(plan: Plan, layout: ModelLayout, name_of: Callable[[Site], str]) -> list[Portion]:
    sizes = site_bytes(plan, layout)
    groups: dict[str, list[Site]] = {}
    for site in layout.sites:
        groups.setdefault(name_of(site), []).append(site)
    portions: list[Portion] = []
    for name, sites in groups.items():
        formats: dict[str, int] = {}
        for site in sites:
            format_name = plan.formats.get(site.name, layout.keep_format.name)
            formats[format_name] = formats.get(format_name, 0) + 1
        portions.append(
            Portion(
                name=name,
                site_count=len(sites),
                weight_count=sum(site.weight_count for site in sites),
                size_bytes=sum(sizes[site.name] for site in sites),
                formats=tuple(sorted(formats.items())),
            )
        )
    return portions
