import errno
import hashlib
import json
import math
import os
from typing import ClassVar, Self

import pytest
from allocation.made_layouts import table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator

from cptquant.core.artifact import Artifact, digest_file, digest_json, write_whole
from cptquant.core.errors import ArtifactError, OutputError
from cptquant.core.provenance import Provenance, Stopwatch
from cptquant.core.sensitivity import Damage, SensitivityTable

MAKE = "cptquant measure RUN --sensitivity METHOD"
TABLE = table_of({"a": {"int4-g64": Damage(value=0.1, stderr=0.01, n=3), "float16": Damage(value=0.0)}}, [1.5, 2.5])


def refusal(path, text):
    path.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        SensitivityTable.load(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sensitivity.json"


def test_survives_its_file(path):
    TABLE.save(path)
    assert SensitivityTable.load(path) == TABLE
    assert list(json.loads(path.read_text()))[:2] == ["schema", "schema_version"]
    assert TABLE.format_names == ("int4-g64", "float16")


@settings(deadline=None, max_examples=100)
@given(st.floats(min_value=0, allow_nan=False, allow_infinity=True))
def test_numbers_survive_exactly(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("numbers") / "sensitivity.json"
    table_of({"a": {"int4-g64": Damage(value=value)}}, []).save(path)
    assert SensitivityTable.load(path).damages["a"]["int4-g64"].value == value


def test_digest_is_of_the_content_not_of_how_it_came_about():
    later = TABLE.model_copy(update={"provenance": Provenance(wall_seconds=3.0)})
    other = TABLE.model_copy(update={"unit": "relative"})
    assert TABLE.digest() == later.digest() != other.digest()


def test_artifacts_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        TABLE.unit = "other"


def test_missing_file(path):
    with pytest.raises(ArtifactError) as caught:
        SensitivityTable.load(path)
    assert str(caught.value) == f"{path} does not exist; make it with: {MAKE}"


def test_a_folder_in_its_place(path):
    path.mkdir()
    with pytest.raises(ArtifactError, match=r"cannot be read \(.*directory.*\); make it anew with: "):
        SensitivityTable.load(path)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(TABLE.to_json().rstrip()) - 1))
def test_truncated_anywhere(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("truncated") / "sensitivity.json"
    message = refusal(path, TABLE.to_json()[:length])
    assert message.startswith(f"{path} is not valid JSON (")
    assert message.endswith(f"); make it anew with: {MAKE}")


def test_bytes_that_are_no_text(path):
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match=r"cannot be read \('utf-8' codec can't decode"):
        SensitivityTable.load(path)


def test_nested_beyond_reason(path):
    assert refusal(path, "[" * 200_000).startswith(f"{path} is not valid JSON (maximum recursion depth")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"x"', "str")])
def test_other_json(path, text, kind):
    assert refusal(path, text) == f"{path} holds a JSON {kind}, expected an object; make it anew: {MAKE}"


def changed(**changes):
    return json.dumps({**json.loads(TABLE.to_json()), **changes})


def test_another_schema(path):
    expected = f"{path} holds schema 'cptquant.plan', expected 'cptquant.sensitivity'; make it with: {MAKE}"
    assert refusal(path, changed(schema="cptquant.plan")) == expected
    assert "holds schema None" in refusal(path, "{}")


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_another_version(path, version):
    assert refusal(path, changed(schema_version=version)) == (
        f"{path} has schema_version {version!r}, this cptquant reads 1; make it anew with: {MAKE}"
    )


@pytest.mark.parametrize(
    ("changes", "field", "reason", "received"),
    [
        ({"unit": 3}, "unit", "Input should be a valid string", "3"),
        ({"damages": []}, "damages", "Input should be an object", "[]"),
        ({"damages": {"a": {"f": {"value": "0.1"}}}}, "damages.a.f.value", "Input should be a valid number", "'0.1'"),
        ({"damages": {"a": {"f": {"value": -1}}}}, "damages.a.f.value",
         "Input should be greater than or equal to 0", "-1"),
        ({"damages": {"a": {"f": {"value": math.nan}}}}, "damages.a.f.value",
         "Input should be greater than or equal to 0", "nan"),
        ({"damages": {"a": {"f": {"value": 1, "n": 1.5}}}}, "damages.a.f.n", "Input should be a valid integer", "1.5"),
        ({"damages": {"a": {"f": {}}}}, "damages.a.f.value", "Field required", "{}"),
        ({"block_scores": [{"block_index": "0", "value": 1}]}, "block_scores.0.block_index",
         "Input should be a valid integer", "'0'"),
        ({"extra": 1}, "extra", "Extra inputs are not permitted", "1"),
        ({"unit": ["x" * 200]}, "unit", "Input should be a valid string", "['" + "x" * 75 + "..."),
    ],
)  # fmt: skip
def test_wrong_types(path, changes, field, reason, received):
    assert refusal(path, changed(**changes)) == (
        f"{path}: field {field}: {reason}, received {received}; mend the field or make the file anew with: {MAKE}"
    )


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    written = []

    def full(descriptor):
        written.append(os.fstat(descriptor).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as caught:
        write_whole(path, b"new content")
    assert str(caught.value) == (
        f"disk full while writing {path}; finished stages are kept: free some space and run the same command again"
    )
    assert written == [11]  # the content had reached the file before the disk refused
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_other_refusals_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    for path, reason in [
        (tmp_path / "absent" / "plan.json", "No such file or directory"),
        (tmp_path / "file" / "plan.json", "Not a directory"),
        (tmp_path / "folder.json", "Is a directory"),
    ]:
        with pytest.raises(OutputError) as caught:
            write_whole(path, b"x")
        assert str(caught.value) == f"cannot write {path} ({reason}); choose another --output"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.json"]


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "plan.json"
    write_whole(path, b"a longer first content")
    write_whole(path, b"short")
    assert path.read_bytes() == b"short"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_digests(tmp_path):
    assert digest_json({"b": 1, "a": [2]}) == digest_json({"a": [2], "b": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert digest_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_stopwatch_fills_in_the_provenance():
    provenance = Stopwatch().provenance(seed=7, threads=2)
    assert (provenance.seed, provenance.threads, provenance.device) == (7, 2, "cpu")
    assert 0 <= provenance.wall_seconds < 60 and provenance.peak_memory_bytes > 10**6
    assert {"python", "numpy", "scipy"} <= set(provenance.versions)


class _Pair(Artifact):
    SCHEMA: ClassVar[str] = "test.pair"
    MADE_BY: ClassVar[str] = "cptquant pair"

    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, above high {self.high:g}")
        return self


def test_a_sentence_of_ones_own_stands_alone(tmp_path):
    """A validator's message names what it received; the whole content is not repeated after it."""
    path = tmp_path / "pair.json"
    path.write_text('{"schema": "test.pair", "schema_version": 1, "low": 2.0, "high": 1.0}')
    with pytest.raises(ArtifactError) as caught:
        _Pair.load(path)
    assert str(caught.value) == (
        f"{path}: low is 2, above high 1; mend the field or make the file anew with: cptquant pair"
    )
