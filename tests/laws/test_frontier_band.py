"""The band against textbook regression, planted lines and families left out."""

import math

import numpy as np
import pytest
from scipy import stats

from cptquant.core.forecast import FITTED_OWN_TEXT
from cptquant.core.frontier import BandPrior
from cptquant.core.settings import OWN_TEXT
from cptquant.laws.frontier_band import CENTER_NATS, calibrate, observed_prior, vague_prior
from cptquant.laws.ptq import load_ptq_law, usable_observations
from cptquant.laws.ptq_table import SHIPPED, read_observations

FLAT = BandPrior(
    center=0.0, intercept=0.0, intercept_std=1e6, slope=0.0, slope_std=1e6, scatter=1e-9, degrees=1e-9, informed=True,
    source="made",
)  # fmt: skip


def test_without_a_prior_it_is_the_regression_of_textbooks():
    rng = np.random.default_rng(0)
    damages = np.exp(rng.uniform(-6, -1, 9))
    losses = np.exp(0.3 + 0.9 * np.log(damages) + 0.1 * rng.standard_normal(9))
    found = calibrate(damages.tolist(), losses.tolist(), FLAT)
    assert found is not None
    x, y = np.log(damages), np.log(losses)
    line = stats.linregress(x, y)
    assert found.mean == pytest.approx((line.intercept, line.slope), rel=1e-5)
    # the flat prior takes no degrees of freedom for the two coefficients; a textbook does
    residuals = y - line.intercept - line.slope * x
    s = math.sqrt(float(residuals @ residuals) / 9)
    at = math.log(0.02)
    leverage = 1 + 1 / 9 + (at - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
    width = stats.t.ppf(0.95, 9) * s * math.sqrt(leverage)
    predicted = found.predict(0.02)
    assert math.log(predicted.high / predicted.value) == pytest.approx(width, rel=1e-4)
    assert math.log(predicted.value / predicted.low) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("points", [0, 2, 5])
def test_nine_of_ten_new_points_lie_inside_when_the_prior_is_right(points):
    """Lines and scatters drawn from the prior itself, 4,000 new points."""
    prior = BandPrior(center=-3.5, intercept=-4.0, intercept_std=0.4, slope=1.0, slope_std=0.05, scatter=0.15,
                      degrees=3.0, informed=True, source="made")  # fmt: skip
    rng, inside = np.random.default_rng(points), 0
    for _ in range(4000):
        scatter = math.sqrt(prior.degrees * prior.scatter**2 / rng.chisquare(prior.degrees))
        wide = scatter / prior.scatter  # the conjugate prior of the line scales with the scatter
        a = prior.intercept + wide * prior.intercept_std * rng.standard_normal()
        b = prior.slope + wide * prior.slope_std * rng.standard_normal()
        x = rng.uniform(-8, -1, points + 1)
        y = a + b * (x - prior.center) + scatter * rng.standard_normal(points + 1)
        keep = np.exp(y) > 1e-7
        keep[-1] = True
        fitted = calibrate(np.exp(x[:-1]).tolist(), np.exp(y[:-1]).tolist(), prior)
        assert fitted is not None
        band = fitted.predict(math.exp(x[-1]))
        inside += band.low <= math.exp(y[-1]) <= band.high
    assert inside / 4000 == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize(
    ("method", "factor"), [("rtn", 1.2), ("gptq", 1.5), ("gptq + own text", 1.5), ("block-ap + own text", 1.6)]
)
def test_families_left_out_are_covered(method, factor):
    """What frontier.json claims, on the package's own table: three plans of a family calibrate, the rest are judged."""
    rows = [row for row in usable_observations(read_observations(SHIPPED)) if row.features.method == method]
    rng, inside, factors = np.random.default_rng(0), 0, []
    families = sorted({row.family for row in rows})
    for family in families * 10:  # ten choices of the three: one draw is off by four points
        prior = observed_prior(method, without=(family,))
        assert prior is not None and "7 families" in prior.source
        mine = [row for row in rows if row.family == family]
        order = rng.permutation(len(mine))
        damages = [mine[i].features.taylor_kl_nats / mine[i].features.method_ratio for i in order]
        losses = [mine[i].kl_nats for i in order]
        found = calibrate(damages[:3], losses[:3], prior)
        assert found is not None
        for damage, loss in zip(damages[3:], losses[3:], strict=True):
            band = found.predict(damage)
            inside += band.low <= loss <= band.high
            factors.append(band.high / band.value)
    assert len(factors) > 900
    assert inside / len(factors) >= 0.88
    assert np.median(factors) < factor, "a band that covers everything says nothing"


@pytest.mark.parametrize("quantizer", ("gptq", "block-ap"))
def test_defaults_are_what_law_and_prior_know(quantizer: str):
    """Forecasts and bands of the defaults must not fall away."""
    method = f"{quantizer} + own text"
    assert load_ptq_law().knows(method) and observed_prior(method) is not None
    assert OWN_TEXT[quantizer] == FITTED_OWN_TEXT


def test_the_observed_prior_is_what_the_table_shows():
    prior = observed_prior("rtn")
    assert prior is not None
    rows = [row for row in usable_observations(read_observations(SHIPPED)) if row.features.method == "rtn"]
    families = sorted({row.family for row in rows})
    slopes = []
    for family in families:
        mine = [row for row in rows if row.family == family]
        x = np.log([row.features.taylor_kl_nats / row.features.method_ratio for row in mine])
        slopes.append(stats.linregress(x, np.log([row.kl_nats for row in mine])).slope)
    assert prior.slope == pytest.approx(np.mean(slopes))
    between = np.std(slopes, ddof=1) * math.sqrt(1 + 1 / len(families))
    assert prior.slope_std == pytest.approx(math.hypot(between, 0.1))
    assert prior.center == pytest.approx(math.log(CENTER_NATS))
    assert observed_prior("signround") is None
    assert observed_prior("rtn", without=families[:6]) is None


def test_a_prior_that_says_nothing_needs_three_points():
    prior = vague_prior(0.1)
    assert calibrate([0.1, 0.2], [1.0, 2.0], prior) is None
    assert calibrate([0.1, 0.2, 0.0], [1.0, 2.0, 0.0], prior) is None
    found = calibrate([0.1, 0.2, 0.4], [1.0, 2.0, 4.0], prior)
    assert found is not None and found.points == 3 and found.damages == (0.1, 0.4)
    assert found.predict(0.3).value == pytest.approx(3.0, rel=1e-3)
    assert [found.extrapolates(damage) for damage in (0.05, 0.1, 0.4, 0.5)] == [True, False, False, True]
    assert found.predict(40.0).high / found.predict(40.0).value > found.predict(0.2).high / found.predict(0.2).value


def test_points_in_another_order_say_the_same():
    prior = observed_prior("gptq")
    assert prior is not None
    damages, losses = [0.3, 0.1, 0.02], [0.2, 0.06, 0.01]
    one, two = calibrate(damages, losses, prior), calibrate(damages[::-1], losses[::-1], prior)
    assert one is not None and two is not None
    assert one.mean == pytest.approx(two.mean) and one.scatter == pytest.approx(two.scatter)


def test_a_ratio_of_losses():
    found = calibrate([0.1, 0.01], [0.05, 0.005], observed_prior("gptq"))
    assert found is not None
    down, up = found.change(0.1, 0.05), found.change(0.05, 0.1)
    assert down.value == pytest.approx(0.5 ** found.mean[1]) and down.value * up.value == pytest.approx(1)
    assert down.low * up.high == pytest.approx(1)
    assert found.change(0.1, 0.1, shared=1.0).high == 1.0, "a plan does not differ from itself"
    widths = [found.change(0.1, 0.09, shared).high for shared in (0.0, 0.5, 0.9, 1.0)]
    assert (
        widths == sorted(widths, reverse=True) and found.change(0.1, 0.09).value == found.change(0.1, 0.09, 0.9).value
    )
    independent = found.change(0.1, 0.1)
    assert math.log(independent.high) == pytest.approx(found.quantile * found.scatter * math.sqrt(2))
    with pytest.raises(ValueError, match="a ratio needs damages above 0, got 0 and 1"):
        found.change(0, 1)
