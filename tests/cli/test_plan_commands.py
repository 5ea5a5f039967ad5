"""`explain`, `what-if` and `diff` on run folders made without a model, and what they say when something is missing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from allocation.made_layouts import TRANSFORMERS, make_layout, make_table, parse_formats, typical_damage

from cptquant.allocation.allocate import allocate
from cptquant.allocation.knapsack import Knapsack
from cptquant.core.artifact import digest_json
from cptquant.core.budget import Budget
from cptquant.core.evaluation import EvaluationReport, Measurement
from cptquant.core.manifest import Manifest
from cptquant.core.plan import Plan
from cptquant.core.settings import RunSettings
from cptquant.stages.calibration import find_measured

FORMATS = parse_formats("int2-g64", "int3-g64", "int4-g64", "int8-g64")
LAYOUT = make_layout([[(64, 64), (128, 64)]] * 4, embedding=(100, 64))
TABLE = make_table(LAYOUT, FORMATS, typical_damage())


def write_run(folder: Path, budget: str = "3.5bpw@sites", layout=LAYOUT, table=TABLE) -> Path:
    folder.mkdir()
    layout.save(folder / "layout.json")
    table.save(folder / "sensitivity.json")
    RunSettings(model="made", budget=budget).save(folder / "settings.json")
    plan = allocate(layout, table, Budget.parse(budget), TRANSFORMERS, Knapsack(), formats=FORMATS)
    plan.save(folder / "plan.json")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def refused(outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


def test_explain_shows_every_site_and_one_site_in_full(cptquant: Callable, run: Path) -> None:
    plan = Plan.load(run / "plan.json")
    outcome = cptquant("explain", run)
    assert outcome.code == 0, outcome.err
    for site, fmt in plan.formats.items():
        line = next(line for line in outcome.out.splitlines() if line.startswith(f"{site} "))
        assert fmt in line
    assert f"{plan.site_bytes:,} of {plan.limit_bytes:,} bytes used (linear sites of the blocks)" in outcome.out
    assert "The next " in outcome.out and "Price: " in outcome.out
    one = cptquant("explain", run / "plan.json", "--site", "block.1.0")
    assert one.code == 0, one.err
    for fmt in FORMATS:
        assert fmt.name in one.out
    assert f"→ {plan.formats['block.1.0']}" in one.out and "Decided by: " in one.out
    found = json.loads(cptquant("explain", run, "--site", "block.1.0", "--json").out)
    assert [group["sites"] for group in found["groups"]] == [["block.1.0"]]
    assert {offer["formats"][0] for offer in found["groups"][0]["offers"]} == {*(f.name for f in FORMATS), "float16"}


def test_an_edited_plan_is_explained_and_a_wrong_size_is_not(cptquant: Callable, run: Path) -> None:
    plan = Plan.load(run / "plan.json")
    narrow = next(name for name, fmt in plan.formats.items() if fmt == "int2-g64")
    edited = plan.model_copy(update={"formats": {**plan.formats, narrow: "int8-g64"}})
    edited.save(run / "plan.json")
    refused(cptquant("explain", run), f"plan.json says size_bytes = {plan.size_bytes}, site_bytes = ")
    size_bytes = LAYOUT.plan_bytes(edited.quant_formats)
    sizes = {"size_bytes": size_bytes, "site_bytes": plan.site_bytes + size_bytes - plan.size_bytes}
    edited.model_copy(update=sizes).save(run / "plan.json")
    outcome = cptquant("explain", run, "--site", narrow)
    assert outcome.code == 0, outcome.err
    assert "too many: the plan exceeds its limit." in outcome.out and "not the price" in outcome.out
    found = json.loads(cptquant("explain", run, "--json").out)
    assert found["slack_bytes"] == plan.limit_bytes - plan.site_bytes - (size_bytes - plan.size_bytes) < 0


def test_explain_refuses_what_it_cannot_explain(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    refused(
        cptquant("explain", run, "--site", "block.9"), "--site 'block.9' is none of the plan's 9 sites", "block.0.0"
    )
    refused(cptquant("explain", tmp_path / "nowhere"), "does not exist; give a run folder or a plan.json")
    refused(cptquant("explain", tmp_path), "holds no plan.json; make it with: cptquant allocate", "--budget BUDGET")
    (run / "sensitivity.json").rename(run / "away.json")
    refused(cptquant("explain", run), "holds no sensitivity.json", f"cptquant measure {run} --sensitivity METHOD")


def test_a_table_of_another_model_is_refused(cptquant: Callable, run: Path) -> None:
    other = make_layout([[(64, 64)]] * 7, embedding=(100, 64))
    make_table(other, FORMATS, typical_damage()).save(run / "sensitivity.json")
    refused(cptquant("explain", run), "the two files are not of one model")
    refused(cptquant("what-if", run, "--more", "1kB"), "the two files are not of one model")


def test_another_table_is_said(cptquant: Callable, run: Path) -> None:
    make_table(LAYOUT, FORMATS, typical_damage(3)).save(run / "sensitivity.json")
    outcome = cptquant("explain", run)
    assert outcome.code == 0 and "The plan was made from another table than the one at hand, ablation." in outcome.out


def test_what_if_gives_the_plan_of_the_new_limit(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    before, files = Plan.load(run / "plan.json"), sorted(run.rglob("*"))
    found = json.loads(cptquant("what-if", run, "--more", "2kB", "--json").out)
    limit = Budget(before.limit_bytes + 2000, "bytes", "sites")
    wanted = allocate(LAYOUT, TABLE, limit, TRANSFORMERS, Knapsack(), formats=FORMATS)
    assert found["after"]["size_bytes"] == wanted.size_bytes
    assert found["after"]["damage"] == pytest.approx(wanted.predicted_damage)
    differing = {name for name in before.formats if before.formats[name] != wanted.formats[name]}
    assert {change["site"] for change in found["changes"]} == differing != set()
    moved = sum(change["bytes_after"] - change["bytes_before"] for change in found["changes"])
    assert moved == wanted.size_bytes - before.size_bytes
    assert sorted(run.rglob("*")) == files, "what-if wrote into the run folder"
    path = tmp_path / "more.json"
    outcome = cptquant("what-if", run, "--budget", "4.5bpw@sites", "--output", path)
    assert outcome.code == 0, outcome.err
    assert Plan.load(path).formats == allocate(
        LAYOUT, TABLE, Budget.parse("4.5bpw@sites"), TRANSFORMERS, Knapsack(), formats=FORMATS
    ).formats  # fmt: skip
    assert cptquant("what-if", run, "--less", "0.5bpw").code == 0


def test_what_if_refuses(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    refused(cptquant("what-if", run), "nothing was given; say one of --more 20MB, --less 20MB or --budget")
    refused(cptquant("what-if", run, "--more", "1kB", "--less", "1kB"), "--more and --less was given")
    refused(cptquant("what-if", run, "--more", "lots"), "--more 'lots' is not readable")
    outcome = cptquant("what-if", run, "--less", "20MB")
    plan = Plan.load(run / "plan.json")
    smallest = LAYOUT.block_site_bytes({site.name: FORMATS[0] for site in LAYOUT.block_sites})
    refused(outcome, "--less 20MB makes the limit", f"give --less {plan.limit_bytes - smallest}B at most")
    assert cptquant("what-if", run, "--less", f"{plan.limit_bytes - smallest}B").code == 0
    refused(cptquant("what-if", run, "--less", f"{plan.limit_bytes - smallest + 1}B"), "outside the reachable")
    refused(cptquant("what-if", run, "--budget", "1bpw@sites"), "--budget 1bpw@sites allows", "too few; reachable")
    refused(
        cptquant("what-if", run, "--more", "1kB", "--output", tmp_path / "no" / "x.json"), "choose another --output"
    )


def test_what_if_counts_what_the_budget_counts(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    one, two = (cptquant("what-if", run, "--more", text, "--json") for text in ("0.5bpw", "0.5bpw@sites"))
    assert one.code == 0, one.err
    first, second = (json.loads(outcome.out)["after"] for outcome in (one, two))
    assert {**first, "label": ""} == {**second, "label": ""}
    whole = write_run(tmp_path / "whole", "6bpw")
    refused(
        cptquant("what-if", whole, "--more", "0.5bpw@sites"),
        "--more '0.5bpw@sites' counts the sites, the plan's budget the whole file; leave @sites out",
    )
    assert cptquant("what-if", whole, "--more", "0.5bpw").code == 0
    refused(cptquant("what-if", run, "--less", "1kB@sites"), "--less '1kB@sites': @sites goes with bpw only")


@pytest.mark.parametrize("seed", ["-1", "1.5", "²", ""])
def test_what_if_refuses_a_plan_with_a_damaged_seed(cptquant: Callable, run: Path, seed: str) -> None:
    plan = Plan.load(run / "plan.json")
    plan.model_copy(update={"inputs": {**plan.inputs, "seed": seed}}).save(run / "plan.json")
    refused(
        cptquant("what-if", run, "--more", "1kB"),
        f"{run}: inputs.seed is {seed!r}, expected a whole number; allocate the plan again",
    )


def test_diff_is_symmetric(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "5bpw@sites")
    one, two = (json.loads(cptquant("diff", *pair, "--json").out) for pair in ((run, other), (other, run)))
    assert one["before"] == two["after"] and one["after"] == two["before"]
    swapped = [
        {**change, "before": change["after"], "after": change["before"], "bytes_before": change["bytes_after"],
         "bytes_after": change["bytes_before"]}
        for change in two["changes"]
    ]  # fmt: skip
    assert one["changes"] == swapped != []
    plans = [Plan.load(folder / "plan.json") for folder in (run, other)]
    assert {c["site"] for c in one["changes"]} == {
        name for name in LAYOUT.site_by_name if plans[0].formats[name] != plans[1].formats[name]
    }
    moved = sum(change["bytes_after"] - change["bytes_before"] for change in one["changes"])
    assert moved == plans[1].size_bytes - plans[0].size_bytes
    assert one["before"]["damage"] == pytest.approx(plans[0].predicted_damage)
    outcome = cptquant("diff", run, other)
    assert f"{moved:+,} bytes in the file" in outcome.out and f"{len(one['changes'])} sites differ" in outcome.out
    same = cptquant("diff", run, run / "plan.json")
    assert same.code == 0 and "No site differs." in same.out and "+0 bytes in the file" in same.out


def test_diff_refuses_plans_of_different_models(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    layout = make_layout([[(64, 64)]] * 3).model_copy(update={"source_digest": "1", "source": "else"})
    other = write_run(tmp_path / "other", "5bpw@sites", layout, make_table(layout, FORMATS, typical_damage()))
    refused(cptquant("diff", run, other), "is a plan of made", "of else", "sites of the first are not in the second")
    same = LAYOUT.model_copy(update={"source_digest": "2", "source": "tuned"})
    third = write_run(tmp_path / "third", "5bpw@sites", same, TABLE)
    refused(cptquant("diff", run, third), "the same names, other weights")


def test_diff_does_not_compare_damages_of_different_tables(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "5bpw@sites", table=make_table(LAYOUT, FORMATS, typical_damage(5)))
    outcome = cptquant("diff", run, other)
    assert outcome.code == 0, outcome.err
    assert "Made from different sensitivity tables: their damages do not compare." in outcome.out
    assert "after over before" not in outcome.out


def test_diff_says_that_a_table_is_not_the_plans_own(cptquant: Callable, run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "5bpw@sites")
    for folder in (run, other):
        make_table(LAYOUT, FORMATS, typical_damage(3)).save(folder / "sensitivity.json")
    outcome = cptquant("diff", run, other)
    assert outcome.code == 0, outcome.err
    for folder in (run, other):
        said = f"The plan of {folder}/plan.json was made from another table than the one at hand, ablation."
        assert said in outcome.out
    assert "different sensitivity tables" not in outcome.out


def quantized_with(folder: Path, quantizer: str) -> None:
    """What `quantize` and `evaluate` leave of a run, without the weights."""
    plan = Plan.load(folder / "plan.json")
    Manifest(quantizer=quantizer, sites=(), tensor_bytes=plan.size_bytes, plan_digest=plan.digest(), parameters=1).save(
        folder / "manifest.json"
    )
    loss = Measurement(name="kl_nats_per_token", subject="quantized", value=0.25, unit="nats/token", n=99, stderr=0.01)
    EvaluationReport(inputs={"plan quantized": digest_json(plan.formats)}, measurements=(loss,)).save(
        folder / "evaluation.json"
    )


def test_diff_gives_no_ratio_between_quantizers(cptquant: Callable, tmp_path: Path) -> None:
    known = TABLE.model_copy(update={"method": "tdmpq", "metadata": {"order": "second", "variant": "weight"}})
    runs = [
        write_run(tmp_path / name, budget, table=known) for name, budget in (("a", "3.5bpw@sites"), ("b", "5bpw@sites"))
    ]
    for run in runs:
        quantized_with(run, "gptq")
    alike = json.loads(cptquant("diff", *runs, "--json").out)
    assert alike["ratio"] is not None and alike["notes"] == []
    RunSettings.load(runs[1] / "settings.json").model_copy(update={"quantizer": "gptq"}).save(runs[1] / "settings.json")
    quantized_with(runs[1], "rtn")  # settings.json still says gptq: what was done counts
    found = json.loads(cptquant("diff", *runs, "--json").out)
    assert found["ratio"] is None
    assert found["notes"] == ["carried out with gptq and rtn: their damages alone say no ratio"]
    assert found["before"]["measured"] == found["after"]["measured"] == 0.25
    text = cptquant("diff", *reversed(runs)).out
    assert "Carried out with rtn and gptq: their damages alone say no ratio." in text
    assert "after over before" not in text


def test_a_measured_loss_is_that_of_the_quantizer(run: Path) -> None:
    quantized_with(run, "rtn")
    plan = Plan.load(run / "plan.json")
    found = find_measured(run, "kl_nats_per_token", plan, "rtn")
    assert found is not None and (found.value, found.stderr, found.n) == (0.25, 0.01, 99)
    assert find_measured(run, "kl_nats_per_token", plan, "gptq") is None
    other = plan.model_copy(update={"formats": {**plan.formats, "block.0.0": "float16"}})
    assert find_measured(run, "kl_nats_per_token", other, "rtn") is None
    (run / "manifest.json").unlink()  # then nothing says what carried it out
    assert find_measured(run, "kl_nats_per_token", plan, "rtn") is None


@pytest.mark.parametrize("arguments", [("explain",), ("what-if", "--more", "1kB"), ("diff", "RUN")])
def test_these_commands_load_no_framework(run: Path, arguments: tuple[str, ...]) -> None:
    name, *rest = arguments
    command = [name, str(run), *(str(run) if part == "RUN" else part for part in rest)]
    code = (
        "import sys\nfrom cptquant.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit as leave:\n    assert not leave.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'a framework was loaded'"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
