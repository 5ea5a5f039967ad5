"""What a frontier.json may not hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reports import fake_runs

from cptquant.core.errors import ArtifactError
from cptquant.core.frontier import Frontier


def _without_vertices(raw: dict[str, Any]) -> None:
    raw["vertices"] = []


def _with_scatter(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["calibration"].update(scatter=value)


def _with_variance(place: int, value: float) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["calibration"]["covariance"][place] = value

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_vertices, "field vertices: Tuple should have at least 1 item after validation, not 0"),
        (_with_scatter(-0.1), "field calibration.scatter: Input should be greater than or equal to 0, received -0.1"),
        (_with_scatter(float("inf")), "field calibration.scatter: Input should be a finite number, received inf"),
        (_with_scatter(float("nan")), "field calibration.scatter: Input should be a finite number, received nan"),
        (_with_variance(0, -1.0), "field calibration.covariance.0: Input should be greater than or equal to 0"),
        (_with_variance(2, -1.0), "field calibration.covariance.2: Input should be greater than or equal to 0"),
    ],
)
def test_damaged_frontiers_are_refused(damage: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    fake_runs.frontier().save(path)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError) as caught:
        Frontier.load(path)
    assert said in str(caught.value) and "cptquant frontier MODEL --output RUN" in str(caught.value)


def test_a_negative_correlation_is_no_damage(tmp_path: Path) -> None:
    frontier = fake_runs.frontier()
    assert frontier.calibration is not None
    calibration = frontier.calibration.model_copy(update={"covariance": (0.1, -0.05, 0.1)})
    frontier.model_copy(update={"calibration": calibration}).save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json").calibration == calibration
