"""A sweep's plan: what YAML may say, the grid it means, where runs are evaluated, and at which rate they learn."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptquant.core.errors import UserError
from cptquant.core.sweep import (
    CorpusSpec,
    EvaluationSpec,
    SizeSpec,
    SweepPlan,
    evaluation_points,
    learning_rate,
    make_grid,
    parse_tokens,
    point_tokens,
    trained_tokens,
)
from cptquant.core.sweep_file import parse_plan, read_plan


@pytest.fixture
def raw(tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "models").mkdir()
    corpus = {"train": "text.txt", "valid": "text.txt"}
    return {
        "family": "embedded:opt-mini",
        "sizes": ["0.6M", {"hidden": 64, "layers": 2}, {"name": "own", "path": "models"}],
        "pretrain": {"tokens": "2M"},
        "general": corpus,
        "domains": {"law": dict(corpus), "medical": dict(corpus)},
        "ratios": [0, 0.25, 1],
        "tokens": "1M",
    }


def test_a_plan_is_read(raw: dict, tmp_path: Path) -> None:
    plan = parse_plan(raw, tmp_path / "plan.yaml")
    assert [size.name for size in plan.sizes] == ["0.6M", "64x2", "own"]
    assert (plan.sizes[0].parameters, plan.tokens, plan.pretrain and plan.pretrain.tokens) == (
        600_000,
        10**6,
        2 * 10**6,
    )
    assert plan.general.train == (str(tmp_path / "text.txt"),) and plan.sizes[2].path == str(tmp_path / "models")


def test_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(UserError, match=r"plan\.yaml does not exist; give a plan as docs/sweep\.md"):
        read_plan(path)
    path.write_text("ratios: [0, 1\ntokens: 3")
    with pytest.raises(UserError, match=r"plan\.yaml is not valid YAML: .*line 2"):
        read_plan(path)
    path.write_text("- 1")
    with pytest.raises(UserError, match=r"is \[1\]; expected keys: family, sizes, pretrain"):
        read_plan(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": [1]}, "has the unknown key 'ratio'; allowed: family, sizes"),
        ({"ratios": [0, 1.4]}, r"ratios\[1\] is 1.4; expected the domain's share of the tokens, 0 to 1 \(is it perc"),
        ({"ratios": [-0.1]}, r"ratios\[0\] is -0.1; expected the domain's share of the tokens, 0 to 1$"),
        ({"ratios": [0.5, 0.5]}, r"ratios\[1\] is 0.5; which stands there already; keep one"),
        ({"ratios": [0]}, r"has ratios = \[0\]; a sweep needs a share of domain text"),
        ({"ratios": []}, "ratios is empty; give at least one value"),
        ({"tokens": "many"}, "tokens is 'many'; expected tokens from 10,000 up, e.g. 500k, 2M, 1.5e6"),
        ({"tokens": 500}, "tokens is 500; expected tokens from 10,000 up"),
        ({"tokens": "60k"}, "has evaluations.first = 100,000; it must lie below tokens = 60,000"),
        ({"sizes": ["nowhere"]}, r"sizes\[0\] is 'nowhere'; which is no folder; expected a model's folder"),
        ({"sizes": [{"hidden": 64}]}, r"sizes\[0\] has hidden; say what it is by hidden and layers, by parameters"),
        ({"sizes": ["1M", {"name": "1M", "hidden": 64, "layers": 1}]}, "has two sizes called '1M'"),
        ({"sizes": [5]}, r"sizes\[0\] is 5; expected parameters of the blocks from 10k to 10T"),
        ({"domains": {}}, r"domains is \{\}; expected domains by name"),
        ({"domains": {"general": {}}}, "domains.general has the name 'general'; a domain is called by letters"),
        ({"domains": {"law": {"train": "text.txt"}}}, "domains.law has no key valid; it needs train, valid"),
        ({"general": {"train": "no.txt", "valid": "text.txt"}}, "general.train is 'no.txt'; and .*no.txt does not e"),
        ({"learning_rate": 0}, "learning_rate is 0; expected a number above 0, at most 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number from 0 to 1"),
        ({"anneal": 0.95}, "anneal is 0.95; expected a number from 0 to 0.9"),
        ({"batch": 2.5}, "batch is 2.5; expected a whole number from 1 to 65,536"),
        ({"batch": 16, "gpus": 3}, "has batch = 16; it must be a multiple of gpus = 3, which share it"),
        ({"quantize": [1]}, r"quantize\[0\] is 1; expected a whole number from 2 to 8"),
        ({"seeds": [True]}, r"seeds\[0\] is True; expected a whole number"),
        ({"evaluations": {"first": "200k", "decay": 19, "count": 400}}, "two of the points fall on step"),
        ({"evaluations": {"windows": 2}}, "evaluations.windows is 2; expected a whole number from 8"),
        ({"pretrain": None, "sizes": ["1M"]}, "pretrain is None; expected keys: tokens, learning_rate"),
    ],
)  # fmt: skip
def test_wrong_values_are_told_by_their_place(raw: dict, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_plan(raw | changes, tmp_path / "plan.yaml")


@pytest.mark.parametrize("key", ["family", "sizes", "general", "domains", "ratios", "tokens"])
def test_missing_keys(raw: dict, tmp_path: Path, key: str) -> None:
    del raw[key]
    with pytest.raises(UserError, match=f"has no key {key}; it needs family, sizes, general, domains, ratios, tokens"):
        parse_plan(raw, tmp_path / "plan.yaml")


def test_sizes_without_a_folder_need_pretraining(raw: dict, tmp_path: Path) -> None:
    del raw["pretrain"]
    with pytest.raises(UserError, match="has no key pretrain; sizes that are no folders are trained from scratch"):
        parse_plan(raw, tmp_path / "plan.yaml")


def plan(**changes: object) -> SweepPlan:
    corpus = CorpusSpec(train=("a",), valid="b")
    values = {
        "family": "f", "sizes": (SizeSpec(name="s"), SizeSpec(name="m")), "pretrain": None, "general": corpus,
        "domains": {"law": corpus, "code": corpus}, "ratios": (0.0, 0.5), "tokens": 2**20, "seeds": (0, 1), **changes,
    }  # fmt: skip
    return SweepPlan.model_validate(values)


def test_grid() -> None:
    grid = make_grid(plan())
    assert len(grid) == 2 * (1 + 2) * 2  # a run without domain text serves every domain
    assert grid[0].id == "general-s-r0-s0" and grid[0].judged == ("law", "code") and grid[0].domain == ""
    assert grid[2].id == "law-s-r0.5-s0" and grid[2].judged == ("law",)
    assert len({run.id for run in grid}) == len(grid)
    assert {run.id for run in make_grid(plan(ratios=(0.5,)))} < {run.id for run in grid}


@given(st.integers(2, 40), st.floats(0.01, 8), st.floats(1, 1e6), st.floats(1.01, 100))
def test_points_are_sparser_and_sparser(count: int, decay: float, first: float, factor: float) -> None:
    points = point_tokens(first, factor * first, count, decay)
    assert points[0] == pytest.approx(first) and points[-1] == pytest.approx(factor * first)
    gaps = [b - a for a, b in pairwise(points)]
    assert all(b > a * (1 - 1e-6) for a, b in pairwise(gaps))


def test_the_frequency_of_points_decays_exponentially() -> None:
    """Many points: their density at the middle over that at the beginning is exp(-decay / 2)."""
    points = point_tokens(0.0, 1.0, 100_001, 3.0)
    early, middle = sum(p < 0.01 for p in points), sum(0.5 <= p < 0.51 for p in points)
    assert middle / early == pytest.approx(math.exp(-1.5), rel=0.01)
    even = point_tokens(0.0, 1.0, 5, 0.0)
    assert even == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_points_in_steps() -> None:
    wanted = plan(evaluations=EvaluationSpec(count=3, first=100_000), anneal=0.25)
    points = evaluation_points(wanted)
    assert points[-1].tokens == 2**20 and points[-1].last_step == 512 and points[-1].branch_step == 384
    assert points[0].tokens == 49 * 2048 and points[0].branch_step == 37
    anneals = sum(point.last_step - point.branch_step for point in points)
    assert trained_tokens(wanted, points) == (384 + anneals) * 2048


def test_rates() -> None:
    rates = [learning_rate(step, 1.0, 4) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    branch = [learning_rate(step, 1.0, 4, branch_step=6, last_step=10) for step in range(5, 10)]
    assert branch == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2M", 2 * 10**6), ("500k", 500_000), ("1.5e6", 1_500_000), ("1B", 10**9), (7, 7), ("1_000", 1000), ("0", None),
     ("x", None), (True, None), ("nan", None), ("-3k", None)],
)  # fmt: skip
def test_tokens(text: str, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens
