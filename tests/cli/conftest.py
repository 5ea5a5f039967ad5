"""Running the command line inside the test process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cptquant.cli.main import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cptquant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call `cptquant ARGUMENTS` and return its exit code and output; a traceback never gets this far."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cptquant", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call
