"""What can be trained on, read and refused."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cptquant.adaptation.sources import (
    SourceDocument,
    cut_into_pieces,
    embedded_documents,
    read_documents,
    read_records,
)
from cptquant.core.errors import DataError


def texts(specs: list[Path], flag: str = "--domain") -> list[str]:
    return [document.text for document in read_documents([str(spec) for spec in specs], flag)]


@given(st.text(alphabet="ab \n\t", max_size=20_000))
def test_pieces_of_plain_text_add_up_to_it(text: str) -> None:
    pieces = list(cut_into_pieces([text]))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_pieces_are_cut_at_empty_lines_else_at_line_ends() -> None:
    paragraphs = ["x" * 600 + "\n\n", "y" * 600 + "\n\n", "z" * 600]
    assert [p.text for p in cut_into_pieces(paragraphs)] == ["".join(paragraphs[:2]), paragraphs[2]]
    lines = [f"{'C' * 90}\n"] * 40
    assert all(p.text.endswith("\n") and len(p.text) < 1200 for p in cut_into_pieces(lines))
    assert [len(p.text) for p in cut_into_pieces(["q" * 20_000])] == [8000, 8000, 4000]


def test_every_form_and_folders(tmp_path: Path) -> None:
    import datasets
    from pyarrow import Table, parquet

    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "b.txt").write_text("plain text", encoding="utf-8")
    (inside / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n', encoding="utf-8")
    with gzip.open(inside / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "zipped"}\n')
    parquet.write_table(Table.from_pylist([{"text": "row one"}, {"text": "row two"}]), inside / "d.parquet")
    (inside / "ignored.md").write_text("no", encoding="utf-8")
    assert texts([inside]) == ["first", "second", "plain text", "zipped", "row one", "row two"]
    datasets.Dataset.from_list([{"text": "saved"}]).save_to_disk(str(tmp_path / "set"))
    assert texts([tmp_path / "set", inside / "b.txt"]) == ["saved", "plain text"]
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "x"}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"--domain .*splits has the splits test, but no train"):
        texts([tmp_path / "splits"])


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    rows = [{"instruction": "Why?", "response": "So."}, {"question": "How?", "answer": "Thus."},
            {"instruction": "Add", "input": "1 2", "output": "3"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    records = read_records([str(path)], "--instructions", preferences=False)
    assert [record.text for record in records] == ["Why?\nSo.", "How?\nThus.", "Add\n1 2\n3"]
    assert [record.number for record in records] == [1, 2, 3]
    path.write_text('{"prompt": "P", "chosen": "good", "rejected": "bad"}\n', encoding="utf-8")
    (record,) = read_records([str(path)], "--preferences", preferences=True)
    assert record.text == "P\ngood" and record.rejected == "bad"


@pytest.mark.parametrize(
    ("line", "preferences", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', True, r"i.jsonl, line 2: no \"rejected\" among \['chosen', 'prompt'\]"),
        ('{"instruction": "a"}', False, 'line 2: no "response or answer or output or completion" among'),
        ('{"instruction": "a", "response": " "}', False, "line 2: response is ' ', expected a text with words in it"),
        ('{"instruction": 3, "response": "b"}', False, "line 2: instruction is 3, expected a text"),
        ("[1]", False, "line 2: a JSON list, expected an object with a question and an answer"),
        ("{", False, "line 2: not valid JSON"),
    ],
)
def test_records_with_missing_keys(tmp_path: Path, line: str, preferences: bool, message: str) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r", "response": "a"}
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps(good) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_records([str(path)], "--instructions", preferences=preferences)


def test_unusable_files(tmp_path: Path) -> None:
    def refuse(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            texts([tmp_path / name])

    refuse("empty.txt", b" \n", "--domain .*empty.txt holds no text; give UTF-8 .txt files")
    refuse("latin.txt", b"\xe4\xf6", "--domain .*latin.txt cannot be read as UTF-8 text")
    refuse("a.pdf", b"x", r"--domain .*a.pdf has an unknown ending '.pdf'")
    refuse("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: text is 3, expected")
    refuse("b.jsonl", b'{"body": "x"}', r"b.jsonl, line 1: no \"text\" among \['body'\]")
    refuse("a.parquet", b"no parquet", "--domain .*a.parquet cannot be read as parquet")
    refuse("a.jsonl.gz", b"no gzip", "--domain .*a.jsonl.gz cannot be read after line 0")
    with pytest.raises(DataError, match=r"--domain .*gone.txt does not exist"):
        texts([tmp_path / "gone.txt"])
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"hollow is a folder without .txt, .jsonl, .jsonl.gz, .parquet files"):
        texts([tmp_path / "hollow"])
    with pytest.raises(DataError, match=r"--instructions .*empty.txt has an unknown ending"):
        read_records([str(tmp_path / "empty.txt")], "--instructions", preferences=False)
    (tmp_path / "none.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"--preferences .*none.jsonl holds no records"):
        read_records([str(tmp_path / "none.jsonl")], "--preferences", preferences=True)


def test_the_embedded_text() -> None:
    first = next(embedded_documents())
    assert isinstance(first, SourceDocument) and first.ends and len(first.text) > 100
