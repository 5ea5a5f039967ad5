"""Shares of a mixture: exact after every prefix, and refused where they are none."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptquant.core.errors import DataError
from cptquant.core.mixture import SourceCount, apportion_windows, check_epochs, divide_tokens


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any), st.integers(1, 400))
def test_counts_stay_within_one_window_after_every_prefix(weights: list[int], windows: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    order = apportion_windows(shares, windows)
    counts = np.cumsum(np.eye(len(shares))[order], axis=0)
    wanted = np.outer(np.arange(1, windows + 1), shares)
    positive = sum(weight > 0 for weight in weights)
    bound = 0 if positive == 1 else 1 - 1 / (2 * positive - 2)
    assert np.abs(counts - wanted).max() <= bound + 1e-6


def test_a_source_without_a_share_is_never_taken() -> None:
    assert set(apportion_windows([0.5, 0, 0.5], 50).tolist()) == {0, 2}


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0]])
def test_shares_that_are_no_parts_of_one(shares: list[float]) -> None:
    with pytest.raises(DataError, match="are not parts of 1 that add up to it"):
        apportion_windows(shares, 10)


def test_tokens_are_divided() -> None:
    everything = ("domain", "general", "instructions", "preferences")
    assert divide_tokens(0.6, 0.2, everything) == pytest.approx(
        {"domain": 0.6, "general": 0.2, "instructions": 0.1, "preferences": 0.1}
    )
    assert divide_tokens(0.6, 0.2, everything[:3]) == pytest.approx(
        {"domain": 0.6, "general": 0.2, "instructions": 0.2}
    )
    assert divide_tokens(0.6, 0.2, everything[:2]) == pytest.approx({"domain": 0.6, "general": 0.4})
    assert divide_tokens(0.9, 0.2, everything) == pytest.approx(
        {"domain": 0.9, "instructions": 0.05, "preferences": 0.05}
    )
    assert divide_tokens(1.0, 0.2, everything) == {"domain": 1.0}
    assert divide_tokens(0.0, 0.0, everything) == {"general": 1.0}


@given(
    st.floats(0, 1), st.floats(0, 1),
    st.sampled_from([c for n in range(3) for c in itertools.combinations(("instructions", "preferences"), n)]),
)  # fmt: skip
def test_divided_shares_are_parts_of_one(ratio: float, chat: float, chats: tuple[str, ...]) -> None:
    shares = divide_tokens(ratio, chat, ("domain", "general", *chats))
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9) and min(shares.values()) > 0
    apportion_windows(list(shares.values()), 3)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_the_unit_interval(ratio: float) -> None:
    with pytest.raises(DataError, match=r"--ratio \S+ is no share of the tokens; give a number from 0 to 1"):
        divide_tokens(ratio, 0.2, ("domain", "general"))


def test_a_share_without_its_source() -> None:
    with pytest.raises(DataError, match=r"--ratio 0.6 leaves 0.4 of the tokens to general text.*--general or put it"):
        divide_tokens(0.6, 0.2, ("domain",))


def test_too_many_epochs_are_refused_with_the_numbers() -> None:
    count = SourceCount(name="domain", share=0.5, windows=50, tokens=5000, held_tokens=1000)
    check_epochs([count], 5)
    with pytest.raises(DataError, match=r"domain text holds 1,000 tokens and its share 0.5 asks for 5,000: 5.0 epochs, "
                       "above --max-epochs 4; give more text with --domain, fewer --tokens"):  # fmt: skip
        check_epochs([count], 4)
