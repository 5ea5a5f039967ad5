"""`cptquant law` as a person calls it: the issue's commands, their JSON, and one clear message for each bad input."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cptquant.core.laws import LawFit
from cptquant.laws.cross_domain import VARIANTS
from cptquant.laws.forms import Points
from cptquant.laws.observations import Observations
from cptquant.laws.simulate import to_csv
from laws.outcomes import refused

QUICK = ("--starts", 4, "--draws", 30)
HEADER = "N,D,r,general_nll,domain_nll"


@pytest.fixture
def runs(grid: Observations, tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(to_csv(grid))
    return path


@pytest.fixture
def folder(law: LawFit, tmp_path: Path) -> Path:
    (tmp_path / "law").mkdir()
    law.save(tmp_path / "law/law.json")
    return tmp_path / "law"


def test_fit_writes_a_law_and_a_page(cptquant: Callable, runs: Path, tmp_path: Path) -> None:
    outcome = cptquant("law", "fit", "dcpt", runs, "--output", tmp_path / "laws/code", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "Domain loss: L = E + A/N^alpha + B r^eta/D^beta" in outcome.out and "540 rows of 27 runs" in outcome.out
    law = LawFit.load(tmp_path / "laws/code/law.json")
    assert list(law.fits) == ["general_nll", "domain_nll"] and law.provenance.seed == 0
    page = (tmp_path / "laws/code/report.html").read_text()
    assert page.count("<svg") >= 6 and "http" not in page.replace("http://www.w3.org", "")
    assert "Over the domain&#39;s share" in page


def test_predict_json(cptquant: Callable, folder: Path) -> None:
    outcome = cptquant("law", "predict", folder, "--N", "1.8e9", "--D", "10e9", "--r", "0.7", "--json")
    found = json.loads(outcome.out)
    assert list(found) == ["general_nll", "domain_nll"]
    for loss in found.values():
        assert list(loss) == ["value", "low", "high"] and loss["low"] < loss["value"] < loss["high"]
    assert cptquant("law", "predict", folder, "--N", "50e9", "--D", "10e9", "--r", "0.7").err.startswith(
        "note: N = 5e+10 lies outside the data (5e+08 to 4e+09): an extrapolation"
    )


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (("--N", "1.8e9", "--D", "10e9", "--max-general-increase", "3%"), "limit_binds"),
        (("--N", "1.8e9", "--domain-tokens", "5e9"), "interior"),
        (("--flops", "1e20", "--r", "0.5"), "interior"),
    ],
)
def test_optimum_json(cptquant: Callable, folder: Path, flags: tuple, status: str) -> None:
    outcome = cptquant("law", "optimum", folder, *flags, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert list(found) == ["N", "D", "r", "general_nll", "domain_nll", "status"]
    for name in ("N", "D", "r", "general_nll", "domain_nll"):
        assert list(found[name]) == ["value", "low", "high"]
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["status"] == status
    page = (folder / "optimum.html").read_text()
    assert page.count("<svg") == 2 and "Where it lies" in page


def test_optimum_says_what_the_limit_refers_to(cptquant: Callable, folder: Path) -> None:
    where = ("law", "optimum", folder, "--N", "1.8e9", "--D", "10e9", "--max-general-increase", "0.05")
    assert "against the law's general loss after the same run on general text alone" in cptquant(*where).err
    assert "against the given base loss 2.5" in cptquant(*where, "--general-base", "2.5").err
    impossible = cptquant(*where, "--general-base", "1.5", "--json")
    assert json.loads(impossible.out)["status"] == "infeasible" and "no ratio meets the limit" in impossible.err


def test_compare(cptquant: Callable, runs: Path) -> None:
    outcome = cptquant(
        "law", "compare", runs, "--forms", "dcpt,chinchilla", "--holdout", "by=D", "--starts", 3, "--json"
    )
    rows = json.loads(outcome.out)
    assert [(row["target"], row["form"]) for row in rows] == [
        (target, form) for target, form in product(("general_nll", "domain_nll"), ("dcpt", "chinchilla"))
    ]
    assert all(rows[place]["mae_nats"] < rows[place + 1]["mae_nats"] / 5 for place in (0, 2))
    assert "± " in cptquant("law", "compare", runs, "--forms", "l1", "--holdout", "by=D", "--starts", 2).out


@pytest.fixture
def domains(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Six domains under a planted K3 law, their features, and a seventh that was only begun."""
    rng = np.random.default_rng(0)
    form = VARIANTS["k3"]
    values = {"E": 0.8, "A": 0.25, "alpha": 0.35, "B": 0.5, "beta": 0.4, "eta": 0.2, "C": 0.25, "eps": 0.05,
              "gamma": 0.5, "F": 0.3, "mu": 0.8, "w2": 2.0}  # fmt: skip
    k1, k2 = np.array([2.0, 2.4, 2.8, 3.2, 2.2, 3.0, 2.6]), np.array([0.05, 0.2, 0.08, 0.15, 0.12, 0.03, 0.1])
    lines = ["domain,N,D,r,domain_nll"]
    for domain, size, ratio in product(range(6), (0.5, 1.8, 4.0), (0.1, 0.3, 0.5, 0.7, 0.9)):
        tokens = np.linspace(2, 20, 5)
        features = np.repeat([[k1[domain], k2[domain], 0.0]], 5, axis=0)
        at = Points(np.full(5, size), tokens, np.full(5, ratio), None, features)
        losses = form.loss(form.vector(values)[None], at)[0] + rng.normal(0, 0.003, 5)
        lines += [f"d{domain},{size}e9,{t}e9,{ratio},{y:.5f}" for t, y in zip(tokens, losses, strict=True)]
    (tmp_path / "domains.csv").write_text("\n".join(lines))
    rows = [f"d{d},{k1[d]},{k1[d] * (1 - k2[d]):.6f}" for d in range(7)]
    (tmp_path / "early.csv").write_text("domain,initial_nll,early_nll\n" + "\n".join(rows[:6]))
    (tmp_path / "new.csv").write_text("domain,initial_nll,early_nll\n" + rows[6])
    at = Points(np.array([1.8]), np.array([10.0]), np.array([0.5]), None, np.array([[k1[6], k2[6], 0.0]]))
    (tmp_path / "truth").write_text(str(form.loss(form.vector(values)[None], at)[0, 0]))
    return tmp_path / "domains.csv", tmp_path / "early.csv", tmp_path / "new.csv"


