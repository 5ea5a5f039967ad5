"""Explanations: every number counted again, by trying all changes of single groups."""

import math

import pytest

from allocation.made_layouts import FUSED, TRANSFORMERS, make_layout, make_table, parse_formats, typical_damage
from allocation.test_allocate import MODEL_FORMATS, model_layout
from cptquant.allocation.allocate import allocate
from cptquant.allocation.choices import build_problem
from cptquant.allocation.hull import trace_hull
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.price import explain_plan
from cptquant.allocation.uniform import Uniform
from cptquant.core.budget import Budget
from cptquant.core.errors import ArtifactError
from cptquant.core.explanation import Verdict

LAYOUT = model_layout()
TABLE = make_table(LAYOUT, MODEL_FORMATS, typical_damage())


def explained(text="4bpw@sites", target=TRANSFORMERS, allocator=None):
    plan = allocate(LAYOUT, TABLE, Budget.parse(text), target, allocator or Knapsack(), formats=MODEL_FORMATS)
    return plan, explain_plan(LAYOUT, TABLE, target, plan, MODEL_FORMATS)


@pytest.mark.parametrize("target", [TRANSFORMERS, FUSED], ids=lambda target: target.name)
@pytest.mark.parametrize("text", ["2.6bpw@sites", "4bpw@sites", "6bpw"])
def test_the_numbers_are_those_of_table_and_layout(text, target):
    plan, found = explained(text, target)
    assert sorted(name for group in found.groups for name in group.sites) == sorted(plan.formats)
    for group in found.groups:
        chosen = group.chosen
        assert chosen.formats == tuple(plan.formats[name] for name in group.sites)
        assert [offer.chosen for offer in group.offers].count(True) == 1
        if group.verdict is Verdict.OUT_OF_SCOPE or "embedding" in group.sites:
            continue
        for offer in group.offers:
            damage = math.fsum(
                TABLE.damages[name][fmt].value for name, fmt in zip(group.sites, offer.formats, strict=True)
            )
            assert offer.damage == pytest.approx(damage, rel=1e-14)
            stored = [parse_formats(fmt)[0].stored_bytes(LAYOUT.site_by_name[name].out_features,
                                                         LAYOUT.site_by_name[name].in_features)
                      for name, fmt in zip(group.sites, offer.formats, strict=True)]  # fmt: skip
            assert offer.size_bytes == sum(stored)
            if offer.size_bytes != chosen.size_bytes:
                slope = (chosen.damage - offer.damage) / (offer.size_bytes - chosen.size_bytes)
                assert offer.gain_per_byte == pytest.approx(slope)
            else:
                assert offer.gain_per_byte is None
    assert found.counted_bytes == (plan.site_bytes if "@" in text else plan.size_bytes)
    assert found.slack_bytes == plan.limit_bytes - found.counted_bytes >= 0
    assert found.damage == pytest.approx(plan.predicted_damage, rel=1e-12)
    assert found.least_damage == pytest.approx(plan.predicted_damage, rel=1e-12)


@pytest.mark.parametrize("text", ["2.6bpw@sites", "4bpw@sites", "6bpw"])
def test_the_price_is_the_slope_of_the_frontier_and_decides(text):
    plan, found = explained(text)
    hull = trace_hull(build_problem(LAYOUT, TABLE, TRANSFORMERS, MODEL_FORMATS, plan.budget_scope))
    below = max((vertex for vertex in hull if vertex.counted_bytes <= plan.limit_bytes), key=lambda v: v.counted_bytes)
    assert found.price_per_byte == pytest.approx(below.gain_per_byte)
    verdicts = [group.verdict for group in found.groups]
    assert verdicts.count(Verdict.PRICE) > 0.8 * len([v for v in verdicts if v is not Verdict.OUT_OF_SCOPE])
    for group in found.groups:
        costs = {offer.formats: offer.damage + found.price_per_byte * offer.size_bytes for offer in group.offers}
        least = min(costs.values())
        for offer in group.offers:
            assert offer.at_price == (costs[offer.formats] <= least * (1 + 1e-9))
        if group.verdict is Verdict.PRICE:
            for offer in group.offers:
                if offer.size_bytes > group.chosen.size_bytes:
                    assert offer.gain_per_byte <= found.price_per_byte * (1 + 1e-6)
                elif offer.size_bytes < group.chosen.size_bytes:
                    assert offer.gain_per_byte >= found.price_per_byte * (1 - 1e-6)
    assert Verdict.NOT_THE_PRICE not in verdicts


