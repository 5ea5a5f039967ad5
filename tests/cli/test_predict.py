"""`cptquant predict`, and predictions beside measurements in `quantize`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from laws.planted_ptq import planted_table

from cptquant.laws.ptq import fit_observations
from cptquant.laws.ptq_table import read_observations
from cptquant.stages import predict as predict_stage_module

QUICK = (
    "--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--sensitivity", "tdmpq",
    "--baselines", "uniform", "--formats", "int3-g16,int8-g16", "--quantizer", "rtn",
)  # fmt: skip


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
        for method in ("rtn", "gptq")
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
    table = cptquant("predict", folder, "--formats", "int4", "--group", "16", "--law", law, "--sequence-length", 32)
    assert table.code == 0 and "round to nearest" in table.out and "planted.csv, form full" in table.out


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--formats", ""), ("--formats names no format", "int2,int3,int4")),
        (("--formats", "int9"), ("format 'int9-g64' is not readable",)),
        (("--group", "many"), ("format 'int2-gmany' is not readable",)),
        (("--quantizer", "awq"), ("--quantizer 'awq' is unknown; choose one of: rtn, gptq, or both",)),
        (("--budget", "lots"), ("--budget 'lots' is not readable",)),
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
