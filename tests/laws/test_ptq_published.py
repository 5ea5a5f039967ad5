"""The PTQ law on perplexities that others published, each family of models predicted from the others."""

import math
from pathlib import Path

import numpy as np
import pytest

from cptquant.laws.ptq_published import (
    PublishedPoint,
    normal_error,
    predict_left_out,
    read_published,
    score_published,
    usable_points,
)

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "laws"


@pytest.fixture(scope="module")
def points() -> list[PublishedPoint]:
    if not FOLDER.is_dir():
        pytest.skip("the published tables stand beside the project")
    return read_published(FOLDER)


def test_errors_on_normal_numbers():
    # rounding with a step s in the bulk costs s^2/12; a group of two holds both ends exactly
    assert normal_error(False, 8, 2) == pytest.approx(0, abs=1e-20)
    fine = normal_error(False, 8, 4096)
    numbers = np.random.default_rng(1).standard_normal((200, 4096))
    span = numbers.max(axis=1) - numbers.min(axis=1)
    assert fine == pytest.approx(np.mean((span / 255) ** 2) / 12, rel=0.02)
    assert normal_error(True, 3, 16) < normal_error(True, 3, 128) < normal_error(True, 2, 128)


@pytest.mark.shared
def test_points_are_the_tables(points):
    assert len(points) == 198  # 186 + 24 rows, less 10 of float models and 2 NaN
    assert {p.family for p in points} == {"Llama 2", "Qwen2", "LLaMA"}
    known = next(p for p in points if (p.model, p.method, p.format) == ("LLaMa-7B", "GPTQ", "INT3-128"))
    assert known.rise_nats == pytest.approx(math.log(6.61 / 5.68)) and known.rounding_rise_nats is None
    known = next(p for p in points if (p.model, p.method, p.format) == ("Qwen2-7B", "GPTQ", "T2 MXINT4-128"))
    assert known.rise_nats == pytest.approx(math.log(9.73 / 9.23))
    assert known.rounding_rise_nats == pytest.approx(math.log(13.87 / 9.23))


@pytest.mark.shared
def test_left_out_families(points):
    """Target: R2 0.9 and 0.03 nats. The second is met; the first is not, because of Qwen2-7B (docs/ptq-law.md)."""
    with_rounding = usable_points(points, "rounding")
    scores = score_published(with_rounding, predict_left_out(with_rounding, "rounding"))
    assert scores.points == 156
    assert scores.r2_log >= 0.84
    assert scores.median_error_nats <= 0.01
    without = score_published(with_rounding, predict_left_out(with_rounding, "error"))
    assert without.r2_log < scores.r2_log - 0.1  # the ablation
    assert without.median_error_nats <= 0.03
    calm = [p for p in with_rounding if p.model != "Qwen2-7B"]
    assert score_published(calm, predict_left_out(calm, "rounding")).r2_log >= 0.9
