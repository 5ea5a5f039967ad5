"""Text that is read in pieces is the text that was read whole, and little of it is ever held."""

import hashlib
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_text
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cptquant.adaptation.overlap import OverlapFilter, survey, training_part
from cptquant.adaptation.sources import (
    Record,
    SourceDocument,
    cut_into_pieces,
    json_parts,
    read_documents,
    read_records,
    take_records,
)
from cptquant.adaptation.token_files import (
    find_source,
    is_source_of,
    open_source,
    save_source,
    source_key,
    tokenise_once,
    tokenise_source,
)
from cptquant.core.artifact import digest_json
from cptquant.core.errors import ArtifactError, DataError, OutputError

DOCUMENTS = st.lists(
    st.builds(SourceDocument, st.text("ab \n", max_size=12), ends=st.booleans()), min_size=1, max_size=30
)
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


class Letters:
    """A tokenizer of one token a character, with or without an end of text."""

    def __init__(self, eos_token_id: int | None = 0) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}


@given(st.text(alphabet="ab \n\t", max_size=30_000), st.lists(st.integers(1, 20_000), max_size=8))
def test_pieces_do_not_depend_on_blocks(text: str, cuts: list[int]) -> None:
    places = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    blocks = [text[first:last] for first, last in itertools.pairwise(places)]
    assert list(cut_into_pieces(blocks)) == list(reference_text.pieces(text))


def test_no_more_than_a_block_and_a_piece_is_held() -> None:
    fed = given_out = held = 0

    def blocks() -> Iterator[str]:
        nonlocal fed, held
        for number in range(300):
            block = ("word " * 37 + "\n" * (1 + number % 3)) * 20
            fed += len(block)
            held = max(held, fed - given_out)
            yield block

    for piece in cut_into_pieces(blocks()):
        given_out += len(piece.text)
    assert given_out == fed > 1_000_000
    assert held <= 8000 + 20 * 188


@SAME_FOLDER
@given(st.text(alphabet="aé€😀 \r\n", max_size=6_000), st.integers(0, 3))
def test_a_file_reads_as_text_files_do(tmp_path: Path, text: str, shift: int) -> None:
    """Characters of one to four bytes and ends of lines that fall between two blocks."""
    path = tmp_path / "a.txt"
    content = ("x" * (65_536 - 3_000 + shift) + text + "end").encode()
    path.write_bytes(content)
    wanted = list(reference_text.pieces(path.read_text(encoding="utf-8")))
    assert list(read_documents([str(path)], "--domain")) == wanted


def test_the_place_of_a_byte_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for before in ("x" * 70_000, "x" * 65_535 + "\xe9", "x" * 65_534):
        path.write_bytes(before.encode() + b"\xff")
        place = len(before.encode())
        with pytest.raises(DataError, match=rf"a.txt cannot be read as UTF-8 text \(byte {place}: invalid start byte"):
            list(read_documents([str(path)], "--domain"))


def test_reading_holds_a_small_part_of_a_long_text(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"line {number % 97} of a text that is long\n\n" for number in range(20_000))
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"text": "row {number} of a text that is long"}}\n' for number in range(10_000))
    cleaner = OverlapFilter(["words of an evaluation text " * 20])
    tracemalloc.start()
    found = survey(cleaner.clean(read_documents([str(path), str(rows)], "--domain")), wanted=5000)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.characters > 900_000 and used < 500_000
    assert sum(len(each.text) for each in found.ending) < 5000 + 1100


@given(DOCUMENTS, st.integers(0, 60), st.integers(0, 60))
def test_the_tail_is_what_it_was(documents: list[SourceDocument], wanted: int, fewest: int) -> None:
    found = survey(documents, wanted=wanted)
    training, tail = reference_text.hold_out_tail(documents, wanted=wanted, fewest=fewest)
    assert found.documents == len(documents)
    assert list(found.tail(wanted=wanted, fewest=fewest)) == tail
    if tail:
        assert list(training_part(documents, found, len(tail), "--domain")) == training
    assert sum(len(each.text) for each in found.ending[1:]) < max(1, wanted)


@given(DOCUMENTS)
def test_a_digest_of_documents_tells_where_they_end(documents: list[SourceDocument]) -> None:
    joined = [SourceDocument("".join(document.text for document in documents))]
    same = survey(documents, wanted=0).digest == survey(joined, wanted=0).digest
    assert same == (documents == joined)


def test_text_that_changes_between_two_readings_is_refused() -> None:
    documents = [SourceDocument("one"), SourceDocument("two")]
    found = survey(documents, wanted=0)
    for others in (documents[:1], [*documents, documents[0]], documents[::-1]):
        with pytest.raises(DataError, match=r"--domain a.txt changed while it was read; leave the files alone and run"):
            list(training_part(others, found, 0, "--domain a.txt"))


@given(st.lists(st.builds(SourceDocument, st.text("ab ", max_size=12), ends=st.booleans()), max_size=20),
       st.text("ab ", max_size=12), st.sampled_from([0.0, 0.3, 1.0]))  # fmt: skip
