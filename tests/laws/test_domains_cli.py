"""Laws across domains from nothing but the command line, where laws are written, and tables with a byte order mark."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cptquant.core.laws import LawFit
from cptquant.laws.observations import Observations, read_observations
from cptquant.laws.ptq_table import write_observations
from cptquant.laws.simulate import LAST_TOKENS, to_csv
from cptquant.laws.simulate_domains import planted_loss, simulate_domains
from cptquant.laws.transfer import read_features
from laws.outcomes import refused
from laws.planted_ptq import planted_table

QUICK = ("--starts", 3, "--draws", 20)
BOM = b"\xef\xbb\xbf"


def test_simulate_fit_transfer(cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seventh domain was only begun; its loss is the planted law's."""
    monkeypatch.chdir(tmp_path)
    made = cptquant("law", "simulate", "--domains", 6, "--output", "runs.csv", "--seed", 3)
    assert made.code == 0 and made.out.splitlines() == ["runs.csv: 450 rows, 90 runs", "runs-features.csv"]
    fitted = cptquant("law", "fit", "cross-domain", "runs.csv", "--features", "runs-features.csv", *QUICK)
    assert fitted.code == 0, fitted.err
    assert fitted.out.endswith("laws/cross-domain/report.html\n")
    assert "the features support the law on these domains" in fitted.out
    law = LawFit.load(Path("laws/cross-domain/law.json"))
    assert law.kind == "cross-domain" and sorted(law.features) == [f"d{place}" for place in range(6)]

    run = ("--N", "1.8e9", "--D", "10e9", "--r", "0.5")
    where = ("law", "transfer", "laws/cross-domain", "--features", "runs-features.csv")
    found = json.loads(cptquant(*where, *run, "--json").out)["begun"]
    features = np.array([read_features(Path("runs-features.csv"))["begun"]])
    truth = planted_loss(np.array([1.8e9]), np.array([10e9]), np.array([0.5]), features)[0]
    assert found["inside"] and found["domain_nll"]["value"] == pytest.approx(truth, abs=0.01)
    assert found["domain_nll"]["low"] < truth < found["domain_nll"]["high"]

    for command in (("predict", *run), ("optimum", "--flops", "1e20", "--r", "0.5")):
        refused(
            cptquant("law", command[0], "laws/cross-domain", *command[1:]),
            f"law {command[0]} cannot use a cross-domain law", "use: cptquant law transfer LAW --features early.csv",
        )  # fmt: skip


def test_simulated_domains_are_what_they_say(cptquant: Callable, tmp_path: Path) -> None:
    files = ("--output", tmp_path / "r.csv", "--features-output", tmp_path / "f.csv")
    outcome = cptquant("law", "simulate", "--domains", 4, *files, "--noise", 0, "--json")
    assert json.loads(outcome.out) == {
        "runs": str(tmp_path / "r.csv"), "rows": 300, "features": str(tmp_path / "f.csv"),
    }  # fmt: skip
    data, features = read_observations(tmp_path / "r.csv"), read_features(tmp_path / "f.csv")
    made, planted = simulate_domains(4, noise=0.0)
    assert list(features) == ["d0", "d1", "d2", "d3", "begun"] and data.domain == made.domain
    for name, values in planted.items():
        assert features[name] == pytest.approx(values, abs=1e-5)
    assert data.ratio is not None and data.tokens.max() == LAST_TOKENS
    rows = np.array([planted[name] for name in data.domain])
    np.testing.assert_allclose(
        data.losses["domain_nll"], planted_loss(data.size, data.tokens, data.ratio, rows), atol=1e-5
    )
    assert len(set(data.run.tolist())) == 60


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--features-output", "f.csv"), ("--features-output f.csv goes with --domains; add --domains 6, or leave",)),
        (("--domains", 6, "--forgetting", 0.1), ("--domains takes --noise and --seed, not --run-noise or --forg",)),
        (("--domains", 6, "--run-noise", 0.1), ("--domains takes --noise and --seed, not --run-noise",)),
        (("--domains", 6, "--features-output", "r.csv"), ("--features-output r.csv is --output too; give",)),
        (("--noise", "inf"), ("--noise, --run-noise or --forgetting is too large: general_nll would lie between",)),
        (("--noise", 100), ("expected above 0 and at most 14; choose smaller ones, e.g. --noise 0.003",)),
        (("--domains", 6, "--noise", 100), ("is too large: domain_nll would lie between",)),
    ],
)
def test_what_cannot_be_simulated(
    cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple, fragments: tuple
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cptquant("law", "simulate", "--output", "r.csv", *flags), *fragments)
    assert not list(tmp_path.iterdir())


def test_too_few_domains(cptquant: Callable, tmp_path: Path) -> None:
    outcome = cptquant("law", "simulate", "--output", tmp_path / "r.csv", "--domains", 3)
    assert outcome.code == 2 and "'--domains'" in outcome.err and "greater than or equal to 4" in outcome.err


