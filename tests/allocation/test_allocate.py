import json
import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.brute_force_plan import best_plan, counted_bytes, every_plan, exact_damage

from allocation.made_layouts import (
    FUSED,
    TRANSFORMERS,
    make_layout,
    make_table,
    parse_formats,
    table_of,
    typical_damage,
)
from cptquant.allocation.allocate import allocate, solve_problem, source_digests
from cptquant.allocation.choices import build_problem
from cptquant.allocation.kmeans import KMeans
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.methods import ALLOCATORS
from cptquant.allocation.problem import Solution
from cptquant.allocation.uniform import Uniform
from cptquant.core.budget import Budget
from cptquant.core.errors import ArtifactError, BudgetError, CptquantError, FormatError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.sensitivity import Damage
from cptquant.core.targets import find_target

FORMATS = parse_formats("int2-g16", "int4-g16", "int8-g32")


def budget_of(limit_bytes, scope):
    return Budget(limit_bytes, "bytes", scope, f"{limit_bytes}B")


@st.composite
def small_cases(draw):
    """Up to six sites with ties, a shared or separate head, rows that groups do not divide, and equal damages."""
    columns = draw(st.sampled_from([16, 32, 48]))
    tied_rows = draw(st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=2))
    other = draw(st.lists(st.tuples(st.sampled_from([4, 8]), st.sampled_from([16, 24, 32])), max_size=2))
    first = [(rows, columns) for rows in tied_rows] + other
    with_head = draw(st.booleans())
    layout = make_layout(
        [first],
        embedding=(draw(st.sampled_from([8, 12])), 16) if with_head else None,
        head=with_head,
        shared=with_head and draw(st.booleans()),
        ties=[[f"block.0.{i}" for i in range(len(tied_rows))]] if len(tied_rows) > 1 else [],
        kept=draw(st.sampled_from([0, 5])),
    )
    target = FUSED if draw(st.booleans()) else TRANSFORMERS
    formats = draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3, unique=True))
    values = st.integers(0, 6).map(lambda count: count / 8)
    drawn: dict[tuple[str, str], float] = {}
    table = make_table(layout, formats, lambda site, fmt: drawn.setdefault((site, fmt.name), draw(values)))
    scope = draw(st.sampled_from(["file", "sites"]))
    return layout, table, target, formats, scope


@settings(deadline=None, max_examples=120)
@given(small_cases(), st.floats(0, 1))
def test_knapsack_equals_brute_force(case, fraction):
    layout, table, target, formats, scope = case
    problem = build_problem(layout, table, target, formats, scope)
    sizes = [counted_bytes(layout, plan, scope) for plan in every_plan(layout, target, formats, scope)]
    assert problem.smallest_bytes == min(sizes)
    keep_all = dict.fromkeys((site.name for site in layout.sites), layout.keep_format)
    assert problem.bytes_at_16_bit == counted_bytes(layout, keep_all, scope)
    limit = int(min(sizes) + fraction * (problem.bytes_at_16_bit - min(sizes)))

    plan = allocate(layout, table, budget_of(limit, scope), target, Knapsack(), formats=formats)

    best = best_plan(layout, table, target, formats, scope, limit)
    found = exact_damage(table, plan.quant_formats), counted_bytes(layout, plan.quant_formats, scope)
    assert best is not None
    assert found == best
    assert plan.predicted_damage == float(best[0])
    assert (plan.status, plan.optimality_gap) == (SolverStatus.OPTIMAL, 0.0)