def test_cleaning_keeps_what_it_kept(documents: list[SourceDocument], evaluation: str, share: float) -> None:
    cleaner = OverlapFilter([evaluation], share=share, words=2)
    cleaning = cleaner.clean(documents)
    wanted = reference_text.clean(cleaner, documents, share)
    assert list(cleaning) == wanted
    assert (cleaning.kept, cleaning.dropped) == (len(wanted), len(documents) - len(wanted))


@SAME_FOLDER
@example(documents=[SourceDocument("a", ends=False)], separator=0)
@given(DOCUMENTS, st.sampled_from([None, 0]))
def test_tokens_on_disk_are_those_in_memory(
    tmp_path: Path, documents: list[SourceDocument], separator: int | None
) -> None:
    tokenizer: Any = Letters(separator)
    if not any(document.text.strip() for document in documents):
        with pytest.raises(DataError, match="--domain holds no text; give documents with words in them"):
            tokenise_source("domain", documents, tokenizer, tmp_path / "none")
        return
    wanted = reference_text.tokenise("domain", documents, tokenizer)
    found = tokenise_source("domain", documents, tokenizer, tmp_path / "some", facts=lambda: {"dropped": 3})
    assert found.digest == wanted.digest and found.facts == {"dropped": 3}
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.starts, wanted.starts)
    assert found.tokens.dtype == np.int32 and found.starts.dtype == np.int64
    save_source(wanted, tmp_path / "saved")
    assert open_source("domain", tmp_path / "saved").digest == wanted.digest


@pytest.mark.parametrize("damage", ["tokens.i32", "starts.i64", "source.json"])
def test_damaged_tokens_are_not_used(tmp_path: Path, damage: str) -> None:
    tokenizer: Any = Letters()
    source = tokenise_source("domain", ["some text", "more"], tokenizer, tmp_path / "domain")
    digest, path = source.digest, tmp_path / "domain" / damage
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert find_source("domain", tmp_path / "domain") is None
    with pytest.raises(ArtifactError, match=r"domain holds no whole tokens \(.*\); run the same command again"):
        open_source("domain", tmp_path / "domain")
    assert tokenise_source("domain", ["some text", "more"], tokenizer, tmp_path / "domain").digest == digest


def test_tokens_that_stand_are_not_made_again(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(Letters):
        def __call__(self, texts: list[str], **more: Any) -> dict[str, list[list[int]]]:
            calls.append(len(texts))
            return super().__call__(texts, **more)

    def make(*texts: str, eos: int = 0) -> Path | None:
        tokenizer: Any = Counting(eos)
        return tokenise_once("law", lambda: [SourceDocument(text) for text in texts], tokenizer, tmp_path).folder

    first = make("one", "two")
    assert make("one", "two") == first and calls == [2]
    assert make("one", "two", eos=1) != first and make("one") != first and calls == [2, 2, 1]
    assert first is not None and is_source_of("law", first) and not is_source_of("la", first)
    (tmp_path / "law-old-0123").mkdir()
    (tmp_path / "law-0123.partial").mkdir()
    assert not is_source_of("law", tmp_path / "law-old-0123") and not is_source_of("law", tmp_path / "law-0123.partial")


def test_a_failing_reader_leaves_nothing(tmp_path: Path) -> None:
    tokenizer: Any = Letters()

    def broken() -> Iterator[str]:
        yield "x" * 300_000
        raise DataError("the file ended")

    with pytest.raises(DataError, match="the file ended"):
        tokenise_source("domain", broken(), tokenizer, tmp_path / "domain")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*domain .*; choose another --output"):
        tokenise_source("domain", ["x"], tokenizer, tmp_path / "file" / "domain")


def test_keys_tell_what_tokens_depend_on() -> None:
    tokenizer: Any = Letters()
    other: Any = Letters(None)
    keys = [
        source_key("a", tokenizer),
        source_key("b", tokenizer),
        source_key("a", other),
        source_key("a", tokenizer, 1),
    ]
    assert len(set(keys)) == 4 and keys[0] == source_key("a", tokenizer)


def test_records_are_read_again_and_only_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    rows = [{"instruction": f"Why {number}? ä", "response": "So."} for number in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    records = read_records([str(path)], "--instructions", preferences=False)
    assert len(records) == 9 and [record.number for record in records] == list(range(1, 10))
    assert (
        take_records(records, [4, 1]) == {1: list(records)[1], 4: list(records)[4]} and take_records(records, []) == {}
    )
    with path.open("a", encoding="utf-8") as file:
        file.write("\n{")
    assert take_records(records, [8])[8].question == "Why 8? ä"
    with pytest.raises(DataError, match=r"i.jsonl, line 10: not valid JSON"):
        list(records)


RECORDS = st.builds(Record, st.text('a"é\n', max_size=3), st.text(max_size=3), st.none() | st.text(max_size=3))


@given(st.lists(st.lists(RECORDS, max_size=3), max_size=3))
def test_json_in_parts_is_canonical(lists: list[list[Record]]) -> None:
    joined = "".join(json_parts(lists))
    wanted = digest_json([[asdict(record) for record in records] for records in lists])
    assert hashlib.sha256(joined.encode()).hexdigest() == wanted