HEADER = "domain,initial_nll,early_nll\n"


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (HEADER.encode("utf-16"), ("is not UTF-8 text; give a CSV: domain, initial_nll, early_nll[, middle_nll]",)),
        (b"\xff\xfe\x00", ("is not UTF-8 text",)),
        (b"", ("has no column domain; expected domain, initial_nll, early_nll",)),
        (HEADER + "", ("has no rows; give one a domain",)),
        ("domain,initial_nll\na,3\n", ("has no column early_nll",)),
        ("domain,initial_nll,early_nll,early_nll\na,3,2,1\n", ("two columns called 'early_nll'; rename one",)),
        (HEADER + "a,3\n", ("'a,3' has 2 cells, the header has 3",)),
        (HEADER + "a,3,2,1\n", ("'a,3,2,1' has 4 cells, the header has 3",)),
        (HEADER + 'a,3,"2\n1"\n', ("1 cells, the header has 3",)),
        (HEADER + "a,3,2\na,3.1,2\n", ("has two rows of domain 'a'; keep one",)),
        (HEADER + ",3,2\n", ("a row has no domain (',3,2'); name it",)),
        (HEADER + "a,250,2\n",
         ("domain 'a': initial_nll = '250' is not a loss in nats per token (at most 14); is it a perplexity?",)),
        (HEADER + "a,3,inf\n", ("early_nll = 'inf' is not a loss",)),
        (HEADER + "a,3,nan\n", ("early_nll = 'nan' is not a loss in nats per token (at most 14)",)),
        (HEADER + "a,3,much\n", ("early_nll = 'much' is not a loss",)),
        (HEADER + "a,-3,2\n", ("initial_nll = '-3' is not a loss",)),
        (HEADER + "a,2,3\n", ("early_nll 3 is not below initial_nll 2; measure it later in the run",)),
    ],
)  # fmt: skip
def test_features(cptquant: Callable, tmp_path: Path, content: str | bytes, fragments: tuple) -> None:
    (tmp_path / "f.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "r.csv").write_text(to_csv(simulate_domains(4)[0]))
    refused(
        cptquant("law", "fit", "cross-domain", tmp_path / "r.csv", "--features", tmp_path / "f.csv",
                 "--output", tmp_path / "x"),
        "--features", *fragments,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("k9", "--variant 'k9' is unknown; choose one of: k1, k2, k3, k4"),
        ("k4", "variant k4 needs a column middle_nll in --features; add it or choose --variant k3"),
    ],
)
def test_variants(cptquant: Callable, tmp_path: Path, variant: str, message: str) -> None:
    assert cptquant("law", "simulate", "--domains", 4, "--output", tmp_path / "r.csv").code == 0
    where = ("--features", tmp_path / "r-features.csv", "--output", tmp_path / "x")
    refused(cptquant("law", "fit", "cross-domain", tmp_path / "r.csv", *where, "--variant", variant), message)


def test_byte_order_marks(tmp_path: Path, grid: Observations) -> None:
    """As spreadsheets write them, before a comment or before the first column's name."""
    text = to_csv(grid)
    for name, content in (("comment.csv", text), ("column.csv", text.split("\n", 1)[1])):
        (tmp_path / name).write_bytes(BOM + content.encode())
        found = read_observations(tmp_path / name)
        np.testing.assert_array_equal(found.run, grid.run)
        np.testing.assert_allclose(found.losses["domain_nll"], grid.losses["domain_nll"], atol=1e-6)
    lines = list(csv.DictReader(text.splitlines()[1:]))
    renumbered = "run,N,D,r,domain_nll\n" + "\n".join(
        f"{place % 2},{row['N']},{row['D']},{row['r']},{row['domain_nll']}" for place, row in enumerate(lines)
    )
    (tmp_path / "first.csv").write_bytes(BOM + renumbered.encode())
    assert set(read_observations(tmp_path / "first.csv").run.tolist()) == {0, 1}  # the column `run` was not lost
    (tmp_path / "features.csv").write_bytes(BOM + (HEADER + "a,3,2\n").encode())
    assert read_features(tmp_path / "features.csv") == {"a": (3.0, pytest.approx(1 / 3), 0.0)}


def test_laws_are_written_by_their_kind(
    cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Observations
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs.csv").write_text(to_csv(grid.take(grid.ratio == 0.5)))
    outcome = cptquant("law", "fit", "chinchilla", "runs.csv", *QUICK)
    assert outcome.code == 0 and outcome.out.endswith("laws/chinchilla/report.html\n")
    assert sorted(p.name for p in Path("laws/chinchilla").iterdir()) == ["law.json", "report.html"]
    rows = [
        row.model_copy(update={"features": row.features.model_copy(update={"tokens_seen": None})})
        for row in planted_table(noise=0.1)
    ]
    write_observations(Path("results.csv"), rows)
    outcome = cptquant("law", "fit", "ptq", "results.csv")
    assert outcome.code == 0 and outcome.out.endswith("laws/ptq/law.json\n")
    assert [p.name for p in Path("laws/ptq").iterdir()] == ["law.json"]
    assert outcome.err == "note: form error was not fitted: its columns (tokens_seen) are empty in some rows\n"
    assert "ptq: law.json alone" in cptquant("law", "fit", "--help").out
