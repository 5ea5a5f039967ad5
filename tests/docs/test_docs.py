"""Documentation that cannot drift: the reference is generated, the tutorial and the example run."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_cli_reference_is_current() -> None:
    generator = runpy.run_path(str(REPOSITORY / "docs/generate_cli_reference.py"))
    assert (REPOSITORY / "docs/cli-reference.md").read_text() == generator["render_reference"](), "run `make docs`"


def test_every_flag_has_a_help_text() -> None:
    for line in (REPOSITORY / "docs/cli-reference.md").read_text().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line


def test_tutorial_runs(cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/tutorial.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert len(commands) >= 8
    for command in commands:
        program, *arguments = command.split()
        assert program == "cptquant"
        outcome = cptquant(*arguments)
        assert outcome.code == 0, (command, outcome.err)
    assert (tmp_path / "first/report.html").exists()


def test_law_tutorial_runs(cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/law-tutorial.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert len(commands) >= 7
    for command in commands:
        program, *arguments = command.split()
        assert program == "cptquant"
        outcome = cptquant(*arguments)
        assert outcome.code == 0, (command, outcome.err)
    for page in ("laws/code/report.html", "laws/code/optimum.html", "scarce.html", "compute.html"):
        assert "<svg" in (tmp_path / page).read_text(), page


def test_adaptation_tutorial_runs(cptquant: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents by the shell, the plan from its block, then every command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    page = (REPOSITORY / "docs/adaptation-tutorial.md").read_text()
    shell, plan = (re.findall(rf"```{kind}\n(.*?)```", page, re.S) for kind in ("sh", "yaml"))
    subprocess.run(["sh", "-ec", shell[0]], check=True)
    (tmp_path / "plan.yaml").write_text(plan[0])
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines() if line]
    assert len(commands) == 6
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "cptquant"
        outcome = cptquant(*arguments)
        assert outcome.code == 0, (command, outcome.err)
    assert outcome.out.startswith("The plan is")
    assert "<svg" in (tmp_path / "decision/joint_plan.html").read_text()


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize_in_python.py", str(tmp_path / "run")])
    runpy.run_path(str(REPOSITORY / "examples/quantize_in_python.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "accuracy               quantized" in out and "loaded from checkpoint" in out


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("docs/**/*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"
