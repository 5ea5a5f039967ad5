import json
import re
import subprocess
import sys
from pathlib import Path

import machine
import peer_cells
import pytest
from peer_cells import run_cell


def command(script: str) -> list[str | Path]:
    return [sys.executable, "-c", script]


def test_a_cell_is_run_once_and_says_with_which_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peer_cells, "source_revision", lambda: "abc + changes")
    first = run_cell(tmp_path / "cell", command('print(\'RESULT {"versions": {"tool": "1"}}\')'), 1)
    assert first["revision"] == "abc + changes"
    assert first["versions"] == {"tool": "1"}
    monkeypatch.setattr(peer_cells, "source_revision", lambda: "def")
    assert run_cell(tmp_path / "cell", command("raise SystemExit('not run')"), 1) == first


def test_shared_work_is_charged_to_every_setting(tmp_path: Path):
    told = {"shared_earlier": {"cpu_seconds": 100.0, "wall_seconds": 200.0, "peak_memory_bytes": 1 << 40}}
    row = run_cell(tmp_path / "cell", command(f"print('RESULT ' + {json.dumps(told)!r})"), 1)
    assert 100 < row["cpu_seconds"] < 130
    assert 200 < row["wall_seconds"] < 260
    assert row["peak_memory_bytes"] == 1 << 40


def test_a_failure_is_kept_in_the_tools_own_words(tmp_path: Path):
    row = run_cell(tmp_path / "cell", command("raise SystemExit('no such width')"), 1)
    assert row["failure"] == "return code 1: no such width"


def test_sources_that_differ_from_the_commit_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.source_revision() == "unknown"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    clean = machine.source_revision()
    assert re.fullmatch("[0-9a-f]{10}", clean)
    (tmp_path / "results.json").write_text("not a source")
    git("add", ".")
    git("commit", "-q", "-m", "two")
    assert machine.source_revision() == clean
    (tmp_path / "src" / "a.py").write_text("2")
    assert machine.source_revision() == f"{clean} + changes"
