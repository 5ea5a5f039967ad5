"""A value of a YAML file together with its place, so that whatever is wrong with it can be told."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cptquant.core.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class YamlNode:
    """One value.

    Attributes:
        value: as the YAML reader gave it. place: `ratios[2]`, `domains.law.train`; "" for the whole file.
        path: of the file; names in it are taken from its folder.

    Every method raises UserError where the value is not what it is asked for.
    """

    value: object
    place: str
    path: Path

    def wrong(self, what: str, allowed: str) -> UserError:
        """An error: where, what was found, what is allowed."""
        where = f"{self.path}: {self.place}" if self.place else str(self.path)
        return UserError(f"{where} {what}; {allowed}")

    @property
    def raw_mapping(self) -> dict[object, object] | None:
        """The value where it is a mapping, whatever its keys."""
        value: Any = self.value
        return cast(dict[object, object], value) if isinstance(value, dict) else None

    @property
    def raw_list(self) -> list[object] | None:
        """The value where it is a list."""
        value: Any = self.value
        return cast(list[object], value) if isinstance(value, list) else None

    def mapping(self, keys: Sequence[str], required: Sequence[str] = ()) -> dict[str, "YamlNode"]:
        """The values of a mapping whose keys are among `keys`."""
        raw = self.raw_mapping
        if raw is None:
            raise self.wrong(f"is {self.value!r}", f"expected keys: {', '.join(keys)}")
        for key in raw:
            if key not in keys:
                raise self.wrong(f"has the unknown key {key!r}", f"allowed: {', '.join(keys)}")
        for key in required:
            if key not in raw:
                raise self.wrong(f"has no key {key}", f"it needs {', '.join(required)}")
        prefix = f"{self.place}." if self.place else ""
        return {str(key): YamlNode(value, f"{prefix}{key}", self.path) for key, value in raw.items()}

    def items(self) -> list["YamlNode"]:
        """The values of a list."""
        values = self.raw_list
        if values is None:
            raise self.wrong(f"is {self.value!r}", "expected a list: [a, b]")
        return [YamlNode(value, f"{self.place}[{index}]", self.path) for index, value in enumerate(values)]

    def text(self) -> str:
        """Text that is not empty."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong(f"is {self.value!r}", "expected text")
        return self.value.strip()

    def name(self) -> str:
        """A name that can stand in the name of a file."""
        text = str(self.value) if isinstance(self.value, int | float) else self.text()
        if not NAME.fullmatch(text):
            raise self.wrong(f"is {text!r}", "a name has letters, digits, _ and . only")
        return text

    def local(self, text: str) -> Path:
        """A path, taken from the folder of the file."""
        path = Path(text).expanduser()
        return path if path.is_absolute() else self.path.parent / path

    def file(self) -> str:
        """A file or folder that exists."""
        path = self.local(self.text())
        if not path.exists():
            raise self.wrong(f"is {self.value!r}", f"and {path} does not exist; give a file of text")
        return str(path)

    def model(self) -> str:
        """A model's folder, a hub id or `embedded:NAME`."""
        text = self.text()
        path = self.local(text)
        return str(path) if not text.startswith("embedded:") and path.is_dir() else text

    def number(self, low: float, high: float, *, above: bool = False) -> float:
        """A number in a range; `above`: the low end is not allowed."""
        value = self.value
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                value = None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(f"is {self.value!r}", f"expected a number from {low:g} to {high:g}")
        if above and value == low:
            raise self.wrong(f"is {self.value!r}", f"expected a number above {low:g}, at most {high:g}")
        return float(value)

    def share(self) -> float:
        """A share, 0 to 1."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            percent = isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100
            hint = f" (is it percent? then write {cast(float, value) / 100:g})" if percent else ""
            raise self.wrong(f"is {value!r}", f"expected the domain's share of the tokens, 0 to 1{hint}")
        return float(value)

    def whole(self, low: int, high: int) -> int:
        """A whole number in a range."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(f"is {value!r}", f"expected a whole number from {low:,} to {high:,}")
        return value