@settings(deadline=None, max_examples=100)
@given(small_cases(), st.floats(0, 1), st.integers(0, 3), st.sampled_from(sorted(ALLOCATORS)))
def test_every_allocator_is_legal_and_within_its_budget(case, fraction, seed, name):
    layout, table, target, formats, scope = case
    problem = build_problem(layout, table, target, formats, scope)
    limit = int(problem.smallest_bytes + fraction * (problem.bytes_at_16_bit - problem.smallest_bytes))
    try:
        plan = allocate(layout, table, budget_of(limit, scope), target, ALLOCATORS[name], formats=formats, seed=seed)
    except BudgetError as error:  # a rule may need more than the knapsack does, and says how much
        assert f"--allocator {name} can make" in str(error)
        assert name not in ("knapsack", "random")
        return
    chosen = plan.quant_formats
    assert list(plan.formats) == [site.name for site in layout.sites]
    assert plan.size_bytes == layout.plan_bytes(chosen)
    assert plan.site_bytes == layout.block_site_bytes(chosen)
    assert counted_bytes(layout, chosen, scope) <= limit == plan.limit_bytes
    assert all(target.refusal(site, chosen[site.name]) is None for site in layout.sites)
    if scope == "sites":
        assert all(chosen[site.name].is_float for site in layout.sites if site.block_index is None)
    for tie in target.ties(layout):  # rows of a tie have one length here, so one request is one format
        assert len({plan.formats[name] for name in tie.sites}) == 1
    assert plan.predicted_damage == float(exact_damage(table, chosen))
    best = allocate(layout, table, budget_of(limit, scope), target, Knapsack(), formats=formats)
    assert best.predicted_damage <= plan.predicted_damage


def model_layout(blocks=6):
    """Six blocks of six sites, a shared embedding and head that are much of the file."""
    block = [(64, 64)] * 4 + [(256, 64), (64, 256)]
    ties = [[f"block.{i}.{s}" for s in range(3)] for i in range(blocks)]
    return make_layout([block] * blocks, embedding=(500, 64), head=True, shared=True, ties=ties, kept=777)


MODEL_FORMATS = parse_formats("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")


@pytest.mark.parametrize("target", [TRANSFORMERS, FUSED], ids=lambda target: target.name)
@pytest.mark.parametrize("scope", ["file", "sites"])
def test_more_bytes_never_hurt(scope, target):
    layout = model_layout()
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    problem = build_problem(layout, table, target, MODEL_FORMATS, scope)
    damages = []
    for index in range(30):
        limit = problem.smallest_bytes + (problem.bytes_at_16_bit - problem.smallest_bytes) * index // 29
        plan = allocate(layout, table, budget_of(limit, scope), target, Knapsack(), formats=MODEL_FORMATS)
        assert plan.status is SolverStatus.OPTIMAL
        damages.append(plan.predicted_damage)
    assert all(later <= earlier for earlier, later in pairwise(damages))
    assert damages[-1] == 0


@pytest.mark.parametrize("text", ["3.5bpw@sites", "5bpw@sites", "5bpw", "20%", "220kB"])
def test_knapsack_is_no_worse_than_any_rule_by_the_tables_own_measure(text):
    layout = model_layout()
    table = make_table(layout, MODEL_FORMATS, typical_damage(1), block_scores=[9, 4, 1, 1, 4, 8])
    plans = {
        name: allocate(layout, table, Budget.parse(text), TRANSFORMERS, allocator, formats=MODEL_FORMATS)
        for name, allocator in ALLOCATORS.items()
    }
    assert all(plans["knapsack"].predicted_damage < plan.predicted_damage for name, plan in plans.items()
               if name != "knapsack")  # fmt: skip
    assert all(plan.status is SolverStatus.HEURISTIC for name, plan in plans.items() if name != "knapsack")
    assert all(plan.optimality_gap is None for name, plan in plans.items() if name != "knapsack")


def test_plan_states_everything():
    layout = model_layout()
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    plan = allocate(
        layout, table, Budget.parse("4.5bpw@sites"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS, seed=3
    )
    weights = sum(site.weight_count for site in layout.block_sites)
    assert plan.limit_bytes == int(weights * 4.5 / 8)
    assert plan.site_bytes <= plan.limit_bytes < plan.size_bytes
    assert plan.bits_per_weight == 8 * plan.size_bytes / layout.parameters
    assert plan.bits_per_weight_sites == 8 * plan.site_bytes / weights <= 4.5
    assert (plan.budget, plan.budget_scope) == ("4.5bpw@sites", "sites")
    assert (plan.target, plan.allocator) == ("transformers", "knapsack")
    assert (plan.sensitivity_method, plan.damage_unit) == ("ablation", "kl_nats_per_token")
    assert plan.inputs["layout"] == layout.digest() and plan.inputs["table"] == table.digest()
    assert plan.provenance.seed == 3
    assert plan.notes == (
        "kept in 16 bits, since an @sites budget counts the blocks' linear sites only: embedding, head",
    )
    expected = math.fsum(table.damages[site.name][plan.formats[site.name]].value for site in layout.block_sites)
    assert plan.predicted_damage == expected


def test_plan_survives_its_file(tmp_path):
    layout = model_layout()
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    plan = allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_inputs_change_with_every_option_and_not_with_time():
    layout = model_layout()
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    base = allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS)
    again = allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS)
    assert base.inputs == again.inputs and base.digest() == again.digest()
    others = [
        allocate(layout, None, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS),
        allocate(layout, table, Budget.parse("5.1bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS),
        allocate(layout, table, Budget.parse("5bpw"), FUSED, Uniform(), formats=MODEL_FORMATS),
        allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS),
        allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS[1:]),
        allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=MODEL_FORMATS, seed=1),
    ]
    assert len({json.dumps(plan.inputs) for plan in [base, *others]}) == 7


