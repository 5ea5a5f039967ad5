"""law.json as a person may have edited it: it answers with finite numbers, or is refused with what is wrong."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cptquant.core.errors import ArtifactError, UserError
from cptquant.core.laws import LawFit
from cptquant.laws.optimum import best_ratio_under_limit, best_size_for_flops
from cptquant.laws.predict import predict_law
from cptquant.laws.ptq import fit_observations, load_ptq_law
from cptquant.laws.simulate_domains import PLANTED
from cptquant.stages.law import load_law
from laws.planted_ptq import planted_table

ADVICE = "make (it|the file) anew with: cptquant law fit"
DOMAIN = ("fits", "domain_nll")


@pytest.fixture(scope="module")
def content(law: LawFit) -> dict[str, Any]:
    """The file with few draws and without the maps, so that it is quick to read."""
    found = json.loads(law.to_json())
    for fit in found["fits"].values():
        fit["draws"], fit["requirements"] = fit["draws"][:3], []
    return found


def changed(content: dict[str, Any], place: tuple, value: object) -> dict[str, Any]:
    """A copy with one value set, or taken out where the value is `...`."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for part in place[:-1]:
        inner = inner[part]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


def written(tmp_path: Path, content: dict[str, Any]) -> Path:
    (tmp_path / "law.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("fits",), {}, "law.json: the file holds no law of any loss; mend"),
        ((*DOMAIN, "form"), "l9", "law.json, domain_nll: law 'l9' is unknown; choose one of: dcpt"),
        ((*DOMAIN, "form"), "l4", "law l4 has the parameters E, A, alpha, B, beta, b, C, c, the file has E, A, alpha"),
        ((*DOMAIN, "form"), "dcpt-inflection", "gamma, eps, ri, the file has E, A, alpha, B, beta, eta, C, gamma, eps"),
        ((*DOMAIN, "parameters"), [], "field fits.domain_nll: the law of domain_nll has no parameters; mend"),
        ((*DOMAIN, "draws"), [], "the law of domain_nll has 0 draws, intervals need at least 2; mend"),
        ((*DOMAIN, "draws", 1), [1.0, 2.0], "a draw of domain_nll has 2 numbers, the law has 9 parameters"),
        ((*DOMAIN, "draws", 1, 2), -0.5, "domain_nll: alpha = -0.5 lies outside 0.01 to 5"),
        ((*DOMAIN, "draws", 1, 0), math.nan, "a parameter or a draw of domain_nll is not a finite number"),
        ((*DOMAIN, "parameters", 0, "value"), math.nan, "a parameter or a draw of domain_nll is not a finite number"),
        ((*DOMAIN, "parameters", 0, "value"), math.inf, "a parameter or a draw of domain_nll is not a finite number"),
        ((*DOMAIN, "parameters", 1, "value"), -1.0, "domain_nll: A = -1 lies outside 0 to 10000"),
        ((*DOMAIN, "parameters", 8, "value"), 0.0, "domain_nll: eps = 0 lies outside 0.0001 to 1"),
        ((*DOMAIN, "widening"), 0.0, "widening: Input should be greater than 0, received 0.0"),
        ((*DOMAIN, "widening"), math.inf, "widening: Input should be a finite number, received inf"),
        ((*DOMAIN, "run_std"), -1.0, "run_std: Input should be greater than or equal to 0, received -1.0"),
        ((*DOMAIN, "row_std"), math.nan, "row_std: Input should be a finite number, received nan"),
        ((*DOMAIN, "corpus"), "foo", "corpus: Input should be '', 'domain' or 'general', received 'foo'"),
        ((*DOMAIN, "corpus"), "general", "corpus is 'general', expected 'domain' for domain_nll and law dcpt"),
        ((*DOMAIN, "target"), "nll", "the law of domain_nll says that its target is 'nll'"),
        ((*DOMAIN, "ranges", "r"), ..., "domain_nll: the range of r is missing"),
        ((*DOMAIN, "ranges", "r", "low"), -5.0, "the range of r is -5 to 1, expected low to high within 0 to 1"),
        ((*DOMAIN, "ranges", "r", "low"), 2.0, "the range of r is 2 to 1"),
        ((*DOMAIN, "ranges", "N", "low"), 0.0, "the range of N is 0 to 4e+09, expected low to high within 10000"),
        ((*DOMAIN, "ranges", "N", "low"), math.nan, "ranges.N.low: Input should be a finite number"),
        (("fits", "general_nll", "base"), [[1e9, math.inf]], "base.0.1: Input should be a finite number"),
        (("fits", "general_nll", "base"), [[1e9, -1.0]], "base.0.1: Input should be greater than 0"),
        (("kind",), "cross-domain", "a cross-domain law needs the fit of domain_nll and the features of its domains"),
        (("features",), {"a": [math.inf, 0.1, 0.0]}, "features.a.0: Input should be a finite number"),
        (("features",), {"a": [0.0, 0.1, 0.0]}, "features.a.0: Input should be greater than 0"),
    ],
)
def test_damage(tmp_path: Path, content: dict[str, Any], place: tuple, value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)) as refusal:
        load_law(written(tmp_path, changed(content, place, value)))
    assert re.search(ADVICE, str(refusal.value)) and "Value error" not in str(refusal.value)


