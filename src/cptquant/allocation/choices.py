"""From layout, table, target and budget to the problem that allocators solve."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from cptquant.allocation.damages import check_sites, find_damage
from cptquant.allocation.problem import ChoiceGroup, Option, Problem
from cptquant.core.errors import ArtifactError, FormatError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target, candidate_formats

Scope = Literal["file", "sites"]


def build_problem(
    layout: ModelLayout,
    table: SensitivityTable | None,
    target: Target,
    formats: Sequence[QuantFormat],
    scope: Scope,
) -> Problem:
    """List every group's legal options. The limit is the layout's size in 16 bits, so that all of them fit.

    Args:
        table: damages; without one every option has damage 0.
        formats: as asked for; empty means every format of the table that the target allows.
        scope: "sites" leaves everything outside the blocks in 16 bits.

    Raises:
        FormatError: no site can hold a requested format under the target.
        ArtifactError: table and layout do not belong together, or a requested format was not measured.
    """
    fitting = _Fitting(layout, target)
    if table is not None:
        check_sites(table, layout)
    requested = _requested(layout, table, formats)
    if formats:
        check_formats(layout, target, formats)
    in_scope = layout.sites if scope == "file" else layout.block_sites
    groups: list[ChoiceGroup] = []
    for names in _grouped(layout, target, in_scope):
        if names == layout.shared_head:
            if target.shares_head(layout):
                together = _group(layout, names, table, requested, fitting, strict=bool(formats))
                groups.append(_one_tensor(layout, target, together))
                continue
            embedding, head = (
                _group(layout, (name,), table, requested, fitting, strict=bool(formats)) for name in names
            )
            groups.append(_shared_head_group(layout, target, embedding, head, requested))
        else:
            groups.append(_group(layout, names, table, requested, fitting, strict=bool(formats)))
    names_in_scope = {site.name for site in in_scope}
    problem = Problem(
        layout=layout,
        groups=tuple(groups),
        requested=requested,
        fixed_bytes=target.kept_bytes(layout) if scope == "file" else 0,
        limit_bytes=0,
        scope=scope,
        table=table,
        kept_sites=tuple(site.name for site in layout.sites if site.name not in names_in_scope),
    )
    return problem.with_limit(problem.bytes_at_16_bit)


def check_formats(layout: ModelLayout, target: Target, formats: Sequence[QuantFormat]) -> None:
    """Refuse a requested format that no site of the model can hold.

    Raises:
        FormatError: with the target's reason.
    """
    fitting = _Fitting(layout, target)
    for fmt in formats:
        if fmt.is_float or any(fitting.fit(site, fmt) is not None for site in layout.sites):
            continue
        reasons = dict.fromkeys(target.refusal(site, fmt) for site in layout.sites)
        reason = next((reason for reason in reasons if reason and "embedding" not in reason), None)
        raise FormatError(
            f"--formats {fmt.name} is refused by --target {target.name}: "
            f"{reason or 'no site of this model can hold it'}"
        )


class _Fitting:
    """What a requested format becomes at a site, remembered by what it depends on."""

    def __init__(self, layout: ModelLayout, target: Target) -> None:
        self._layout, self.target = layout, target
        self._known: dict[tuple[str, bool, str, int, str], QuantFormat | None] = {}

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat | None:
        """The legal format closest to the requested one (`core.targets`), or None if the target refuses it."""
        keep = self._layout.keep_format
        if fmt.is_float:
            return keep
        key = (site.kind, site.transposed, site.role, site.in_features, fmt.name)
        if key not in self._known:
            first = candidate_formats(site, self._layout, self.target, [fmt])[0]
            self._known[key] = None if first.is_float else first
        return self._known[key]


def _requested(
    layout: ModelLayout, table: SensitivityTable | None, formats: Sequence[QuantFormat]
) -> tuple[QuantFormat, ...]:
    """Quantized formats in the order given, 16 bits once and last."""
    if not formats and table is None:
        raise FormatError("no candidate formats: give --formats, e.g. int3-g64,int4-g64, or a sensitivity table")
    offered = formats or [QuantFormat.parse(name) for name in (table.format_names if table else ())]
    return (*dict.fromkeys(fmt for fmt in offered if not fmt.is_float), layout.keep_format)


def _grouped(layout: ModelLayout, target: Target, sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """Site names that are chosen together, each site once, in the layout's order."""
    group_of: dict[str, tuple[str, ...]] = {site.name: (site.name,) for site in sites}
    for tie in target.ties(layout):
        unknown = [name for name in tie.sites if name not in layout.site_by_name]
        if unknown:
            raise ArtifactError(
                f"layout.json ties {unknown[0]}, which is no site of it; make it anew with: {layout.MADE_BY}"
            )
        merged = tuple(dict.fromkeys(name for site in tie.sites if site in group_of for name in group_of[site]))
        group_of.update(dict.fromkeys(merged, merged))
    if layout.shared_head is not None and layout.shared_head[0] in group_of:
        group_of.update(dict.fromkeys(layout.shared_head, layout.shared_head))
    return list(dict.fromkeys(group_of[site.name] for site in sites))