def test_a_shared_head_is_split_only_where_that_saves_bytes():
    layout = make_layout([[(16, 64)]], embedding=(400, 64), head=True, shared=True)
    formats = parse_formats("int4-g64", "int8-g64")
    table = make_table(layout, formats, lambda _site, fmt: 4.0**-fmt.code_bits)
    problem = build_problem(layout, table, TRANSFORMERS, formats, "file")
    shared = next(group for group in problem.groups if group.sites[0].name == "embedding")
    pairs = [tuple(fmt.name for fmt in option.formats) for option in shared.options]
    # 8 + 4 bits are fewer than 16; 8 + 8 with two sets of scales, and anything beside a 16-bit twin, are not
    assert sorted(pairs) == [("float16", "float16"), ("int8-g64-plain", "int4-g64")]
    whole = problem.bytes_at_16_bit
    assert (
        allocate(layout, table, budget_of(whole, "file"), TRANSFORMERS, Knapsack(), formats=formats).size_bytes == whole
    )
    split = allocate(layout, table, budget_of(whole - 2000, "file"), TRANSFORMERS, Knapsack(), formats=formats)
    assert (split.formats["embedding"], split.formats["head"]) == ("int8-g64-plain", "int4-g64")


def test_a_head_that_cannot_be_split_with_profit_says_so():
    layout = make_layout([[(16, 64)]], embedding=(400, 64), head=True, shared=True)
    formats = parse_formats("int8-g64")
    plan = allocate(layout, None, Budget.parse("15.9bpw"), TRANSFORMERS, Uniform(), formats=formats)
    assert (
        "embedding, head stay in 16 bits: embedding and head are one tensor, and quantized apart they would take no "
        "fewer bytes"
    ) in plan.notes


def test_notes_name_replaced_group_sizes_and_formats_the_target_cannot_hold():
    layout = make_layout([[(16, 96), (16, 64)]], embedding=(40, 64), head=True)
    formats = parse_formats("int4-g64")
    plan = allocate(layout, None, Budget.parse("4.6bpw@sites"), TRANSFORMERS, Uniform(), formats=formats)
    assert plan.formats["block.0.0"] == "int4-g32" and plan.formats["block.0.1"] == "int4-g64"
    assert "int4-g64 was asked for, int4-g32 is what 1 site can hold (first: block.0.0, 16 x 96)" in plan.notes
    plan = allocate(layout, None, Budget.parse("12bpw"), TRANSFORMERS, Uniform(), formats=formats)
    assert any(
        note.startswith("embedding stays in 16 bits: transformers 5.23 cannot load an embedding (or")
        for note in plan.notes
    )


def test_a_tie_with_rows_of_two_lengths_shares_the_requested_format():
    layout = make_layout([[(8, 64), (8, 96)]], ties=[["block.0.0", "block.0.1"]])
    formats = parse_formats("int2-g64", "int4-g64", "int8-g64")
    table = make_table(layout, formats, typical_damage())
    plan = allocate(layout, table, Budget.parse("5bpw@sites"), FUSED, Knapsack(), formats=formats)
    assert (plan.formats["block.0.0"], plan.formats["block.0.1"]) == ("int4-g64", "int4-g32")


