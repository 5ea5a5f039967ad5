"""The random forest of arXiv 2410.12119, for comparison: as good inside its data, silent about why, flat outside.

Needs scikit-learn, which is no dependency of the package: a forest is fitted anew from a table when it is wanted and
never stored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import UserError
from cptquant.laws.ptq_forms import TERMS, Floats
from cptquant.laws.ptq_table import PtqObservation

TREES, SEED = 300, 0
WITH_ROUNDING_LOSS = tuple(name for name in TERMS if name != "taylor_kl")
WITHOUT_ROUNDING_LOSS = tuple(name for name in WITH_ROUNDING_LOSS if name != "ln_full_over_taylor")


def forest_features(observations: Sequence[PtqObservation], terms: Sequence[str]) -> Floats:
    """(n, terms + 4): the terms, code bits, group, GPTQ or not, own text or not; a feature not measured is -1."""
    rows: list[list[float]] = []
    for row in observations:
        values = [TERMS[name](row.features) for name in terms]
        rows.append(
            [
                *(-1.0 if value is None else value for value in values),
                row.features.code_bits,
                row.features.group_columns,
                float(row.features.method != "rtn"),
                float(row.features.method == "gptq + own text"),
            ]
        )
    return np.array(rows)


def forest_left_out(
    features: Floats,  # (n, k)
    target: Floats,  # (n,): a logarithm
    families: Sequence[str],  # (n,)
) -> Floats:
    """Target of every row by a forest on the other families, (n,).

    Raises:
        UserError: scikit-learn is not installed.
    """
    labels = np.array(families)
    predicted = np.zeros(len(target))
    for family in dict.fromkeys(families):
        held: NDArray[np.bool_] = labels == family
        predicted[held] = _forest().fit(features[~held], target[~held]).predict(features[held])
    return predicted


def _forest() -> Any:
    try:
        # Here: the package works without it, and it has no type stubs.
        from sklearn.ensemble import RandomForestRegressor  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise UserError("a random forest needs scikit-learn; install it with: pip install scikit-learn") from None
    return RandomForestRegressor(TREES, random_state=SEED)
