"""The mixture of tokenised sources."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.sources import SourceDocument
from cptquant.adaptation.token_files import TokenSource, tokenise_source
from cptquant.core.errors import DataError
from cptquant.models.load import load_model
from cptquant.models.losses import IGNORED


def made(name: str, tokens: int, first: int = 0, starts: tuple[int, ...] = (0,)) -> TokenSource:
    ids = np.arange(first, first + tokens, dtype=np.int32)
    return TokenSource.build(name, ids, np.array([*starts, tokens], dtype=np.int64))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 90), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(2, 8), st.integers(1, 60), st.integers(0, 2**40),
)  # fmt: skip
def test_every_window_of_a_source_comes_once_an_epoch(
    drawn: list[tuple[int, int]], window: int, windows: int, seed: int
) -> None:
    sources = [made(f"s{i}", size, 1000 * i) for i, (size, _) in enumerate(drawn)]
    weight = sum(w for _, w in drawn)
    mixture = Mixture(
        sources, [w / weight for _, w in drawn], window_tokens=window, total_tokens=window * windows + window - 1,
        seed=seed, max_epochs=1e9,
    )  # fmt: skip
    assert len(mixture) == windows
    seen: dict[int, list[int]] = {}
    for index in range(windows):
        got = mixture[index]
        assert got.input_ids.shape == (window,) and (got.labels == got.input_ids).all() and got.position_ids is None
        first = int(got.input_ids[0]) - 1000 * got.source
        assert first % window == 0 and (np.diff(got.input_ids) == 1).all()
        seen.setdefault(got.source, []).append(first // window)
    for source, slots in seen.items():
        count = drawn[source][0] // window
        for start in range(0, len(slots), count):
            epoch = slots[start : start + count]
            assert len(set(epoch)) == len(epoch) and (len(epoch) < count or set(epoch) == set(range(count)))
    for count in mixture.counts():
        assert count.windows == len(seen.get(int(count.name[1:]), [])) and count.tokens == count.windows * window
        assert count.epochs == pytest.approx(count.windows / (drawn[int(count.name[1:])][0] // window))


@given(st.integers(0, 10**6), st.permutations(range(40)))
@settings(max_examples=20, deadline=None)
def test_random_access_equals_iteration(seed: int, order: list[int]) -> None:
    def build() -> Mixture:
        return Mixture(
            [made("a", 30), made("b", 50, 1000)], [0.3, 0.7], window_tokens=4, total_tokens=160, seed=seed, max_epochs=9
        )

    walked = build()
    once = [walked[k].input_ids.tolist() for k in range(40)]
    jumped = build()
    assert {k: jumped[k].input_ids.tolist() for k in order} == dict(enumerate(once))
    assert len(list(walked)) == 40  # iteration ends by IndexError


def test_counts_of_a_prefix() -> None:
    mixture = Mixture([made("a", 40), made("b", 40)], [0.25, 0.75], window_tokens=4, total_tokens=64, seed=0)
    assert [c.windows for c in mixture.counts(8)] == [2, 6]
    assert [c.windows for c in mixture.counts()] == [4, 12]
    assert [c.epochs for c in mixture.counts()] == [0.4, 1.2]


def test_shares_of_other_sources_do_not_change_the_order_within_one() -> None:
    def slots(shares: list[float]) -> list[int]:
        mixture = Mixture([made("a", 400), made("b", 400)], shares, window_tokens=4, total_tokens=160, seed=3)
        return [slot for source, slot in map(mixture.place, range(len(mixture))) if source == 0]

    half, most = slots([0.5, 0.5]), slots([0.8, 0.2])
    assert most[: len(half)] == half


def test_epochs_are_permuted_anew_and_seeds_differ() -> None:
    def slots(seed: int) -> list[int]:
        mixture = Mixture([made("a", 80)], [1.0], window_tokens=4, total_tokens=160, seed=seed)
        return [mixture.place(k)[1] for k in range(40)]

    assert slots(0)[:20] != slots(0)[20:] and slots(0) == slots(0) != slots(1)


def test_digest_tells_what_windows_depend_on() -> None:
    def digest(*, tokens: int = 64, seed: int = 0, share: float = 0.5, size: int = 40, apart: bool = False) -> str:
        return Mixture(
            [made("a", size), made("b", 40)], [share, 1 - share], window_tokens=4, total_tokens=tokens, seed=seed,
            keep_documents_apart=apart,
        ).digest  # fmt: skip

    changed = [digest(tokens=68), digest(seed=1), digest(share=0.6), digest(size=41), digest(apart=True)]
    assert digest() == digest(tokens=67) and digest() not in changed and len(set(changed)) == 5


def test_documents_kept_apart() -> None:
    source = made("a", 12, starts=(0, 3, 4))
    mixture = Mixture([source], [1.0], window_tokens=6, total_tokens=12, seed=0, keep_documents_apart=True)
    windows = {int(mixture[k].input_ids[0]): mixture[k] for k in range(2)}
    assert windows[0].labels.tolist() == [0, 1, 2, IGNORED, IGNORED, 5]  # position 0 is predicted by nothing
    assert windows[0].position_ids is not None and windows[0].position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert windows[6].labels.tolist() == [6, 7, 8, 9, 10, 11]
    assert windows[6].position_ids is not None and windows[6].position_ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_refusals() -> None:
    a, b = made("a", 40), made("b", 3)
    with pytest.raises(DataError, match=r"b text holds 3 tokens, less than one window of 4; .* a smaller --window"):
        Mixture([a, b], [0.5, 0.5], window_tokens=4, total_tokens=16, seed=0)
    with pytest.raises(DataError, match=r"--tokens 3 do not fill one window of 4"):
        Mixture([a], [1.0], window_tokens=4, total_tokens=3, seed=0)
    with pytest.raises(DataError, match=r"a text holds 40 tokens .* asks for 200: 5.0 epochs, above --max-epochs 4"):
        Mixture([a], [1.0], window_tokens=4, total_tokens=200, seed=0)


def test_tokenise_source(tmp_path: Path) -> None:
    tokenizer = load_model("embedded:opt-mini").require_tokenizer()
    eos = tokenizer.eos_token_id
    assert eos is not None
    pieces = [SourceDocument("import os\n", ends=False), SourceDocument("import sys\n"), "   ", "return value"]
    source = tokenise_source("code", pieces, tokenizer, tmp_path / "code")
    joined = [*tokenizer("import os\n")["input_ids"], *tokenizer("import sys\n")["input_ids"], eos]
    assert source.tokens.tolist() == [*joined, *tokenizer("return value")["input_ids"], eos]
    assert source.starts.tolist() == [0, len(joined), len(source.tokens)] and source.document_count == 2
    assert source.digest == tokenise_source("other", pieces, tokenizer, tmp_path / "other").digest
    assert source.digest != tokenise_source("code", pieces[1:], tokenizer, tmp_path / "part").digest
    with pytest.raises(DataError, match="--code holds no text"):
        tokenise_source("code", ["", " \n"], tokenizer, tmp_path / "none")
