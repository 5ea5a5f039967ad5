"""The PTQ law: planted parameters come back, intervals cover, held-out families are held out, bad input is refused."""

import math

import numpy as np
import pytest

from cptquant.core.errors import ArtifactError, DataError
from cptquant.laws.ptq import PtqLawFit, fit_observations, fit_ptq_law, load_ptq_law
from cptquant.laws.ptq_forms import FORMS, LEAST_KL_NATS, Design, fit_coefficients
from cptquant.laws.ptq_scores import (
    EDGES_NATS,
    LEVEL,
    Bands,
    HeldOut,
    fit_bands,
    leave_one_family_out,
    r_squared,
    rise_scale,
)
from cptquant.laws.ptq_table import SHIPPED, read_observations
from laws.planted_ptq import (
    BEND,
    CORRECTION,
    PER_KL,
    PER_SLOPE,
    PLANTED,
    POWER,
    made_features,
    planted_kl,
    planted_table,
)

made = pytest.mark.skipif(not SHIPPED.exists(), reason="no table yet: run runs/ptq_grid.sh")


def test_planted_parameters_come_back():
    law = fit_coefficients(planted_table(families=10, plans=20), "full")
    assert law.coefficients["ln_taylor_kl"] == pytest.approx(POWER, rel=0.02)
    assert law.coefficients["ln_full_over_taylor"] == pytest.approx(CORRECTION, rel=0.02)
    assert law.coefficients["taylor_kl"] == pytest.approx(BEND, rel=0.1)
    for method, intercept in PLANTED.items():
        assert law.intercepts[method] == pytest.approx(intercept, abs=0.05)
        assert law.rise[method].per_kl == pytest.approx(PER_KL, rel=0.03)
        assert law.rise[method].per_slope == pytest.approx(PER_SLOPE, rel=0.1)


def test_prediction_of_a_new_plan_and_its_interval():
    fit = fit_observations(planted_table(noise=0.1), form="full", source="planted")
    features = made_features(method="gptq", taylor=0.05, full_over_taylor=1.2)
    found = fit.predict(features)
    assert found.kl_nats.value == pytest.approx(planted_kl(features), rel=0.1)
    assert found.kl_nats.low < planted_kl(features) < found.kl_nats.high
    assert found.nll_nats.value == pytest.approx(features.nll_nats + found.rise_nats.value)
    assert found.perplexity.low == pytest.approx(math.exp(found.nll_nats.low))
    assert found.outside == ()
    assert fit.predict(features.model_copy(update={"taylor_kl_nats": 40.0})).outside
    unchanged = fit.predict(features.model_copy(update={"taylor_kl_nats": 0.0, "slope": 0.0}))
    assert unchanged.kl_nats.value == unchanged.rise_nats.high == 0.0


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_intervals_cover_what_they_claim(noise):
    inside: list[bool] = []
    for seed in range(6):
        bands_fit = fit_observations(planted_table(noise=noise, seed=seed), form="full", source="planted")
        for row in planted_table(noise=noise, seed=100 + seed):
            found = bands_fit.predict(row.features).kl_nats
            inside.append(found.low <= row.kl_nats <= found.high)
    assert 0.85 <= np.mean(inside) <= 0.985, np.mean(inside)  # n = 768
    stated = bands_fit.held_out["full"].coverage_kl
    assert 0.8 <= stated <= 1.0


def test_a_family_is_predicted_without_its_own_rows():
    rows = planted_table(noise=0.1)
    spoiled = [row.model_copy(update={"kl_nats": row.kl_nats * 50}) if row.family == "f3" else row for row in rows]
    mine = [index for index, row in enumerate(rows) if row.family == "f3"]
    found = [leave_one_family_out(Design.build(table, "full")) for table in (rows, spoiled)]
    assert found[0].kl[mine].tolist() == found[1].kl[mine].tolist()
    by_hand = fit_coefficients([row for row in rows if row.family != "f3"], "full")
    assert [by_hand.kl_nats(rows[index].features) for index in mine] == pytest.approx(found[0].kl[mine].tolist())
    assert [by_hand.rise_nats(rows[index].features) for index in mine] == pytest.approx(found[0].rise[mine].tolist())
    others = leave_one_family_out(Design.build(rows, "full"), without=3)
    again = leave_one_family_out(Design.build([row for row in rows if row.family != "f3"], "full"))
    assert others.kl.tolist() == pytest.approx(again.kl.tolist())
    assert not set(others.rows.tolist()) & set(mine)