def test_a_law_of_another_loss(tmp_path: Path, content: dict[str, Any]) -> None:
    fits = {**content["fits"], "foo": content["fits"]["domain_nll"]}
    with pytest.raises(ArtifactError, match=r"'foo' is no loss; expected general_nll, domain_nll or nll"):
        load_law(written(tmp_path, {**content, "fits": fits}))


def test_a_law_without_any_term(tmp_path: Path, content: dict[str, Any]) -> None:
    for place in (0, 1, 3, 6):  # E, A, B, C: each may be zero, not all of them
        content = changed(content, (*DOMAIN, "parameters", place, "value"), 0.0)
    with pytest.raises(ArtifactError, match=r"domain_nll: the parameters or a draw give no finite loss; mend"):
        load_law(written(tmp_path, content))


def test_a_file_or_its_folder_whatever_its_name(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "odd.json").mkdir()
    written(tmp_path / "odd.json", content)
    assert load_law(tmp_path / "odd.json") == load_law(tmp_path / "odd.json/law.json")


NUMBERS = [
    *((*DOMAIN, "parameters", place, "value") for place in range(9)),
    *((*DOMAIN, "draws", draw, place) for draw in range(2) for place in range(9)),
    *((*DOMAIN, name) for name in ("widening", "run_std", "row_std")),
    *((*DOMAIN, "ranges", letter, end) for letter in ("N", "D", "r") for end in ("low", "high")),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(NUMBERS),
    value=st.one_of(st.floats(), st.floats(-10, 10), st.sampled_from([0.0, 1e-4, 1.0, 5.0, 1e4, 1e9])),
)
def test_any_number_is_refused_or_gives_finite_answers(
    tmp_path: Path, content: dict[str, Any], place: tuple, value: float
) -> None:
    folder = written(tmp_path, changed(content, place, value))
    try:
        law = load_law(folder)
    except ArtifactError:
        return
    for interval in predict_law(law, 1.8e9, 10e9, 0.5).values():
        assert interval is not None
        assert 0 < interval.low <= interval.value <= interval.high < math.inf
    if place[2] in ("parameters", "draws"):
        found = best_ratio_under_limit(law, 1.8e9, 10e9, 0.03)[0]
        assert 0 <= found.r.low <= found.r.value <= found.r.high <= 1
        try:
            best = best_size_for_flops(law, 1e20, 0.5)
        except UserError as refusal:  # a law next to without a size or data term
            assert "which no run can have" in str(refusal)
        else:
            assert 0 < best.N.low <= best.N.value <= best.N.high < math.inf


@pytest.fixture(scope="module")
def ptq_content() -> dict[str, Any]:
    return json.loads(fit_observations(planted_table(noise=0.1), form="full", source="planted.csv").to_json())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("laws",), {}, "its form 'full' is none of its laws (it has none)"),
        (("form",), "foo", "its form 'foo' is none of its laws (error, curvature, taylor, landscape, full)"),
        (("bands", "taylor"), ..., "the law 'taylor' has no bands"),
        (("laws", "full", "form"), "taylor", "the law 'full' is of form 'taylor'; known forms: error"),
        (("laws", "full", "coefficients", "ln_taylor_kl"), ..., "the law 'full' lacks ln_taylor_kl in coefficients"),
        (("laws", "full", "high", "taylor_kl"), ..., "the law 'full' lacks taylor_kl in high"),
        (("laws", "full", "rise", "rtn"), ..., "the law 'full' lacks rtn in rise"),
        (("laws", "full", "intercepts", "rtn"), math.nan, "intercepts.rtn: Input should be a finite number"),
        (("bands", "full", "log_kl"), [], "has 0 widths"),
    ],
)
def test_damaged_ptq_laws(
    tmp_path: Path, ptq_content: dict[str, Any], place: tuple, value: object, message: str
) -> None:
    folder = written(tmp_path, ptq_content)
    assert load_ptq_law(folder) == load_ptq_law(folder / "law.json")
    with pytest.raises(ArtifactError, match=re.escape(message)) as refusal:
        load_ptq_law(written(tmp_path, changed(ptq_content, place, value)))
    assert re.search(ADVICE, str(refusal.value))


def test_planted_domains_are_inside_the_bounds() -> None:
    from cptquant.laws.cross_domain import VARIANTS

    for parameter in VARIANTS["k3"].parameters:
        assert parameter.relative or parameter.low <= PLANTED[parameter.name] <= parameter.high
