"""The joint plan against brute force over a dense grid, its limits, and what it says of them."""

from dataclasses import replace

import numpy as np
import pytest

from cptquant.core.errors import BudgetError, UserError
from cptquant.core.joint import JointStatus
from cptquant.core.laws import LawFit
from cptquant.laws.joint import Damages, Limits, Size, plan_jointly
from cptquant.laws.optimum import FitStack

BASE = {0.5e9: 3.0, 1.8e9: 2.75, 4e9: 2.6}
SECONDS = {0.5e9: 1e-6, 1.8e9: 3e-6, 4e9: 7e-6}


def sizes() -> list[Size]:
    return [
        Size(f"{n / 1e9:g}B", n, BASE[n], SECONDS[n], {b: (f"int{b}", int(n * b / 8)) for b in (2, 3, 4, 16)})
        for n in BASE
    ]


def rise(bits: int, size: Size, tokens: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    if bits == 16:
        return np.zeros((2, len(tokens)))
    value = 6.0 * np.exp(-1.4 * bits) * (size.parameters / 1e9) ** -0.3 * (tokens / 1e9) ** 0.2
    return np.stack([value, 1.1 * value, 0.9 * value])


DAMAGES = Damages(rise, rise, 0.1, 0.1)
LIMITS = Limits(1.2e9, 20_000.0, None, None, 8e9, 40e9, 1.0)


def brute_force(law: LawFit, limits: Limits) -> tuple[float, str, int, float, float]:
    """(loss, size, bits, ratio, tokens) of the best point of a dense grid."""
    domain, general = (FitStack.of(law.fits[name]) for name in ("domain_nll", "general_nll"))
    low, high = domain.fit.ranges["r"].low, domain.fit.ranges["r"].high
    ratios = np.linspace(low, high, 301)
    best = (np.inf, "", 0, 0.0, 0.0)
    for size in sizes():
        for bits, (_, size_bytes) in size.formats.items():
            if size_bytes > limits.size_bytes:
                continue
            for ratio in ratios:
                most = min(
                    limits.seconds / size.seconds_per_token,
                    limits.max_epochs * limits.domain_tokens / max(ratio, 1e-12),
                    limits.max_epochs * limits.general_tokens / max(1 - ratio, 1e-12),
                )
                tokens = np.geomspace(min(domain.fit.ranges["D"].low, most), most, 25)
                shares = np.full(len(tokens), ratio)
                extra = rise(bits, size, tokens, shares)[0]
                loss = domain.loss(size.parameters, tokens, shares)[0] + extra
                other = general.loss(size.parameters, tokens, shares)[0] + extra
                if limits.general_increase is not None:
                    loss = np.where(other / size.base_loss - 1 <= limits.general_increase, loss, np.inf)
                place = int(np.argmin(loss))
                if loss[place] < best[0]:
                    best = (float(loss[place]), size.name, bits, float(ratio), float(tokens[place]))
    return best


@pytest.mark.parametrize("increase", [None, 0.03, -0.02])
def test_against_brute_force(law: LawFit, increase: float | None) -> None:
    limits = replace(LIMITS, general_increase=increase)
    answer = plan_jointly(law, sizes(), DAMAGES, limits)
    loss, size, bits, ratio, tokens = brute_force(law, limits)
    best = answer.best
    assert (best.size, best.bits) == (size, bits) and best.allowed
    assert best.domain_nll.value <= loss + 2e-4
    assert best.ratio == pytest.approx(ratio, abs=0.02) and best.tokens == pytest.approx(tokens, rel=0.15)
    assert best.domain_nll.low < best.domain_nll.value < best.domain_nll.high
    assert best.domain_rise.value == pytest.approx(
        rise(bits, next(s for s in sizes() if s.name == size), np.array([best.tokens]), np.array([0.5]))[0, 0]
    )
    assert 0 <= answer.agreement <= 1 and answer.share_range.low <= best.ratio <= answer.share_range.high
    if increase is not None:
        assert best.general_increase <= increase + 1e-6 and JointStatus.GENERAL_LIMIT in answer.statuses
    for point in answer.candidates:
        assert not point.allowed or point.domain_nll.value >= best.domain_nll.value - 1e-9


def test_what_binds(law: LawFit) -> None:
    answer = plan_jointly(law, sizes(), DAMAGES, LIMITS)
    assert JointStatus.SIZE_LIMIT in answer.statuses
    assert {JointStatus.COMPUTE_LIMIT, JointStatus.TEXT_LIMIT} & set(answer.statuses)
    roomy = plan_jointly(law, sizes(), DAMAGES, replace(LIMITS, size_bytes=1e12))
    assert roomy.best.bits == 16 and JointStatus.SIZE_LIMIT not in roomy.statuses
    scarce = plan_jointly(law, sizes(), DAMAGES, replace(LIMITS, domain_tokens=2e8))
    assert JointStatus.TEXT_LIMIT in scarce.statuses and scarce.best.ratio * scarce.best.tokens <= 2e8 * 1.001
    hopeless = plan_jointly(law, sizes(), DAMAGES, replace(LIMITS, general_increase=-0.5))
    assert hopeless.statuses[0] is JointStatus.INFEASIBLE and not hopeless.best.allowed


def test_neighbours_differ_in_one_thing(law: LawFit) -> None:
    answer = plan_jointly(law, sizes(), DAMAGES, LIMITS)
    best, found = answer.best, {point.label: point for point in answer.neighbours}
    assert found["more bits"].bits > best.bits and found["more bits"].size == best.size
    assert found["half the tokens"].tokens == pytest.approx(best.tokens / 2)
    assert found["half the tokens"].domain_nll.value > best.domain_nll.value
    other = [point for label, point in found.items() if label.startswith("share")]
    assert other and all(point.tokens <= best.tokens * 1.0001 for point in other)


def test_flops_are_counted(law: LawFit) -> None:
    limits = replace(LIMITS, seconds=None, flops=1e20)
    best = plan_jointly(law, sizes(), DAMAGES, limits).best
    assert best.flops == pytest.approx(6 * best.parameters * best.tokens) and best.flops <= 1e20 * 1.0001


def test_refusals(law: LawFit, chinchilla: LawFit) -> None:
    with pytest.raises(
        BudgetError, match=r"--max-size allows 1,000 bytes, and the smallest file, size 0\.5B at 2 bits"
    ):
        plan_jointly(law, sizes(), DAMAGES, replace(LIMITS, size_bytes=1e3))
    with pytest.raises(UserError, match="law chinchilla does not depend on r, which is to be chosen"):
        plan_jointly(chinchilla, sizes(), DAMAGES, LIMITS)
