"""Training text that evaluation text holds."""

from hypothesis import given
from hypothesis import strategies as st

from cptquant.adaptation.overlap import OverlapFilter, survey, training_part
from cptquant.adaptation.sources import SourceDocument

WORDS = [f"w{n}" for n in range(60)]


def text(*words: str) -> str:
    return " ".join(words)


@given(st.lists(st.sampled_from(WORDS[:4]), max_size=40), st.lists(st.sampled_from(WORDS[:4]), max_size=40),
       st.integers(1, 5))  # fmt: skip
def test_overlap_equals_counting(first: list[str], second: list[str], n: int) -> None:
    known = {tuple(first[i : i + n]) for i in range(len(first) - n + 1)}
    sequences = [tuple(second[i : i + n]) for i in range(len(second) - n + 1)]
    wanted = sum(each in known for each in sequences) / len(sequences) if sequences else None
    assert OverlapFilter([text(*first)], words=n).overlap(text(*second)) == wanted


def test_case_and_punctuation_do_not_hide_a_copy() -> None:
    cleaner = OverlapFilter([text(*WORDS[:20])])
    assert cleaner.overlap(", ".join(WORDS[:20]).upper() + "!") == 1.0


def test_documents_are_dropped_from_the_share_on() -> None:
    cleaner = OverlapFilter([text(*WORDS[:15])])
    few = SourceDocument(text(*WORDS[:15], *WORDS[30:54]))  # 3 of 27 sequences
    many = SourceDocument(text(*WORDS[:15], *WORDS[30:42]))  # 3 of 15
    short = SourceDocument(text(*WORDS[:12]))
    found = cleaner.clean([few, many, short])
    assert list(found) == [few, short] and (found.kept, found.dropped, found.short) == (2, 1, 1)
    assert list(OverlapFilter([text(*WORDS[:15])], share=0.1).clean([few, many])) == []


def test_a_dropped_end_ends_the_piece_before() -> None:
    pieces = [SourceDocument("kept", ends=False), SourceDocument(text(*WORDS[:20])), SourceDocument("next")]
    found = OverlapFilter([text(*WORDS[:20])]).clean(pieces)
    assert tuple(found) == (SourceDocument("kept", ends=True), SourceDocument("next"))


def test_the_tail_is_a_tenth_or_what_evaluation_needs() -> None:
    documents = [SourceDocument("x" * 10, ends=n % 2 == 1) for n in range(100)]

    def taken(wanted: int, fewest: int) -> int:
        found = survey(documents, wanted=wanted)
        tail = found.tail(wanted=wanted, fewest=fewest)
        training = list(training_part(documents, found, len(tail), "--domain"))
        assert [*training, *tail][: len(training) - 1] == documents[: len(training) - 1]
        assert not tail or training[-1].ends
        return len(tail)

    assert taken(10_000, 0) == 10  # a tenth
    assert taken(40, 0) == 4  # no more than wanted
    assert taken(10_000, 250) == 25  # more than a tenth where evaluation needs it
    assert taken(10_000, 5000) == 50  # never more than half
    assert survey(documents[:1], wanted=100).tail(wanted=100, fewest=100) == ()
