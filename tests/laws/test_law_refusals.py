"""`cptquant law`: values, laws and flags that cannot be used are refused, each with one clear message."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cptquant.core.errors import UserError
from cptquant.core.laws import Interval, LawFit, OptimumStatus
from cptquant.laws.fit_law import FitOptions, fit_law
from cptquant.laws.methods import FORMS
from cptquant.laws.observations import Observations, read_observations
from cptquant.laws.optimum import best_ratio_for_domain_tokens, best_ratio_under_limit, best_size_for_flops
from cptquant.laws.simulate import to_csv
from laws.outcomes import refused

USE_1 = ("--N", "1.8e9", "--D", "10e9", "--max-general-increase", "3%")
USE_2 = ("--N", "1.8e9", "--domain-tokens", "5e9")
USE_3 = ("--flops", "1e20", "--r", "0.5")
QUICK = ("--starts", 2, "--draws", 20)


@pytest.fixture
def laws(law: LawFit, chinchilla: LawFit, tmp_path: Path) -> Path:
    """Folders dcpt and chinchilla, and the runs they were fitted to."""
    for name, fitted in (("dcpt", law), ("chinchilla", chinchilla)):
        (tmp_path / name).mkdir()
        fitted.save(tmp_path / name / "law.json")
    return tmp_path


@pytest.fixture
def runs(grid: Observations, tmp_path: Path) -> Path:
    (tmp_path / "runs.csv").write_text(to_csv(grid))
    return tmp_path / "runs.csv"


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ("A=-1", ("--fix A=-1: A of law dcpt must lie between 1e-06 and 1e+04, or 0 to leave its term out",)),
        ("alpha=-0.3", ("--fix alpha=-0.3: alpha of law dcpt must lie between 0.01 and 5 (N and D in billions)",)),
        ("alpha=nan", ("--fix alpha=nan: alpha of law dcpt must lie between 0.01 and 5",)),
        ("alpha=inf", ("--fix alpha=inf: alpha of law dcpt must lie between 0.01 and 5",)),
        ("alpha=0", ("--fix alpha=0: alpha of law dcpt must lie between 0.01 and 5 (N",)),
        ("eps=0", ("--fix eps=0: eps of law dcpt must lie between 0.0001 and 1 (N",)),
        ("E=100", ("--fix E=100: E of law dcpt must lie between", ", or 0 to leave its term out")),
        ("sigma=1", ("--fix sigma=1: law dcpt has no such parameter; it has E, A, alpha",)),
    ],
)
def test_held_values(cptquant: Callable, runs: Path, tmp_path: Path, value: str, fragments: tuple) -> None:
    outcome = cptquant("law", "fit", "dcpt", runs, "--fix", value, *QUICK, "--output", tmp_path / "x")
    refused(outcome, *fragments)


@pytest.mark.parametrize("value", [0.01, 5.0])
def test_the_ends_of_a_range_may_be_held(grid: Observations, value: float) -> None:
    few = FitOptions(starts=1, draws=4, fixed={"alpha": value, "A": 0.45})
    fitted = fit_law(grid.take(grid.tokens > 20e9), FORMS["chinchilla"], few).fits["domain_nll"]
    assert fitted.values["alpha"] == pytest.approx(value) and fitted.parameters[2].fixed


def test_some_term_must_be_left(cptquant: Callable, runs: Path, tmp_path: Path) -> None:
    held = ("--fix", "E=0", "--fix", "A=0", "--fix", "B=0")
    refused(
        cptquant("law", "fit", "chinchilla", runs, *held, *QUICK, "--output", tmp_path / "x"),
        "law chinchilla gives no loss with --fix E=0 --fix A=0 --fix B=0: no term is left; hold fewer parameters",
    )


@pytest.mark.parametrize("base", ["nan", "-1", "0", "inf", "1e9"])
def test_general_base(cptquant: Callable, laws: Path, base: str) -> None:
    refused(
        cptquant("law", "optimum", laws / "dcpt", *USE_1, "--general-base", base),
        f"--general-base {float(base):g} must be a loss in nats per token, above 0 and at most 14",
    )


@pytest.mark.parametrize(
    ("law_name", "flags", "fragments"),
    [
        ("dcpt", ("--flops", "1e21", "--r", "0"),
         ("--flops 1e+21: the lowest loss of law dcpt at domain share 0 lies at N = ", "which no run can have",
          "(N 1e4 to 1e14, D 1e4 to 1e17)", "give --flops and --r nearer")),
        ("chinchilla", USE_1, ("--max-general-increase needs a law with the mixture ratio r; law chinchilla",
                               "has none: fit one that does, e.g. cptquant law fit dcpt RUNS.csv")),
        ("chinchilla", USE_2, ("--domain-tokens needs a law with the mixture ratio r",)),
        ("chinchilla", USE_3, ("law chinchilla has no mixture ratio; leave --r out",)),
        ("dcpt", (*USE_3, "--N", "1e9", "--D", "1e10"), ("--flops takes --r, not --N; leave --N out",)),
        ("dcpt", (*USE_3, "--general-base", "2"), ("--flops takes --r, not --general-base",)),
        ("dcpt", (*USE_2, "--D", "1e10"), ("--domain-tokens takes --N, not --D; leave --D out",)),
        ("dcpt", (*USE_1, "--r", "0.5"), ("takes --N, --D, --general-base, not --r; leave --r out",)),
        ("dcpt", ("--flops", "1e20", "--r", "nan"), ("--r nan must be the domain's share",)),
        ("dcpt", ("--flops", "nan", "--r", "0.5"), ("--flops nan is outside 1e12 to 1e30",)),
        ("dcpt", ("--N", "1e9", "--domain-tokens", "nan"), ("--domain-tokens nan cannot be a number of tokens",)),
    ],
)  # fmt: skip
def test_optimum(cptquant: Callable, laws: Path, law_name: str, flags: tuple, fragments: tuple) -> None:
    refused(cptquant("law", "optimum", laws / law_name, *flags), *fragments)
    assert not (laws / law_name / "optimum.html").exists()


@pytest.mark.parametrize(
    ("law_name", "flags", "fragments"),
    [
        ("dcpt", ("--r", "0.5", "--U", "-5"), ("--U -5 cannot be a number of distinct tokens (1e4 to 1e17)",)),
        ("dcpt", ("--r", "0.5", "--U", "nan"), ("--U nan cannot be a number of distinct tokens",)),
        ("dcpt", ("--r", "0.5", "--U", "1e9"), ("law dcpt has no distinct tokens; leave --U out",)),
        ("chinchilla", ("--r", "0.5"), ("law chinchilla has no mixture ratio; leave --r out",)),
        ("dcpt", ("--r", "nan"), ("--r nan must be the domain's share of the tokens, 0 to 1",)),
        ("dcpt", (), ("law dcpt needs --r",)),
    ],
)
def test_predict(cptquant: Callable, laws: Path, law_name: str, flags: tuple, fragments: tuple) -> None:
    refused(cptquant("law", "predict", laws / law_name, "--N", "1e9", "--D", "1e10", *flags), *fragments)


def with_values(law: LawFit, form: str = "dcpt", **values: float) -> LawFit:
    """The law of the domain loss with parameters (and draws) set; new ones are added at the end."""
    fit = law.fits["domain_nll"]
    names = [parameter.name for parameter in fit.parameters]
    added = [name for name in values if name not in names]
    parameters = [p.model_copy(update={"value": values.get(p.name, p.value)}) for p in fit.parameters]
    parameters += [fit.parameters[0].model_copy(update={"name": name, "value": values[name]}) for name in added]
    draws = [
        (*(values.get(name, number) for name, number in zip(names, draw, strict=True)), *(values[n] for n in added))
        for draw in fit.draws
    ]
    fit = fit.model_copy(update={"form": form, "parameters": tuple(parameters), "draws": tuple(draws)})
    return law.model_copy(update={"fits": {"domain_nll": fit}})


def test_a_law_of_repetition_has_no_optimum(cptquant: Callable, law: LawFit, tmp_path: Path) -> None:
    """Its losses depend on U, which `law optimum` does not take."""
    values = {"E": 1.0, "A": 0.5, "alpha": 0.3, "B": 0.5, "beta": 0.3, "R": 15.0}
    fit = law.fits["domain_nll"]
    parameters = tuple(fit.parameters[0].model_copy(update={"name": n, "value": v}) for n, v in values.items())
    repeated = fit.model_copy(
        update={
            "form": "repetition", "corpus": "", "parameters": parameters, "draws": (tuple(values.values()),) * 3,
            "ranges": {**fit.ranges, "U": fit.ranges["D"]},
        }
    )  # fmt: skip
    law.model_copy(update={"kind": "repetition", "fits": {"domain_nll": repeated}}).save(tmp_path / "law.json")
    refused(
        cptquant("law", "optimum", tmp_path / "law.json", "--flops", "1e20"),
        "law optimum cannot use law repetition, whose losses depend on the distinct tokens U; fit another",
    )
    run = ("--N", "1e9", "--D", "1e10")
    refused(cptquant("law", "predict", tmp_path / "law.json", *run), "law repetition needs --U")
    assert cptquant("law", "predict", tmp_path / "law.json", *run, "--U", "2e9").code == 0


@pytest.mark.parametrize("term", ["A", "B"])
def test_a_law_without_a_size_or_data_term_has_no_best_size(law: LawFit, term: str) -> None:
    with pytest.raises(UserError, match=r"--flops 1e\+20: the lowest loss of law dcpt at .* which no run can have"):
        best_size_for_flops(with_values(law, **{term: 0.0}), 1e20, 0.5)


def test_a_search_that_ends_on_its_edge_says_so(law: LawFit) -> None:
    """B next to nothing: a larger model is always better, and the form has no closed optimum."""
    falling = with_values(law, "dcpt-inflection", B=1e-6, ri=1e-4)
    found = best_size_for_flops(falling, 1e20, 0.5)
    assert found.status is OptimumStatus.EDGE_OF_SEARCH
    assert found.N.value == pytest.approx(1e3 * (1e20 / 6 / 20) ** 0.5, rel=1e-3)
    assert "still falls at the end of the sizes that were searched" in found.status.sentence


@pytest.mark.parametrize("use", [1, 2, 3])
def test_no_interval_falls_below_zero(law: LawFit, use: int) -> None:
    """Deviations widened 20,000 times exceed the losses themselves; in ln L they cannot pass zero."""
    fits = {name: fit.model_copy(update={"widening": 2e4}) for name, fit in law.fits.items()}
    wide = law.model_copy(update={"fits": fits})
    found = {
        1: lambda: best_ratio_under_limit(wide, 1.8e9, 10e9, 0.03)[0],
        2: lambda: best_ratio_for_domain_tokens(wide, 1.8e9, 5e9),
        3: lambda: best_size_for_flops(wide, 1e20, 0.5),
    }[use]()
    for name in ("N", "D", "general_nll", "domain_nll"):
        interval = getattr(found, name)
        assert isinstance(interval, Interval) and 0 < interval.low <= interval.value <= interval.high
    assert found.domain_nll is not None and found.domain_nll.low < found.domain_nll.value / 2
    assert 0 <= found.r.low <= found.r.value <= found.r.high <= 1


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("magic", "--features", "early.csv"), ("law 'magic' is unknown; choose one of: dcpt",)),
        (("dcpt", "--features", "early.csv"), ("--features goes with law fit cross-domain, not dcpt; leave",)),
        (("l1", "--variant", "k3"), ("--variant goes with law fit cross-domain, not l1",)),
        (("cross-domain", "--drop-highest", 1), ("law fit cross-domain leaves no rows out; leave --drop-highest out",)),
        (("cross-domain", "--features", "early.csv", "--variant", "k9"),
         ("early.csv cannot be read (No such file or directory)",)),
        *(
            (("ptq", *flags), (f"law fit ptq takes RESULTS.csv, --output and --json, not {flags[0]}; leave",))
            for flags in (("--fix", "A=1"), ("--starts", 40), ("--features", "early.csv"), ("--seed", 0))
        ),
    ],
)  # fmt: skip
def test_flags_that_are_not_used(cptquant: Callable, runs: Path, arguments: tuple, fragments: tuple) -> None:
    kind, *flags = arguments
    refused(cptquant("law", "fit", kind, runs, *flags, "--output", runs.parent / "x"), *fragments)


def test_compare_needs_something_to_hold_out(cptquant: Callable, grid: Observations, tmp_path: Path) -> None:
    path = tmp_path / "constant.csv"
    path.write_text(to_csv(grid.take(grid.tokens == grid.tokens.min())))
    refused(
        cptquant("law", "compare", path, "--forms", "cmr", "--holdout", "by=D"),
        "--holdout by=D needs runs of different lengths; half of the rows", "largest D = 1.3e+09", "another --holdout",
    )  # fmt: skip


def test_compare_of_one_run_is_valid_json(cptquant: Callable, grid: Observations, tmp_path: Path) -> None:
    """One run has no standard error over runs: null, which every reader takes, and not NaN."""
    path = tmp_path / "one.csv"
    path.write_text(to_csv(grid.take(grid.run == 3)))
    flags = ("--forms", "chinchilla", "--fix", "A=0", "--fix", "alpha=1", "--holdout", "by=D", "--starts", 1, "--json")
    outcome = cptquant("law", "compare", path, *flags)
    assert outcome.code == 0 and '"mae_stderr": null' in outcome.out and "NaN" not in outcome.out


@pytest.mark.parametrize("command", [("fit", "dcpt"), ("compare",), ("simulate",)])
def test_negative_seeds(cptquant: Callable, runs: Path, command: tuple) -> None:
    target = ("--output", runs.parent / "y.csv") if command == ("simulate",) else (runs,)
    outcome = cptquant("law", *command, *target, "--seed", -1)
    assert outcome.code == 2 and "'--seed'" in outcome.err and "greater than or equal to 0" in outcome.err
    assert not (runs.parent / "y.csv").exists()


def test_a_penalty_without_end(cptquant: Callable, runs: Path) -> None:
    outcome = cptquant("law", "fit", "dcpt", runs, "--penalty", "inf", "--output", runs.parent / "x")
    assert outcome.code == 2 and "'--penalty'" in outcome.err and "less than or equal to 1000000000" in outcome.err


def test_distinct_tokens_are_zero_before_training_only(tmp_path: Path) -> None:
    rows = "N,D,U,nll\n1e6,0,0,5\n1e6,1e6,{},4\n1e6,2e6,1e6,3.5\n"
    path = tmp_path / "runs.csv"
    path.write_text(rows.format("1e6"))
    assert len(read_observations(path)) == 2
    path.write_text(rows.format("0"))
    with pytest.raises(UserError, match=r"runs\.csv line 3: U = 0; U must be above zero"):
        read_observations(path)
