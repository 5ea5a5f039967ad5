"""`cptquant predict`, and predictions beside measurements in `quantize`."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from laws.planted_ptq import PLANTED, planted_table

from cptquant.core.forecast import FITTED_OWN_TEXT
from cptquant.core.settings import OWN_TEXT
from cptquant.laws.ptq import fit_observations
from cptquant.laws.ptq_table import read_observations
from cptquant.stages import predict as predict_stage_module

QUICK = (
    "--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--sensitivity", "tdmpq",
    "--baselines", "uniform", "--formats", "int3-g16,int8-g16", "--quantizer", "rtn",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own text is GPTQ's default in these tests, whatever the package's own is."""
    monkeypatch.setitem(OWN_TEXT, "gptq", FITTED_OWN_TEXT)


@pytest.fixture(scope="session")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("law") / "law.json"
    fit_observations(planted_table(noise=0.1), form="full", source="planted.csv").save(path)
    return path


def test_every_plan_has_an_interval(cptquant: Callable, folder: Path, law: Path, tmp_path: Path) -> None:
    outcome = cptquant(
        "predict", folder, "--formats", "int3,int4-channel", "--group", "16,32", "--budget", "13bpw", "--law", law,
        "--sequence-length", 32, "--json", "--output", tmp_path / "forecast.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found == json.loads((tmp_path / "forecast.json").read_text())
    assert [(row["plan"], row["method"]) for row in found["rows"]] == [
        (plan, method)
        for plan in ("int3-g16", "int3-g32", "int4-channel", "budget 13bpw")
        for method in ("rtn", "gptq + own text", "block-ap + own text")
    ]
    for row in found["rows"]:
        for name in ("kl_nats", "nll_nats", "perplexity"):
            interval = row["prediction"][name]
            assert interval["low"] < interval["value"] < interval["high"]
    rounded, compensated = found["rows"][:2]
    assert rounded["features"]["method_ratio"] == 1 > compensated["features"]["method_ratio"]
    mixed = found["rows"][-1]
    assert mixed["bits_per_weight"] <= 13 and mixed["features"]["rtn_kl_nats"] is not None
    assert not list(folder.glob("*.partial")) and not (tmp_path / "checkpoint").exists()
    table = cptquant(
        "predict", folder, "--formats", "int4", "--group", "16", "--law", law.parent, "--sequence-length", 32
    )
    assert table.code == 0 and "round to nearest" in table.out and "planted.csv, form full" in table.out
    assert "GPTQ, own text" in table.out


def test_gptq_is_what_quantize_would_do(cptquant: Callable, folder: Path, law: Path, tmp_path: Path) -> None:
    def kl(*flags: object) -> dict[str, float]:
        common = ("predict", folder, "--formats", "int3", "--group", 16, "--law", law, "--sequence-length", 32)
        outcome = cptquant(*common, "--json", *flags)
        assert outcome.code == 0, outcome.err
        return {row["method"]: row["prediction"]["kl_nats"]["value"] for row in json.loads(outcome.out)["rows"]}

    default, given = kl("--quantizer", "gptq"), kl("--own-text", 0)
    assert list(default) == ["gptq + own text"] and list(given) == ["rtn", "gptq"]
    assert default == kl("--quantizer", "gptq", "--own-text", 300)
    # features are alike, so the two differ by the planted intercepts
    planted = PLANTED["gptq"] - PLANTED["gptq + own text"]
    assert math.log(given["gptq"] / default["gptq + own text"]) == pytest.approx(planted, abs=0.05)
    two = [row for row in planted_table(noise=0.1) if "own text" not in row.features.method]
    fit_observations(two, form="full", source="two.csv").save(tmp_path / "two.json")
    refused = cptquant("predict", folder, "--law", tmp_path / "two.json")
    told = "--quantizer gptq with own text: this law was fitted on gptq, rtn alone; give --own-text 0"
    assert refused.code == 2 and told in refused.err


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--formats", ""), ("--formats names no format", "int2,int3,int4")),
        (("--formats", "int9"), ("format 'int9-g64' is not readable",)),
        (("--group", "many"), ("format 'int2-gmany' is not readable",)),
        (("--own-text", 255), ("--own-text 255: the law was fitted on 256 sequences; give 0, or 256 or more",)),
        (("--own-text", -1), ("--own-text -1: the law was fitted on 256 sequences",)),
        (("--own-text", 256, "--quantizer", "rtn"), ("--quantizer rtn reads no text; leave the flag out",)),
        (("--quantizer", "awq"), ("--quantizer 'awq' is unknown; choose among: rtn, gptq, block-ap",)),
        (("--budget", "lots"), ("--budget 'lots' is not readable",)),
        (("--seed", -1), ("--seed -1 is out of range; give 0 to",)),
        (("--law", "nowhere.json"), ("nowhere.json does not exist", "cptquant law fit ptq")),
    ],
)
def test_refusals(cptquant: Callable, folder: Path, flags: tuple, fragments: tuple) -> None:
    outcome = cptquant("predict", folder, *flags)
    assert outcome.code == 2
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


