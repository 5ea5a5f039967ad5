"""Sentences of a plan: where a site did not get what was asked for, and why."""

from collections.abc import Sequence

from cptquant.allocation.problem import Choice, Problem
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.core.targets import Target, candidate_formats


def explain_choice(problem: Problem, target: Target, choice: Choice) -> tuple[str, ...]:
    """Substituted group sizes, sites that can only be 16 bits, and sites outside the budget's scope."""
    return (*_substitutions(problem, target, choice), *_kept_by_target(problem, target), *_kept_by_scope(problem))


def _substitutions(problem: Problem, target: Target, choice: Choice) -> list[str]:
    """One sentence per (requested, chosen) pair that differ."""
    found: dict[tuple[str, str], list[Site]] = {}
    for group, chosen in zip(problem.groups, choice, strict=True):
        asked = [name for name, j in group.option_of.items() if j == chosen]
        if not asked:
            continue  # a pair of a shared embedding and head: no one format was asked for
        for site, fmt in zip(group.sites, group.options[chosen].formats, strict=True):
            if not fmt.is_float and fmt.name not in asked:
                found.setdefault((_nearest(asked, fmt), fmt.name), []).append(site)
    return [
        f"{asked} was asked for, {held} is what {_count(sites)} can hold (first: {sites[0].name}, "
        f"{sites[0].out_features} x {sites[0].in_features})"
        f"{_promotion(problem, target, sites, QuantFormat.parse(asked), QuantFormat.parse(held))}"
        for (asked, held), sites in found.items()
    ]


def _nearest(asked: Sequence[str], held: QuantFormat) -> str:
    """Of the formats that a site holds in the same way, the one that is most like what it holds."""
    formats = [QuantFormat.parse(name) for name in asked]
    return max(formats, key=lambda fmt: (fmt.code_bits == held.code_bits, fmt.storage == held.storage)).name


def _promotion(problem: Problem, target: Target, sites: list[Site], asked: QuantFormat, held: QuantFormat) -> str:
    """What it costs that an engine has one width for the whole of a matrix; "" where that is not the reason."""
    if (asked.storage != "segments" and not asked.is_corrected) or held.is_corrected:
        return ""
    if any(asked.segments_refusal(site.in_features) for site in sites if asked.storage == "segments"):
        return ""
    mixed = sum(asked.stored_bytes(site.out_features, site.in_features) for site in sites)
    one_width = sum(target.site_bytes(problem.layout, site, held) for site in sites)
    return f": one width for the whole matrix, {one_width - mixed:,} bytes more ({one_width:,} instead of {mixed:,})"


def _kept_by_target(problem: Problem, target: Target) -> list[str]:
    """Sites in scope that had no choice but 16 bits."""
    found: dict[str, list[Site]] = {}
    for group in problem.groups:
        for position, site in enumerate(group.sites):
            if any(not option.formats[position].is_float for option in group.options):
                continue
            found.setdefault(_reason_for_16_bits(problem, target, site), []).append(site)
    return [
        f"{', '.join(site.name for site in sites[:3])}{' and others' if len(sites) > 3 else ''} "
        f"stay{'s' if len(sites) == 1 else ''} in 16 bits: {reason}"
        for reason, sites in found.items()
    ]


def _reason_for_16_bits(problem: Problem, target: Target, site: Site) -> str:
    legal = candidate_formats(site, problem.layout, target, problem.requested)
    if any(not fmt.is_float for fmt in legal):
        if problem.layout.shared_head and site.name in problem.layout.shared_head:
            return "embedding and head are one tensor, and quantized apart they would take no fewer bytes"
        return "the table holds no other format there"
    reasons = (target.refusal(site, fmt) for fmt in problem.requested)
    return next((reason for reason in reasons if reason), "no other format is offered")


def _kept_by_scope(problem: Problem) -> list[str]:
    if not problem.kept_sites:
        return []
    names = ", ".join(problem.kept_sites[:3]) + (" and others" if len(problem.kept_sites) > 3 else "")
    return [f"kept in 16 bits, since an @sites budget counts the blocks' linear sites only: {names}"]


def _count(sites: list[Site]) -> str:
    return "1 site" if len(sites) == 1 else f"{len(sites)} sites"