def test_cross_domain(cptquant: Callable, domains: tuple[Path, Path, Path], tmp_path: Path) -> None:
    runs, early, new = domains
    fitted = cptquant("law", "fit", "cross-domain", runs, "--features", early, "--output", tmp_path / "x", *QUICK)
    assert fitted.code == 0, fitted.err
    assert "two domains left out at a time (15 splits)" in fitted.out
    assert "the features support the law on these domains" in fitted.out
    outcome = cptquant(
        "law", "transfer", tmp_path / "x", "--features", new, "--N", "1.8e9", "--D", "10e9", "--r", "0.5", "--json"
    )
    found = json.loads(outcome.out)["d6"]
    truth = float((tmp_path / "truth").read_text())
    assert found["inside"] and found["domain_nll"]["value"] == pytest.approx(truth, abs=0.01)
    assert found["domain_nll"]["low"] < truth < found["domain_nll"]["high"]
    refused(cptquant("law", "fit", "cross-domain", runs, "--output", tmp_path / "y"), "needs --features early.csv")
    refused(
        cptquant("law", "fit", "cross-domain", runs, "--features", new, "--output", tmp_path / "y"),
        "domain d0 is not in --features, which has d6",
    )


def test_features_that_say_nothing_are_called_so(
    cptquant: Callable, domains: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    runs, _, _ = domains
    shuffled = (
        "domain,initial_nll,early_nll\nd0,2.6,2.3\nd1,2.61,2.3\nd2,2.6,2.31\nd3,2.59,2.3\nd4,2.6,2.29\nd5,2.6,2.3"
    )
    (tmp_path / "flat.csv").write_text(shuffled)
    outcome = cptquant(
        "law", "fit", "cross-domain", runs, "--features", tmp_path / "flat.csv", "--output", tmp_path / "x", *QUICK
    )
    assert "the features do not support the law" in outcome.out, outcome.err


def rows_with(row: str, header: str = HEADER) -> str:
    good = "\n".join(f"{n}e9,{d}e9,{r},2.5,1.8" for n, d, r in product((1, 2, 4), (5, 10), (0.1, 0.5, 0.9)))
    return f"{header}\n{good}\n{row}\n"


@pytest.mark.parametrize(
    ("text", "flags", "fragments"),
    [
        ("N,D,general_nll\n1e9,1e9,2\n", (), ("has no column 'r'", "it has N, D, general_nll", "--column r=NAME")),
        ("D,r,general_nll\n1e9,.5,2\n", (), ("has no column 'N'",)),
        ("N,D,r\n1e9,1e9,.5\n", (), ("has no loss column", "--column domain_nll=NAME")),
        (HEADER + "\n", (), ("has no rows",)),
        (HEADER + ",N\n1e9,1e9,.5,2,2,3\n", (), ("two columns called 'N'",)),
        (rows_with("0.5,10e9,0.5,2,2"), (), ("line 20: N = 0.5 cannot be a number of parameters", "--N-unit billions")),
        (rows_with("1e9,10,0.5,2,2"), (), ("line 20: D = 10 cannot be a number of tokens", "D_billions")),
        (rows_with("1e9,10e9,0.5,2,2"), ("--N-unit", "billions"), ("N = 1e+09 in billions would be 1e+18 parameters",)),
        (rows_with("1e9,10e9,0.5,2,2"), ("--D-unit", "gigatokens"), ("--D-unit 'gigatokens' is unknown", "millions")),
        ("N_billions,D,r,domain_nll\n1,1e9,.5,2\n", ("--N-unit", "millions"), ("contradicts the column N_billions",)),
        (rows_with("-1e9,10e9,0.5,2,2"), (), ("N = -1e+09; N must be above zero",)),
        (rows_with("1e9,10e9,67,2,2"), (), ("r = 67", "looks like percent: divide by 100")),
        (rows_with("1e9,10e9,-0.2,2,2"), (), ("r = -0.2, expected the domain's share",)),
        (rows_with("1e9,10e9,0.5,nan,2"), (), ("line 20: general_nll = 'nan' is not a number",)),
        (rows_with("1e9,10e9,0.5,2,"), (), ("line 20: domain_nll = '' is not a number",)),
        (rows_with("1e9,10e9,0.5,-2,2"), (), ("general_nll = -2, expected a positive loss",)),
        (rows_with("1e9,10e9,0.5,2,35.1"), (), ("domain_nll = 35.1 is too large", "natural logarithm")),
        (rows_with("1e9,10e9,0.5,2"), (), ("line 20 has 4 cells, the header has 5",)),
        (HEADER + "\n" + "\n".join(f"{n}e9,{d}e9,.5,2,2" for n, d in product((1, 2, 3), range(1, 7))), (),
         ("column r is 0.5 in every row", "--fix")),
        (HEADER + "\n" + "\n".join(f"1e9,{d}e9,.{r},2,2" for r, d in product((1, 3, 5), range(1, 7))), (),
         ("column N is 1e+09 in every row, so A, alpha of law dcpt", "--fix A=0")),
        (HEADER + "\n" + "\n".join(f"{n}e9,{d}e9,.{r},2,2" for n, r, d in product((1, 2), (2, 8), range(1, 7))), (),
         ("has 2 mixture ratios (r = 0.2, 0.8)", "at least 3, and 5 to be held by the data")),
        (rows_with("1e9,0,0.5,2,2"), ("--fix", "alpha"), ("--fix 'alpha' is not readable; write NAME=VALUE",)),
        (rows_with("1e9,0,0.5,2,2"), ("--fix", "alpha=x"), ("--fix alpha=x: 'x' is not a number",)),
        (HEADER + "\n1e9,0,.5,2,2\n", (), ("every row has D = 0 (before training)",)),
        (rows_with("1e9,10e9,0.5,2,250"), (), ("domain_nll = 250 is too large", "at most 14", "is it a perplexity?")),
        ("N,N_billions,D,r,domain_nll\n1e9,1,1e9,.5,2\n", (), ("has both N and N_billions; keep one",)),
        ("N_millions,N_billions,D,r,domain_nll\n1e3,1,1e9,.5,2\n", (), ("both N_millions and N_billions; keep one",)),
        ("domain,N,D,r,domain_nll\na,1e9,1e9,.5,2\n,1e9,2e9,.5,2\n", (), ("line 3: domain is empty; name the domain",)),
        (rows_with("1e9,10e9,0.5,2,2"), ("--column", "domain_nll=TYPO"),
         ("--column domain_nll=TYPO", "has no column 'TYPO'; it has N, D, r, general_nll, domain_nll")),
        (rows_with("1e9,10e9,0.5,2,2"), ("--column", "foo=r"),
         ("--column foo=r: 'foo' is unknown; choose one of: N, D, r, U, general_nll",)),
        (rows_with("1e9,10e9,0.5,2,2"), ("--column", "domain_nll=general_nll"),
         ("general_nll of", "cannot be both general_nll and domain_nll; tell each its own column")),
        (rows_with("1e9,10e9,0.5,2,2"), ("--column", "N=D"), ("cannot be both N and D",)),
        (rows_with("1e9,10e9,0.5,2,2"), ("--U-unit", "billions"), ("--U-unit billions", "has no column U; leave")),
        (rows_with("1e9,10e9,0.5,2.5,1.8"), (), ("column general_nll is 2.5 in all 19 rows", "leave the column out")),
        (rows_with("1e9,10e9,0.5,2,2"), ("--drop-highest", "19"), ("--drop-highest 19 leaves no rows", "has 19 with")),
    ],
)  # fmt: skip
def test_bad_tables(cptquant: Callable, tmp_path: Path, text: str, flags: tuple, fragments: tuple) -> None:
    (tmp_path / "bad.csv").write_text(text)
    refused(
        cptquant("law", "fit", "dcpt", tmp_path / "bad.csv", "--output", tmp_path / "x", *QUICK, *flags), *fragments
    )
    assert not (tmp_path / "x").exists()


def test_bad_choices(cptquant: Callable, runs: Path, folder: Path, tmp_path: Path) -> None:
    refused(cptquant("law", "fit", "magic", runs, "--output", tmp_path / "x"), "law 'magic' is unknown", "cross-domain")
    refused(cptquant("law", "fit", "dcpt", tmp_path / "no.csv", "--output", tmp_path / "x"), "no.csv does not exist")
    refused(cptquant("law", "predict", tmp_path, "--N", "1e9"), "law.json does not exist", "cptquant law fit")
    refused(cptquant("law", "predict", folder, "--N", "1.8", "--D", "1e9", "--r", ".5"), "--N 1.8 cannot be")
    refused(cptquant("law", "optimum", folder, "--N", "1e9"), "exactly one of --max-general-increase, --domain-tokens")
    refused(
        cptquant("law", "optimum", folder, "--flops", "1e21", "--domain-tokens", "1e9"), "given: --domain-tokens and"
    )
    refused(cptquant("law", "optimum", folder, "--N", "1e9", "--max-general-increase", "3%"), "needs --D")
    refused(
        cptquant("law", "optimum", folder, "--N", "1e9", "--D", "1e9", "--max-general-increase", "much"),
        "--max-general-increase 'much' is not readable; write 3% or 0.03",
    )
    refused(cptquant("law", "optimum", folder, "--flops", "12", "--r", ".5"), "--flops 12 is outside 1e12 to 1e30")
    refused(cptquant("law", "compare", runs, "--holdout", "N"), "--holdout 'N' is not readable; write by=N")
    refused(cptquant("law", "compare", runs, "--forms", "dcpt,l9"), "law 'l9' is unknown")
    refused(cptquant("law", "transfer", folder, "--features", tmp_path / "no.csv"), "no.csv cannot be read")


def test_units_are_read_as_declared(cptquant: Callable, tmp_path: Path, grid: Observations) -> None:
    from cptquant.laws.observations import Reading, read_observations

    rows = [f"{n / 1e9},{d / 1e6},{r}," for n, d, r in zip(grid.size, grid.tokens, np.asarray(grid.ratio), strict=True)]
    losses = grid.losses["domain_nll"]
    text = "\n".join(row + str(float(loss)) for row, loss in zip(rows, losses, strict=True))
    (tmp_path / "named.csv").write_text("# a comment\nN_billions,D_millions,r,domain_nll\n" + text)
    (tmp_path / "flagged.csv").write_text("N,tokens,r,loss\n" + text)
    reading = Reading({"N": "billions", "D": "millions"}, {"D": "tokens", "domain_nll": "loss"})
    for name, how in (("named.csv", Reading()), ("flagged.csv", reading)):
        found = read_observations(tmp_path / name, how)
        np.testing.assert_allclose(found.size, grid.size)
        np.testing.assert_allclose(found.tokens, grid.tokens)
        np.testing.assert_array_equal(found.losses["domain_nll"], losses)
        np.testing.assert_array_equal(found.run, grid.run)


def test_rows_before_training_are_the_base(tmp_path: Path) -> None:
    from cptquant.laws.observations import read_observations

    (tmp_path / "runs.csv").write_text(
        HEADER + "\n1e9,0,0.2,2.5,2.1\n1e9,0,0.8,2.7,2.1\n1e9,1e9,0.2,2.6,2.0\n2e9,0,0.2,2.4,2.0\n2e9,1e9,0.2,2.3,1.9\n"
    )
    found = read_observations(tmp_path / "runs.csv")
    assert found.base["general_nll"] == ((1e9, 2.6), (2e9, 2.4)) and len(found) == 2
