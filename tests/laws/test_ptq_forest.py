"""The forest that the law is compared with."""

import sys

import numpy as np
import pytest

from cptquant.core.errors import UserError
from cptquant.laws.ptq_forest import WITHOUT_ROUNDING_LOSS, forest_features, forest_left_out
from laws.planted_ptq import planted_table


def test_a_forest_predicts_families_it_has_not_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cptquant.laws.ptq_forest.TREES", 30)
    rows = planted_table(families=4, plans=12, noise=0.05)
    features, target = forest_features(rows, WITHOUT_ROUNDING_LOSS), np.log([row.kl_nats for row in rows])
    families = [row.family for row in rows]
    found = forest_left_out(features, target, families)
    assert np.corrcoef(found, target)[0, 1] > 0.9
    spoiled = np.where(np.array(families) == "f1", 40.0, target)
    again = forest_left_out(features, spoiled, families)
    mine = np.array(families) == "f1"
    assert again[mine].tolist() == found[mine].tolist()
    assert not np.allclose(again[~mine], found[~mine])


def test_without_scikit_learn_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match="a random forest needs scikit-learn; install it with: pip install"):
        forest_left_out(np.zeros((4, 1)), np.zeros(4), ["a", "a", "b", "b"])
