"""A made grid and its fitted law, once for all tests of this folder."""

from pathlib import Path

import pytest

from cptquant.core.laws import LawFit
from cptquant.laws.fit_law import FitOptions, fit_law
from cptquant.laws.methods import FORMS
from cptquant.laws.observations import Observations
from cptquant.laws.simulate import Simulation, simulate

SHARED = Path(__file__).parents[3] / "shared/data/laws"
QUICK = FitOptions(starts=6, draws=40)


@pytest.fixture(scope="session")
def grid() -> Observations:
    return simulate(Simulation(seed=1))


@pytest.fixture(scope="session")
def law(grid: Observations) -> LawFit:
    return fit_law(grid, FORMS["dcpt"], QUICK)


@pytest.fixture(scope="session")
def chinchilla(grid: Observations) -> LawFit:
    """A law without a mixture ratio."""
    return fit_law(grid, FORMS["chinchilla"], QUICK)


@pytest.fixture
def published() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no shared/data/laws beside the project")
    return SHARED
