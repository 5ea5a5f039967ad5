"""Data nobody here made: the published points beside the project."""

from pathlib import Path

import numpy as np
import pytest

from cptquant.core.laws import FitStatus
from cptquant.laws.bootstrap import bootstrap, interval, widening
from cptquant.laws.fit import fit
from cptquant.laws.fit_law import FitOptions, fit_loss, problem_of
from cptquant.laws.methods import FORMS
from cptquant.laws.observations import Reading, read_observations

pytestmark = pytest.mark.shared


def test_chinchilla_refit(published: Path) -> None:
    """arXiv 2404.10102: all five parameters within 3 % and within their intervals."""
    theirs = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}
    data = read_observations(published / "chinchilla_epoch_points.csv", Reading(columns={"nll": "loss"}))
    problem = problem_of(data, FORMS["chinchilla"], "nll", FitOptions(drop_highest=5))
    theta = fit(problem, starts=10).theta
    vectors = np.concatenate([theta[None], bootstrap(problem, theta, draws=60)])
    names = list(problem.form.index)
    for amplitude, exponent in (("A", "alpha"), ("B", "beta")):
        vectors[:, names.index(amplitude)] += np.log(1e9) * np.exp(vectors[:, names.index(exponent)])
    low, high = np.exp(interval(vectors[0], vectors[1:], widening(problem)))
    for place, name in enumerate(names):
        assert np.exp(vectors[0, place]) == pytest.approx(theirs[name], rel=0.03), name
        assert low[place] <= theirs[name] <= high[place], name


def test_three_shares_of_a_real_run_do_not_hold_the_law(published: Path) -> None:
    names = {"N": "N_total", "D": "tokens", "r": "r_math", "domain_nll": "math_loss", "run": "mix"}
    data = read_observations(published / "delphi_midtrain_trajectory_sample.csv", Reading(columns=names))
    assert data.base["domain_nll"][0][1] == pytest.approx(1.4604, abs=1e-3)
    fitted, _ = fit_loss(
        data, FORMS["dcpt"], "domain_nll", FitOptions(starts=8, draws=20, fixed={"A": 0.0, "alpha": 1.0})
    )
    assert fitted.r2 > 0.9
    assert {FitStatus.TOO_FEW_RATIOS, FitStatus.NOT_IDENTIFIED} <= set(fitted.statuses)
    assert FitStatus.CONVERGED not in fitted.statuses
