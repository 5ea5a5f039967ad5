"""The call that made a result can be typed again."""

import shlex
import sys

import pytest

from cptquant.core.provenance import Stopwatch


@pytest.mark.parametrize("program", ["/venv/bin/cptquant", "/venv/lib/cptquant/__main__.py"])
def test_the_command_can_be_typed_again(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "generate", "RUN", "--prompt", "it's a test"])
    command = Stopwatch().provenance().command
    assert shlex.split(command) == ["cptquant", "generate", "RUN", "--prompt", "it's a test"]
