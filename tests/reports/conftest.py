from html.parser import HTMLParser
from pathlib import Path

import fake_runs
import pytest


@pytest.fixture
def opt_run(tmp_path: Path) -> Path:
    return fake_runs.OPT.write(tmp_path / "run")


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text of the page."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text = f"{self.text} {' '.join(data.split())}".rstrip()

    def count(self, tag: str, style: str = "") -> int:
        return sum(name == tag and style in ["", *(attrs.get("class") or "").split()] for name, attrs in self.tags)


@pytest.fixture
def read_page():
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
