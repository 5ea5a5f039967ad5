"""Missing, cut short and altered files are told apart; files that were never recorded do not count."""

import os
from pathlib import Path

import pytest

from cptquant.core.written_files import digest_folder, list_damage, size_folder


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "inside" / "config.json").write_text("{}")
    return tmp_path


def test_whole_files_have_no_damage(written: Path) -> None:
    digests, sizes = digest_folder(written), size_folder(written)
    assert sizes == {"inside/config.json": 2, "model.bin": 2560} and set(digests) == set(sizes)
    (written / "README").write_text("added by a person")
    assert list_damage(written, digests, sizes) == []


def test_each_kind_of_damage_is_named(written: Path) -> None:
    digests, sizes = digest_folder(written), size_folder(written)
    model = written / "model.bin"
    before = model.read_bytes()
    model.write_bytes(before[:800])
    assert list_damage(written, digests, sizes) == [f"{model} has 800 bytes, 2,560 were written"]
    assert list_damage(written, digests, {}) == [f"{model} was changed after it was written (its sha256 differs)"]
    model.write_bytes(before[:-1] + b"\x00")
    assert list_damage(written, digests, sizes) == [f"{model} was changed after it was written (its sha256 differs)"]
    model.write_bytes(before)
    (written / "inside" / "config.json").unlink()
    assert list_damage(written, digests, sizes) == [f"{written}/inside/config.json is missing"]


def test_a_file_is_read_again_when_its_time_changed(written: Path) -> None:
    digests, sizes = digest_folder(written), size_folder(written)
    model = written / "model.bin"
    state = model.stat()
    content = bytearray(model.read_bytes())
    content[5] ^= 1
    model.write_bytes(bytes(content))
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert len(list_damage(written, digests, sizes)) == 1