def _group(
    layout: ModelLayout,
    names: Sequence[str],
    table: SensitivityTable | None,
    requested: Sequence[QuantFormat],
    fitting: _Fitting,
    *,
    strict: bool,
) -> ChoiceGroup:
    """The formats that all sites of a group can hold, by the name they were requested under."""
    sites = tuple(layout.site_by_name[name] for name in names)
    options: list[Option] = []
    option_of: dict[str, int] = {}
    known: dict[tuple[str, ...], int] = {}
    for fmt in requested:
        fitted = [found for site in sites if (found := fitting.fit(site, fmt)) is not None]
        if len(fitted) < len(sites):
            continue
        if not strict and table is not None and not _measured(table, sites, fitted):
            continue  # a table's own formats need not all occur at every site
        key = tuple([found.name for found in fitted])
        if key not in known:
            size_bytes, damage = 0, 0.0
            for site, found in zip(sites, fitted, strict=True):
                size_bytes += fitting.target.site_bytes(layout, site, found)
                damage += find_damage(table, site, found)
            known[key] = len(options)
            options.append(Option(tuple(fitted), size_bytes, damage))
        option_of[fmt.name] = known[key]
    return ChoiceGroup(sites, tuple(options), option_of)


def _measured(table: SensitivityTable, sites: Sequence[Site], fitted: Sequence[QuantFormat]) -> bool:
    pairs = zip(sites, fitted, strict=True)
    return all(fmt.is_float or fmt.name in table.damages.get(site.name, {}) for site, fmt in pairs)


def _one_tensor(layout: ModelLayout, target: Target, group: ChoiceGroup) -> ChoiceGroup:
    """An embedding and a head that stay one tensor: one format, counted once, with the damage of both uses."""
    options = tuple(
        replace(option, size_bytes=target.shared_head_bytes(layout, *option.formats)) for option in group.options
    )
    return replace(group, options=options)


def _shared_head_group(
    layout: ModelLayout, target: Target, embedding: ChoiceGroup, head: ChoiceGroup, requested: Sequence[QuantFormat]
) -> ChoiceGroup:
    """One group for an embedding and a head that are one tensor: every pair of their formats.

    Quantizing either one splits them, so a pair is left out where it stores no less than the one shared 16-bit tensor
    and hurts no less.
    """
    pairs: dict[tuple[int, int], Option] = {}
    for (i, first), (j, second) in product(enumerate(embedding.options), enumerate(head.options)):
        pair = first.formats + second.formats
        pairs[i, j] = Option(pair, target.shared_head_bytes(layout, *pair), first.damage + second.damage)
    keep = pairs[embedding.option_of[layout.keep_format.name], head.option_of[layout.keep_format.name]]
    kept = {
        key: option
        for key, option in pairs.items()
        if option is keep or option.size_bytes < keep.size_bytes or option.damage < keep.damage
    }
    position = {key: index for index, key in enumerate(kept)}
    option_of: dict[str, int] = {}
    for fmt in requested:
        key = (embedding.option_of.get(fmt.name, -1), head.option_of.get(fmt.name, -1))
        if key in position:
            option_of[fmt.name] = position[key]
    return ChoiceGroup(embedding.sites + head.sites, tuple(kept.values()), option_of)
