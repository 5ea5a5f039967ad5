"""A memory budget, as a person writes it, and the bytes it means for a model."""

import re
from dataclasses import dataclass
from typing import Literal

from cptquant.core.errors import BudgetError
from cptquant.core.layout import ModelLayout

_UNIT_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_TOO_LARGE = 1e15  # beyond it no unit means anything, and floats stop counting single bytes
_TEXT = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z%]+)\s*(?P<scope>@sites)?\s*", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A limit on the written weights.

    Attributes:
        value: the number. unit: "bpw" (bits per weight), "%" (of the original's bytes) or "bytes".
        scope: "file" counts every tensor written (embeddings, head, norms, scales included) against all parameters;
            "sites" counts the blocks' linear sites only (scales included), the form papers use, and leaves
            embedding and head in 16 bits.
        text: as a person wrote it. flag: where; `--memory` makes a budget too.
    """

    value: float
    unit: Literal["bpw", "%", "bytes"]
    scope: Literal["file", "sites"] = "file"
    text: str = ""
    flag: str = "--budget"

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `4bpw`, `3.25bpw@sites`, `25%`, `12MB`, `1.2GiB`.

        Raises:
            BudgetError: unreadable, zero, or a scope where it has no meaning.
        """
        allowed = "write --budget as 4bpw, 3.25bpw@sites, 25%, 12MB, 120MiB or 1.2GB"
        match = _TEXT.fullmatch(text)
        if match is None:
            raise BudgetError(f"--budget {text!r} is not readable; {allowed}")
        value, unit, scope = float(match["number"]), match["unit"].lower(), match["scope"]
        if not 0 < value < _TOO_LARGE:
            raise BudgetError(f"--budget {text!r} must be above zero and below 1e15; {allowed}")
        if unit in _UNIT_BYTES:
            if scope:
                raise BudgetError(f"--budget {text!r}: @sites goes with bpw only; {allowed}")
            return cls(value * _UNIT_BYTES[unit], "bytes", "file", text.strip())
        if unit == "%":
            if scope:
                raise BudgetError(f"--budget {text!r}: @sites goes with bpw only; {allowed}")
            return cls(value, "%", "file", text.strip())
        if unit == "bpw":
            return cls(value, "bpw", "sites" if scope else "file", text.strip())
        raise BudgetError(f"--budget {text!r} has the unknown unit {match['unit']!r}; {allowed}")

    def limit_bytes(self, layout: ModelLayout) -> int:
        """Largest number of bytes allowed: of the whole file, or of the blocks' linear sites for scope "sites"."""
        if self.unit == "bytes":
            return int(self.value)
        if self.unit == "%":
            return int(layout.source_bytes * self.value / 100)
        if self.scope == "sites":
            return int(sum(site.weight_count for site in layout.block_sites) * self.value / 8)
        return int(layout.parameters * self.value / 8)
