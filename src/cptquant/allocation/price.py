"""Why each site has its bits: what every format costs in bytes and damage, against the price of a byte.

A budget has a price: the Lagrange multiplier of its relaxation, the damage that one byte more would avoid. A site whose
format minimises damage + price * bytes is explained by it; one that does not has what was left over in whole bytes.
"""

from cptquant.allocation.choices import build_problem
from cptquant.allocation.explain import explain_choice
from cptquant.allocation.knapsack import Knapsack, option_arrays
from cptquant.allocation.problem import ChoiceGroup, Option, Problem
from cptquant.allocation.relaxation import solve_relaxation, undominated_options
from cptquant.core.errors import ArtifactError
from cptquant.core.explanation import FormatOffer, NextStep, PlanExplanation, Restriction, SiteExplanation, Verdict
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target

_CLOSE = 1e-9
"""Relative: of equal gains per byte neither decides."""


def explain_plan(
    layout: ModelLayout, table: SensitivityTable, target: Target, plan: Plan, formats: tuple[QuantFormat, ...]
) -> PlanExplanation:
    """Explain every site of a plan, made by us or edited by hand.

    Args:
        formats: the candidates that were asked for, beside 16 bits; others that the plan has are added.

    Raises:
        ArtifactError: the plan has a format that the table does not hold, or that is no choice under the target.
    """
    used = [fmt for fmt in dict.fromkeys(plan.quant_formats.values()) if not fmt.is_float]
    strange = [fmt for fmt in used if not _reached(layout, target, formats, fmt)]
    problem = build_problem(layout, table, target, (*formats, *strange), plan.budget_scope)
    choice = [chosen_option(group, plan) for group in problem.groups]
    price, least = _price(problem.with_limit(plan.limit_bytes))
    counted, damage = problem.counted_bytes(choice), problem.damage(choice)
    best = least is not None and counted <= plan.limit_bytes and damage <= least * (1 + _CLOSE)
    off_price = Verdict.WHOLE_BYTES if best else Verdict.NOT_THE_PRICE
    groups = [
        _explain_group(problem, target, group, index, price, off_price)
        for group, index in zip(problem.groups, choice, strict=True)
    ]
    groups += [_kept(problem, name) for name in problem.kept_sites]
    order = {site.name: index for index, site in enumerate(layout.sites)}
    return PlanExplanation(
        budget=plan.budget,
        target=target.name,
        allocator=plan.allocator,
        scope=plan.budget_scope,
        damage_unit=table.unit,
        sensitivity_method=table.method,
        limit_bytes=plan.limit_bytes,
        counted_bytes=counted,
        slack_bytes=plan.limit_bytes - counted,
        damage=damage,
        least_damage=least,
        price_per_byte=price,
        predicted=None,
        next_step=_next_step(problem, choice),
        groups=tuple(sorted(groups, key=lambda group: order[group.sites[0]])),
        notes=explain_choice(problem, target, choice),
    )


def _reached(layout: ModelLayout, target: Target, formats: tuple[QuantFormat, ...], fmt: QuantFormat) -> bool:
    """Whether a format of the plan is one of those asked for, or what the target makes of one at some site."""
    return any(fmt in (asked, *(target.fit(site, asked) for site in layout.sites)) for asked in formats)


def chosen_option(group: ChoiceGroup, plan: Plan) -> int:
    """Index of the option that the plan has at a group.

    Raises:
        ArtifactError: it has formats that are none of the group's options.
    """
    wanted = tuple(plan.formats[site.name] for site in group.sites)
    for index, option in enumerate(group.options):
        if tuple(fmt.name for fmt in option.formats) == wanted:
            return index
    names = ", ".join(site.name for site in group.sites)
    offered = "; ".join(" + ".join(fmt.name for fmt in option.formats) for option in group.options)
    raise ArtifactError(
        f"plan.json gives {' + '.join(wanted)} to {names}, which is none of its choices under --target "
        f"{plan.target} with this table ({offered}); give it one of them, or make the plan anew with: {Plan.MADE_BY}"
    )


def _price(problem: Problem) -> tuple[float | None, float | None]:
    """Lagrange multiplier of the limit, and the damage of the exact knapsack's plan within it.

    Returns:
        (None, None) where the smallest plan exceeds the limit, as an edited plan's may.
    """
    if problem.smallest_bytes > problem.limit_bytes:
        return None, None
    options = undominated_options(*option_arrays(problem))
    relaxed = solve_relaxation(options, problem.limit_bytes - problem.fixed_bytes)
    return relaxed.multiplier, problem.damage(Knapsack()(problem, seed=0).choice)