def test_the_next_byte_buys_the_best_change_there_is():
    _, found = explained()
    best = max(
        (offer.gain_per_byte, -(offer.size_bytes - group.chosen.size_bytes), group.sites, offer.formats)
        for group in found.groups
        for offer in group.offers
        if offer.size_bytes > group.chosen.size_bytes
    )
    step = found.next_step
    assert step is not None
    assert (step.gain_per_byte, -step.more_bytes, step.sites, step.after) == best
    assert step.gain == pytest.approx(step.gain_per_byte * step.more_bytes)
    assert all(
        len(group.offers) == 1 for group in explained("16bpw@sites")[1].groups if group.verdict is Verdict.OUT_OF_SCOPE
    )
    assert explained("16bpw@sites")[1].next_step is None


def test_an_edited_or_uniform_plan_is_not_explained_by_the_price():
    _, found = explained("4.5bpw@sites", allocator=Uniform())
    assert Verdict.NOT_THE_PRICE in [group.verdict for group in found.groups]
    assert found.damage > found.least_damage
    plan, _ = explained()
    site = next(name for name, fmt in plan.formats.items() if fmt == "int2-g64")
    edited = plan.model_copy(update={"formats": {**plan.formats, site: "int8-g64"}})
    again = explain_plan(LAYOUT, TABLE, TRANSFORMERS, edited, MODEL_FORMATS)
    assert next(group for group in again.groups if site in group.sites).verdict is Verdict.NOT_THE_PRICE


def test_rules_of_the_target_are_named():
    layout = make_layout([[(64, 64), (64, 96), (64, 64)]], ties=[["block.0.0", "block.0.2"]])
    formats = parse_formats("int3-g64", "int4-g64")
    table = make_table(layout, formats, typical_damage())
    plan = allocate(layout, table, Budget.parse("5bpw@sites"), FUSED, Knapsack(), formats=formats)
    found = explain_plan(layout, table, FUSED, plan, formats)
    tied, odd = (next(g for g in found.groups if name in g.sites) for name in ("block.0.0", "block.0.1"))
    assert tied.sites == ("block.0.0", "block.0.2") and tied.shared == "fused"
    assert tied.restrictions == ()
    assert [(r.requested, r.held) for r in odd.restrictions] == [("int3-g64", "int3-g32"), ("int4-g64", "int4-g32")]
    assert all("96" in restriction.reason for restriction in odd.restrictions)


def test_a_format_that_is_no_choice_is_named():
    plan, _ = explained()
    site = next(name for name in plan.formats if name.startswith("block"))
    other = plan.model_copy(update={"formats": {**plan.formats, site: "int7-g64"}})
    with pytest.raises(ArtifactError, match=r"int7-g64"):
        explain_plan(LAYOUT, TABLE, TRANSFORMERS, other, MODEL_FORMATS)


def test_a_limit_that_nothing_meets_has_no_price():
    plan, _ = explained()
    tight = plan.model_copy(update={"limit_bytes": 10})
    found = explain_plan(LAYOUT, TABLE, TRANSFORMERS, tight, MODEL_FORMATS)
    assert found.price_per_byte is None and found.least_damage is None
    assert found.slack_bytes == 10 - plan.site_bytes
    assert not any(offer.at_price for group in found.groups for offer in group.offers if len(group.offers) > 1)