def test_without_formats_the_tables_own_are_offered():
    layout = model_layout(2)
    table = make_table(layout, MODEL_FORMATS, typical_damage())
    given = allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS)
    taken = allocate(layout, table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=())
    assert taken.formats == given.formats


def test_a_damage_measured_for_16_bits_counts():
    layout = make_layout([[(8, 64), (8, 64)]])
    row = {"int4-g64": Damage(value=1.0), "float16": Damage(value=0.25)}
    table = table_of({site.name: row for site in layout.sites}, [1.0])
    plan = allocate(layout, table, Budget.parse("16bpw@sites"), TRANSFORMERS, Knapsack(), formats=())
    assert plan.predicted_damage == 0.5


def refusal(kind: type[UserError], *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        allocate(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_refuses_a_format_that_cannot_be_written():
    layout = model_layout(1)
    message = refusal(
        FormatError, layout, None, Budget.parse("5bpw"), TRANSFORMERS, Uniform(),
        formats=parse_formats("int4-g64", "int4-g64-asym"),
    )  # fmt: skip
    assert message == (
        "--formats int4-g64-asym is refused by --target transformers: compressed-tensors 0.20 writes packed zero "
        "points that transformers 5.23 cannot load (the meta-device layout leaves them unpacked); use the symmetric "
        "format, or one zero point per tensor"
    )


def test_refuses_no_formats_at_all():
    message = refusal(FormatError, model_layout(1), None, Budget.parse("5bpw"), TRANSFORMERS, Uniform(), formats=())
    assert message == "no candidate formats: give --formats, e.g. int3-g64,int4-g64, or a sensitivity table"


def test_refuses_a_table_without_a_requested_format():
    layout = model_layout(1)
    table = make_table(layout, MODEL_FORMATS[:2], typical_damage())
    message = refusal(
        ArtifactError, layout, table, Budget.parse("5bpw@sites"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS
    )
    assert message == (
        "sensitivity.json has no damage of int4-g64 at block.0.0, it has int2-g64, int3-g64, float16; choose "
        "--formats among those, or measure with the same --formats: cptquant measure RUN --sensitivity METHOD"
    )


def test_refuses_the_table_of_another_model():
    table = make_table(model_layout(2), MODEL_FORMATS, typical_damage())
    message = refusal(
        ArtifactError, model_layout(1), table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS
    )
    assert message == (
        "sensitivity.json has 6 sites that layout.json does not have (first: block.1.0): the two files are not of "
        "one model; make it anew with: cptquant measure RUN --sensitivity METHOD"
    )
    table = make_table(model_layout(1), MODEL_FORMATS, typical_damage())
    message = refusal(
        ArtifactError, model_layout(2), table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=MODEL_FORMATS
    )
    assert message == (
        "sensitivity.json has no row for block.1.0, a site of layout.json: the two files are not of one model; "
        "make it anew with: cptquant measure RUN --sensitivity METHOD"
    )


def test_refuses_an_infinite_damage():
    layout = make_layout([[(8, 64)]])
    table = table_of({"block.0.0": {"int4-g64": Damage(value=math.inf)}}, [1.0])
    message = refusal(ArtifactError, layout, table, Budget.parse("5bpw"), TRANSFORMERS, Knapsack(), formats=())
    assert message == (
        "sensitivity.json: the damage of int4-g64 at block.0.0 is inf, expected a finite number; make it anew with: "
        "cptquant measure RUN --sensitivity METHOD"
    )


@pytest.mark.parametrize(
    ("allocator", "verb"), [(Knapsack(), "minimises the damages"), (KMeans(), "clusters the block scores")]
)
def test_refuses_to_optimise_nothing(allocator, verb):
    message = refusal(
        ArtifactError, model_layout(1), None, Budget.parse("9bpw"), TRANSFORMERS, allocator, formats=MODEL_FORMATS
    )
    assert message == (
        f"--allocator {allocator.name} {verb} of a sensitivity table and none was given; make one with: "
        "cptquant measure RUN --sensitivity METHOD, or choose --allocator uniform"
    )


def test_refuses_a_layout_that_ties_a_site_it_does_not_have():
    layout = make_layout([[(8, 64)]], ties=[["block.0.0", "block.9.9"]])
    message = refusal(
        ArtifactError, layout, None, Budget.parse("5bpw"), FUSED, Uniform(), formats=parse_formats("int4-g64")
    )
    assert message == (
        "layout.json ties block.9.9, which is no site of it; make it anew with: cptquant inspect MODEL --output RUN"
    )


def test_an_allocator_that_breaks_the_limit_is_found_out():
    class Greedy:
        name = "greedy"
        needs_table = False

        def __call__(self, problem, *, seed):
            return Solution(tuple(group.option_of["float16"] for group in problem.groups), SolverStatus.HEURISTIC)

    layout = model_layout(1)
    problem = build_problem(layout, None, TRANSFORMERS, MODEL_FORMATS, "file").with_limit(90_000)
    with pytest.raises(CptquantError, match=r"--allocator greedy made a plan of 163,\d+ bytes under a limit of 90,000"):
        solve_problem(problem, TRANSFORMERS, Greedy(), sources=source_digests(layout, None))


def test_overlapping_ties_are_one_group():
    layout = make_layout([[(8, 64)] * 4], ties=[["block.0.0", "block.0.1"], ["block.0.2", "block.0.1"]])
    problem = build_problem(layout, None, FUSED, parse_formats("int4-g64"), "file")
    assert [[site.name for site in group.sites] for group in problem.groups] == [
        ["block.0.2", "block.0.0", "block.0.1"], ["block.0.3"],
    ]  # fmt: skip


def test_formats_of_equal_effect_are_one_option():
    layout = make_layout([[(8, 24)]])
    problem = build_problem(layout, None, TRANSFORMERS, parse_formats("int4-g64", "int4-g32", "int8-g64"), "file")
    (group,) = problem.groups
    assert [option.formats[0].name for option in group.options] == ["int4-channel", "int8-channel", "float16"]
    assert group.option_of == {"int4-g64": 0, "int4-g32": 0, "int8-g64": 1, "float16": 2}
    assert Fraction(group.options[0].size_bytes) == QuantFormat.parse("int4-channel").stored_bytes(8, 24)


def test_the_plan_states_what_leaving_columns_uncorrected_costs():
    layout = make_layout([[(16, 256), (16, 256)]])
    plan = allocate(layout, None, Budget.parse("8bpw@sites"), TRANSFORMERS, Uniform(),
                    formats=parse_formats("int3-g64-c2"))  # fmt: skip
    corrected, wider = (2 * QuantFormat.parse(name).stored_bytes(16, 256) for name in ("int3-g64-c2", "int4-g64"))
    assert plan.notes[1] == (
        "int3-g64-c2 was asked for, int4-g64 is what 2 sites can hold (first: block.0.0, 16 x 256): one width for the "
        f"whole matrix, {wider - corrected:,} bytes more ({wider:,} instead of {corrected:,})"
    )


def test_of_several_formats_that_become_one_the_likest_is_named():
    """176 columns hold neither groups of 64 nor two widths; nobody asked for the latter when they gave 4 bits."""
    layout = make_layout([[(16, 176)]]).model_copy(update={"model_type": "llama"})
    wanted = parse_formats("slim3-g64-halves", "int4-g64")
    plan = allocate(layout, None, Budget.parse("8bpw@sites"), find_target("onnx"), Uniform(), formats=wanted)
    assert plan.notes[1].startswith("int4-g64 was asked for, int4-g16 is what 1 site can hold")


def test_the_plan_states_what_promotion_costs():
    layout = make_layout([[(16, 256), (16, 256)]]).model_copy(update={"model_type": "llama"})
    wanted = parse_formats("slim2-g64")
    plan = allocate(layout, None, Budget.parse("8bpw@sites"), find_target("gguf"), Uniform(), formats=wanted)
    mixed = 2 * (16 * 256 * 2 // 8 + 2 * 16 * 4 + 1 + 16)
    one_width = 2 * 16 * 110  # Q3_K: 110 bytes for 256 weights
    assert plan.site_bytes == one_width
    assert plan.notes[1] == (
        "slim2-g64 was asked for, Q3_K is what 2 sites can hold (first: block.0.0, 16 x 256): one width for the whole "
        f"matrix, {one_width - mixed:,} bytes more ({one_width:,} instead of {mixed:,})"
    )