def gain_per_byte(chosen: Option, other: Option) -> float | None:
    """Damage avoided per byte more, or added per byte less; None at equal bytes."""
    more = other.size_bytes - chosen.size_bytes
    return None if more == 0 else (chosen.damage - other.damage) / more


def _explain_group(
    problem: Problem, target: Target, group: ChoiceGroup, index: int, price: float | None, off_price: Verdict
) -> SiteExplanation:
    chosen = group.options[index]
    costs = [] if price is None else [option.damage + price * option.size_bytes for option in group.options]
    least = min(costs, default=0.0)
    at_price = [cost <= least + _CLOSE * abs(least) for cost in costs] or [False] * len(group.options)
    offers = [
        FormatOffer(
            formats=tuple(fmt.name for fmt in option.formats),
            size_bytes=option.size_bytes,
            damage=option.damage,
            gain_per_byte=None if option is chosen else gain_per_byte(chosen, option),
            chosen=option is chosen,
            at_price=fits,
        )
        for option, fits in zip(group.options, at_price, strict=True)
    ]
    verdict = Verdict.ONLY_CHOICE if len(offers) == 1 else Verdict.PRICE if at_price[index] else off_price
    return SiteExplanation(
        sites=tuple(site.name for site in group.sites),
        shared=_shared(problem, target, group),
        offers=tuple(sorted(offers, key=lambda offer: (offer.size_bytes, -offer.damage))),
        verdict=verdict,
        restrictions=tuple(found for site in group.sites for found in _restrictions(problem, target, site)),
    )


def _shared(problem: Problem, target: Target, group: ChoiceGroup) -> str:
    if len(group.sites) == 1:
        return ""
    names = {site.name for site in group.sites}
    if problem.layout.shared_head is not None and names == set(problem.layout.shared_head):
        return "embedding and head are one tensor in the original"
    return "; ".join(dict.fromkeys(tie.reason for tie in target.ties(problem.layout) if names & set(tie.sites)))


def _restrictions(problem: Problem, target: Target, site: Site) -> list[Restriction]:
    """What of the request this site could not have: refused, replaced, or not in the table."""
    found: list[Restriction] = []
    for fmt in problem.requested:
        if fmt.is_float:
            continue
        held, refusal = target.fit(site, fmt), target.refusal(site, fmt)
        if refusal is None:
            held = fmt
        elif target.refusal(site, held) is None:
            found.append(Restriction(site=site.name, requested=fmt.name, held=held.name, reason=refusal))
        else:
            found.append(Restriction(site=site.name, requested=fmt.name, held=None, reason=refusal))
            continue
        if problem.table is not None and held.name not in problem.table.damages.get(site.name, {}):
            reason = "the table has no damage of it here"
            found.append(Restriction(site=site.name, requested=fmt.name, held=None, reason=reason))
    return found


def _kept(problem: Problem, name: str) -> SiteExplanation:
    site, keep = problem.layout.site_by_name[name], problem.layout.keep_format
    size_bytes = keep.stored_bytes(site.out_features, site.in_features)
    offer = FormatOffer(formats=(keep.name,), size_bytes=size_bytes, damage=0.0, gain_per_byte=None, chosen=True,
                        at_price=True)  # fmt: skip
    return SiteExplanation(sites=(name,), shared="", offers=(offer,), verdict=Verdict.OUT_OF_SCOPE, restrictions=())


def _next_step(problem: Problem, choice: list[int]) -> NextStep | None:
    """The larger format of any group that avoids most damage per byte; of equal gains the smaller step."""
    best: tuple[float, int, ChoiceGroup, Option, Option] | None = None
    for group, index in zip(problem.groups, choice, strict=True):
        chosen = group.options[index]
        for option in group.options:
            more = option.size_bytes - chosen.size_bytes
            if more <= 0 or option.damage >= chosen.damage:
                continue
            gain = (chosen.damage - option.damage) / more
            if best is None or (gain, -more) > (best[0], -best[1]):
                best = (gain, more, group, chosen, option)
    if best is None:
        return None
    gain, more, group, chosen, option = best
    return NextStep(
        sites=tuple(site.name for site in group.sites),
        before=tuple(fmt.name for fmt in chosen.formats),
        after=tuple(fmt.name for fmt in option.formats),
        more_bytes=more,
        gain=chosen.damage - option.damage,
        gain_per_byte=gain,
    )