def test_predicted_beside_measured_and_recorded(
    cptquant: Callable, folder: Path, law: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_stage_module, "SHIPPED_LAW", law)
    monkeypatch.setattr("cptquant.laws.ptq.SHIPPED_LAW", law)
    run, table = tmp_path / "run", tmp_path / "mine.csv"
    outcome = cptquant("quantize", folder, "--budget", "12bpw", "--output", run, *QUICK, "--record", table)
    assert outcome.code == 0, outcome.err
    assert "Predicted before quantizing, measured after" in outcome.out
    assert "Predicted before quantizing, measured after" in (run / "report.html").read_text()
    forecast = json.loads((run / "forecast.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    measured = {m["subject"]: m["value"] for m in evaluation["measurements"] if m["name"] == "kl_nats_per_token"}
    rows = {row.plan: row for row in read_observations(table)}
    assert rows and all(row.features.method == "rtn" for row in rows.values())
    for plan, row in rows.items():
        subject = "quantized" if plan == evaluation["written"] else plan
        assert row.kl_nats == pytest.approx(measured[subject], rel=1e-5)
        known = next(found for found in forecast["rows"] if found["plan"] == plan)
        assert row.features.taylor_kl_nats == pytest.approx(known["features"]["taylor_kl_nats"], rel=1e-5)
        # the rounded model's own KL was measured on calibration text: the same size on test text
        assert row.features.rtn_kl_nats == pytest.approx(row.kl_nats, rel=0.5)
    quiet = cptquant("quantize", run, "--no-predict", "--record", table)
    assert quiet.code == 2 and "leave out --no-predict" in quiet.err
    assert outcome.err.splitlines()[-1] == f"note: {table}: {len(rows)} rows added"
    once = table.read_text()
    again = cptquant("quantize", run, "--record", table)
    assert again.code == 0 and table.read_text() == once
    assert again.err.splitlines()[-1] == f"note: {table}: 0 rows added; this run's rows are there already"
    told = cptquant("quantize", run, "--record", table, "--tokens-seen", "1e9")
    assert told.code == 2 and "already, with tokens_seen empty, not 1e+09; correct that column" in told.err
    told = cptquant("quantize", run, "--record", tmp_path / "told.csv", "--tokens-seen", "1e9")
    assert told.code == 0, told.err
    assert {row.features.tokens_seen for row in read_observations(tmp_path / "told.csv")} == {1e9}


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--tokens-seen", "1e9"), ("--tokens-seen 1e+09 goes with --record; add --record FILE, or leave it out",)),
        (("--record", "bad.csv"), ("bad.csv lacks the columns model, family, plan", "cptquant quantize --record FILE")),
        (("--record", "no/such/t.csv"), ("cannot write no/such/t.csv (No such file", "choose another --record")),
        (("--record", "."), ("cannot write . (Is a directory); choose another --record",)),
    ],
)
def test_a_table_is_checked_before_the_run(
    cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple, fragments: tuple
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("N,D,loss\n1,2,3\n")
    outcome = cptquant("quantize", folder, "--budget", "12bpw", "--output", "run", *QUICK, *flags)
    assert outcome.code == 2 and not Path("run").exists()
    for fragment in fragments:
        assert fragment in outcome.err.splitlines()[-1], outcome.err


@pytest.mark.parametrize("command", [("predict",), ("quantize", "--record", "t.csv", "--budget", "12bpw")])
def test_tokens_no_training_had(cptquant: Callable, folder: Path, command: tuple) -> None:
    outcome = cptquant(command[0], folder, *command[1:], "--tokens-seen", "1e40")
    assert outcome.code == 2 and "'--tokens-seen'" in outcome.err and "less than or equal to 1" in outcome.err


@pytest.fixture
def one_method(tmp_path: Path) -> Path:
    """A law that has seen rounding alone, and no training tokens."""
    rows = [row for row in planted_table(noise=0.1) if row.features.method == "rtn"]
    rows = [r.model_copy(update={"features": r.features.model_copy(update={"tokens_seen": None})}) for r in rows]
    fit_observations(rows, form="full", source="planted.csv").save(tmp_path / "law.json")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--form", "magic"), ("--form 'magic' is none of this law's; choose one of: error, curvature, taylor",)),
        (("--form", "error"), ("--form error needs --tokens-seen; give the training tokens of MODEL",)),
        (("--budget", "lots"), ("--budget 'lots' is not readable",)),
        (("--target", "tpu"), ("--target 'tpu' is unknown",)),
        (("--output", "no/such/f.json"), ("cannot write no/such/f.json (No such file or directory); choose another",)),
        (("--output", "."), ("cannot write . (Is a directory); choose another --output",)),
        (("--law", "one", "--form", "error", "--tokens-seen", "1e9"), ("--form 'error' is none of this law's",)),
        (("--law", "one"), ("--quantizer gptq with own text: this law was fitted on rtn alone; choose that",)),
        (("--law", "one", "--own-text", 0), ("--quantizer gptq: this law was fitted on rtn alone; choose that",)),
    ],
)
def test_checked_before_the_model_is_read(
    cptquant: Callable, folder: Path, law: Path, one_method: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple,
    fragments: tuple,
) -> None:  # fmt: skip
    def never(*_arguments: object, **_flags: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(predict_stage_module, "load_model", never)
    written = [one_method if flag == "one" else flag for flag in flags]
    outcome = cptquant("predict", folder, *(() if "--law" in flags else ("--law", law)), *written)
    assert outcome.code == 2, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err.splitlines()[-1], outcome.err


def test_a_budget_is_checked_before_measuring(
    cptquant: Callable, folder: Path, law: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: object, **_flags: object) -> None:
        raise AssertionError("features were measured")

    monkeypatch.setattr(predict_stage_module, "measure_model_noise", never)
    outcome = cptquant("predict", folder, "--law", law, "--budget", "0.1bpw")
    assert outcome.code == 2 and "--budget 0.1bpw allows" in outcome.err and "raise --budget" in outcome.err
