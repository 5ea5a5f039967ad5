"""The three uses against brute force over a million points, and the closed form against calculus."""

import numpy as np
import pytest

from cptquant.core.errors import UserError
from cptquant.core.laws import LawFit, OptimumStatus
from cptquant.laws.methods import FORMS
from cptquant.laws.optimum import (
    best_ratio_for_domain_tokens,
    best_ratio_under_limit,
    best_size_for_flops,
    closed_form_size,
)
from cptquant.laws.predict import fitted_theta, make_points

SIZE, TOKENS = 1.8e9, 10e9


def losses(law: LawFit, name: str, size, tokens, ratio) -> np.ndarray:
    form, theta, _ = fitted_theta(law.fits[name])
    return form.loss(theta[None], make_points(law.fits[name], size, tokens, ratio))[0]


@pytest.mark.parametrize("increase", [0.005, 0.03, 0.1, 0.5])
def test_use_1(law: LawFit, increase: float) -> None:
    found, reference = best_ratio_under_limit(law, SIZE, TOKENS, increase)
    ratio = np.linspace(0, 1, 400_001)
    allowed = losses(law, "general_nll", SIZE, TOKENS, ratio) <= reference.loss[0] * (1 + increase)
    domain = np.where(allowed, losses(law, "domain_nll", SIZE, TOKENS, ratio), np.inf)
    assert found.r.value == pytest.approx(ratio[domain.argmin()], abs=2e-5)
    assert found.domain_nll is not None and found.domain_nll.value == pytest.approx(domain.min(), abs=5e-6)
    assert found.general_nll is not None
    assert found.general_nll.value <= reference.loss[0] * (1 + increase) + 1e-9
    if found.status is OptimumStatus.LIMIT_BINDS:
        assert found.r.low < found.r.value < found.r.high
    else:
        assert increase == 0.5 and found.status is OptimumStatus.EDGE_OF_DATA


def test_use_1_with_a_base_loss_and_without_a_solution(law: LawFit) -> None:
    found, reference = best_ratio_under_limit(law, SIZE, TOKENS, 0.03, base_loss=2.0)
    assert reference.loss[0] == 2.0 and "given" in reference.origin
    assert found.status is OptimumStatus.INFEASIBLE and found.r.value == pytest.approx(0.0, abs=1e-9)


def test_use_1_refers_to_rows_before_training(law: LawFit) -> None:
    general = law.fits["general_nll"].model_copy(update={"base": ((SIZE, 2.45),)})
    based = law.model_copy(update={"fits": {**law.fits, "general_nll": general}})
    assert best_ratio_under_limit(based, SIZE, TOKENS, 0.03)[1].loss[0] == 2.45
    assert "before training" in best_ratio_under_limit(based, SIZE, TOKENS, 0.03)[1].origin


@pytest.mark.parametrize("domain_tokens", [1e9, 5e9, 12e9])
def test_use_2(law: LawFit, domain_tokens: float) -> None:
    found = best_ratio_for_domain_tokens(law, SIZE, domain_tokens)
    ratio = np.linspace(0.001, 1, 400_001)
    domain = losses(law, "domain_nll", SIZE, domain_tokens / ratio, ratio)
    assert found.r.value == pytest.approx(ratio[domain.argmin()], abs=2e-4)
    assert found.domain_nll is not None and found.domain_nll.value == pytest.approx(domain.min(), abs=1e-8)
    assert found.D.value == pytest.approx(domain_tokens / found.r.value)


@pytest.mark.parametrize("flops", [1e19, 1e20, 1e22])
def test_use_3(law: LawFit, flops: float) -> None:
    found = best_size_for_flops(law, flops, 0.5)
    size = np.geomspace(found.N.value / 30, found.N.value * 30, 400_001)
    domain = losses(law, "domain_nll", size, flops / 6 / size, 0.5)
    assert found.N.value == pytest.approx(size[domain.argmin()], rel=1e-4)
    assert 6 * found.N.value * found.D.value == pytest.approx(flops)
    assert found.N.low < found.N.value < found.N.high


def test_use_3_without_a_closed_form(law: LawFit) -> None:
    """The extension with its inflection ratio near zero is L3, but is searched."""
    base = law.fits["domain_nll"]
    ri = base.parameters[0].model_copy(update={"name": "ri", "value": 1e-30})
    searched = base.model_copy(
        update={
            "form": "dcpt-inflection",
            "parameters": (*base.parameters, ri),
            "draws": tuple((*draw, 1e-30) for draw in base.draws),
        }
    )
    slow = best_size_for_flops(law.model_copy(update={"fits": {"domain_nll": searched}}), 1e20, 0.5)
    assert slow.N.value == pytest.approx(best_size_for_flops(law, 1e20, 0.5).N.value, rel=1e-4)
    assert slow.N.low == pytest.approx(best_size_for_flops(law, 1e20, 0.5).N.low, rel=1e-3)


def test_closed_form_of_chinchilla() -> None:
    """arXiv 2203.15556, eq. 4, at alpha = beta and A = B: N = D."""
    form = FORMS["chinchilla"]
    theta = form.vector({"E": 1.0, "A": 0.5, "alpha": 0.3, "B": 0.5, "beta": 0.3})[None]
    assert closed_form_size(form, theta, 1.0, 9e18)[0] == pytest.approx(3e9)


def test_a_law_of_one_loss_cannot_trade(law: LawFit) -> None:
    only = law.model_copy(update={"fits": {"domain_nll": law.fits["domain_nll"]}})
    with pytest.raises(UserError, match=r"this law holds domain_nll, not general_nll; fit it on data with a column"):
        best_ratio_under_limit(only, SIZE, TOKENS, 0.03)
    assert best_ratio_for_domain_tokens(only, SIZE, 5e9).general_nll is None