def test_bands_equal_sorting_by_hand():
    draw = np.random.default_rng(1)
    row = planted_table(families=1, plans=1)[0]
    rows = [
        row.model_copy(update={"kl_nats": 0.05 * math.exp(residual), "rise_nats": 0.05})
        for residual in draw.normal(size=59)
    ]
    points = HeldOut(np.arange(59), np.full(59, 0.05), np.full(59, 0.04))
    ordered = sorted(abs(math.log(found.kl_nats / 0.05)) for found in rows)
    bands = fit_bands(Design.build(rows, "full"), points)
    assert EDGES_NATS[0] < 0.05 < EDGES_NATS[1]
    assert bands.log_kl[1] == pytest.approx(ordered[math.ceil(LEVEL * 60) - 1])  # the 54th of 59
    assert bands.rise_scale[1] == pytest.approx(0.01 / rise_scale(0.05))
    low, high = bands.kl_interval(0.05)
    assert low * high == pytest.approx(0.05**2)


def test_wider_bands_for_larger_damage_never_narrower():
    bands = Bands(log_kl=(0.1, 0.2, 0.4), rise_scale=(0.1, 0.2, 0.3))
    widths = [math.log(bands.kl_interval(kl)[1] / kl) for kl in (0.001, 0.05, 0.5)]
    assert widths == pytest.approx([0.1, 0.2, 0.4])


def test_r_squared_by_hand():
    measured = np.array([1.0, 2.0, 4.0])
    assert r_squared(measured, measured) == 1
    assert r_squared(measured, np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - 1 / np.var(measured) / 3)


def test_ablation_without_the_rounding_loss_is_always_there():
    fit = fit_observations(planted_table(noise=0.02), form="full", source="planted")
    assert set(fit.held_out) == set(FORMS)
    # the planted law needs what only the rounding loss knows
    assert fit.held_out["full"].median_kl_factor < fit.held_out["landscape"].median_kl_factor


def test_rows_without_landscape_leave_the_other_forms():
    bare = {"half_kl_nats": None, "rtn_kl_nats": None, "slope": None, "tokens_seen": None}
    rows = [r.model_copy(update={"features": r.features.model_copy(update=bare)}) for r in planted_table()]
    fit = fit_observations(rows, form="taylor", source="planted")
    assert set(fit.laws) == {"taylor", "curvature"}
    with pytest.raises(DataError, match="the form 'full' of the PTQ law needs ln_full_over_taylor, which was not mea"):
        fit_observations(rows, form="full", source="planted")
    with pytest.raises(DataError, match="has no form 'full'; choose one of: curvature, taylor"):
        fit.predict(rows[0].features, "full")


def test_refusals():
    rows = planted_table()
    with pytest.raises(
        DataError, match=r"planted has 64 usable rows of 2 families; a PTQ law needs at least 24 rows of"
    ):
        fit_observations(planted_table(families=2), form="full", source="planted")
    with pytest.raises(DataError, match=r"--form .cubic. is unknown; choose one of: error, curvature, taylor"):
        fit_observations(rows, form="cubic", source="planted")
    fit = fit_observations(rows, form="full", source="planted")
    with pytest.raises(
        DataError, match=r"was fitted on block-ap \+ own text, gptq, gptq \+ own text, rtn, not on 'awq'"
    ):
        fit.predict(rows[0].features.model_copy(update={"method": "awq"}))


def test_a_law_is_json_and_comes_back_exactly(tmp_path):
    fit = fit_observations(planted_table(noise=0.1), form="full", source="planted")
    fit.save(tmp_path / "law.json")
    assert load_ptq_law(tmp_path / "law.json") == fit
    (tmp_path / "law.json").write_text(fit.to_json().replace('"cptquant.ptq_law"', '"something"'))
    with pytest.raises(ArtifactError, match=r"holds schema 'something', expected 'cptquant\.ptq_law'"):
        load_ptq_law(tmp_path / "law.json")


@made
def test_the_shipped_law_is_the_shipped_tables():
    shipped, again = load_ptq_law(), fit_ptq_law()
    assert shipped.inputs == again.inputs, "fit the law anew: runs/ptq_grid.sh"
    assert shipped.families == again.families
    for form, law in again.laws.items():
        assert shipped.laws[form].coefficients == pytest.approx(law.coefficients, rel=1e-6)
        assert shipped.held_out[form].r2_log_kl == pytest.approx(again.held_out[form].r2_log_kl, rel=1e-6)
    assert isinstance(shipped, PtqLawFit)


@made
def test_the_shipped_law_is_worth_what_the_page_says():
    """Held-out families of our own grid: the targets this law was built for."""
    scores = load_ptq_law().held_out["full"]
    rows = [row for row in read_observations(SHIPPED) if row.kl_nats >= LEAST_KL_NATS]
    assert scores.rows == len(rows)
    assert scores.r2_log_kl >= 0.95
    assert scores.median_error_3bit_nats <= 0.02
