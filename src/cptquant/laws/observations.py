"""Observed losses of training runs: a typed table, read from CSV with units that are declared and checked.

    N (parameters), D (tokens of the run, both corpora), r (domain share), general_nll, domain_nll (nats per token)

Optional: `run` (rows of one training run; default: equal N, r and domain), `domain`, `U` (distinct tokens),
`general_nll_stderr`, `domain_nll_stderr`. Rows with D = 0 hold the losses before training. Lines that begin with # are
comments. Units are never guessed: a column is called N_billions, or --N-unit says so, or N counts parameters.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import DataError
from cptquant.laws.forms import BILLION, Array, Points

LOSSES = ("general_nll", "domain_nll", "nll")
"""Loss columns that are recognised; `nll` is for data without a mixture."""

UNITS: dict[str, dict[str, float]] = {
    "N": {"parameters": 1.0, "millions": 1e6, "billions": 1e9},
    "D": {"tokens": 1.0, "millions": 1e6, "billions": 1e9},
    "U": {"tokens": 1.0, "millions": 1e6, "billions": 1e9},
}
QUANTITIES = ("N", "D", "r", "U", *LOSSES, *(f"{name}_stderr" for name in LOSSES), "run", "domain")
"""Everything that is read from a CSV, by its default column name."""
_COUNTS = {"N": "parameters", "D": "tokens", "U": "tokens"}
_PLAUSIBLE = {"N": (1e4, 1e14), "D": (1e4, 1e17), "U": (1e4, 1e17)}
LARGEST_NLL = 14.0
"""Nats per token: a little above ln 1,000,000, a uniform guess over the largest vocabularies."""


@dataclass(frozen=True)
class Reading:
    """How a CSV is to be read.

    Attributes:
        units: quantity (N, D, U) -> unit, as declared by flags. columns: quantity -> column name, where they differ.

    Raises:
        DataError: a column is told for something no law reads.
    """

    units: Mapping[str, str] = field(default_factory=dict[str, str])
    columns: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if name not in QUANTITIES:
                raise DataError(
                    f"--column {name}={column}: {name!r} is unknown; choose one of: {', '.join(QUANTITIES)}"
                )


@dataclass(frozen=True)
class Observations:
    """Rows of training runs; arrays are (n,).

    Attributes:
        source: file name, for messages. size: parameters. tokens: tokens trained on, > 0. ratio: domain share, None
            without a mixture. unique: distinct tokens. run: index of each row's run. domain: name of each row's.
        losses, stderrs: by loss column, nats per token. base: loss column -> (size, loss before training) pairs.
    """

    source: str
    size: Array
    tokens: Array
    ratio: Array | None
    unique: Array | None
    run: NDArray[np.int64]
    domain: tuple[str, ...]
    losses: dict[str, Array]
    stderrs: dict[str, Array] = field(default_factory=dict[str, Array])
    base: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict[str, tuple[tuple[float, float], ...]])

    def __len__(self) -> int:
        return len(self.size)

    @property
    def mixed(self) -> bool:
        """Whether the runs mix two corpora."""
        return self.ratio is not None

    def points(self, loss: str) -> Points:
        """Where the law of a loss is evaluated: the share is r for the domain's, 1 - r for the general one."""
        share = np.ones(len(self)) if self.ratio is None else self.ratio
        return Points(
            self.size / BILLION,
            self.tokens / BILLION,
            1 - share if loss == "general_nll" else share,
            None if self.unique is None else self.unique / BILLION,
        )

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> "Observations":
        """A selection of rows; runs are numbered anew."""
        places = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Observations(
            self.source,
            self.size[places],
            self.tokens[places],
            None if self.ratio is None else self.ratio[places],
            None if self.unique is None else self.unique[places],
            np.unique(self.run[places], return_inverse=True)[1].astype(np.int64),
            tuple(self.domain[place] for place in places),
            {name: values[places] for name, values in self.losses.items()},
            {name: values[places] for name, values in self.stderrs.items()},
            self.base,
        )

    def columns(self) -> dict[str, Array]:
        """The numeric columns by their letter."""
        found = {"N": self.size, "D": self.tokens}
        found |= {} if self.ratio is None else {"r": self.ratio}
        return found | ({} if self.unique is None else {"U": self.unique})


def read_observations(path: Path, reading: Reading | None = None) -> Observations:
    """Read and check a CSV of runs.

    Raises:
        DataError: missing file or columns, a cell that is no number, a unit that is missing or wrong, a ratio outside
            0 to 1, a loss that is not positive; the message names line and column.
    """
    rows, header = _read_rows(path)
    return _Table(path, rows, header, reading or Reading()).observations()


def _read_rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            numbered = [(number, line) for number, line in enumerate(file, 1) if not line.startswith("#")]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a CSV of runs, or make one with: cptquant law simulate") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a CSV of runs in UTF-8") from None
    numbered = [(number, line) for number, line in numbered if line.strip()]
    if len(numbered) < 2:
        raise DataError(f"{path} has no rows; the first line names columns (N, D, r, general_nll, domain_nll)")
    header = [name.strip() for name in next(csv.reader([numbered[0][1]]))]
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise DataError(f"{path} has two columns called {doubled[0]!r}; rename one")
    rows: list[tuple[int, dict[str, str]]] = []
    for number, line in numbered[1:]:
        cells = next(csv.reader([line]))
        if len(cells) != len(header):
            raise DataError(f"{path} line {number} has {len(cells)} cells, the header has {len(header)}")
        rows.append((number, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return rows, header


@dataclass(frozen=True)
class _Table:
    path: Path
    rows: list[tuple[int, dict[str, str]]]
    header: list[str]
    reading: Reading

    def observations(self) -> Observations:
        self._check_columns()
        losses = {name: self._losses(name) for name in LOSSES if self._column(name) in self.header}
        if not losses:
            raise DataError(
                f"{self.path} has no loss column; it has {', '.join(self.header)}. Expected general_nll, domain_nll "
                "(or nll without a mixture), in nats per token; another name is told by --column domain_nll=NAME"
            )
        size = self._counts("N", zero_allowed=False)
        tokens = self._counts("D", zero_allowed=True)
        ratio = self._ratios() if self._column("r") in self.header else None
        if ratio is None and "nll" not in losses:
            raise self._missing("r")
        unique = self._unique(tokens) if self._find_count("U") else None
        domain = self._domains()
        runs = self._runs(size, ratio, domain)
        trained = tokens > 0
        if not trained.any():
            raise DataError(f"{self.path}: every row has D = 0 (before training); add rows with D > 0")
        everything = Observations(
            str(self.path), size, tokens, ratio, unique, runs, domain, losses, self._stderrs(losses)
        )
        base = {name: _base_losses(size[~trained], values[~trained]) for name, values in losses.items()}
        kept = everything.take(trained)
        return replace(kept, base=base)

    def _check_columns(self) -> None:
        for name, column in self.reading.columns.items():
            if column not in self.header:
                raise DataError(
                    f"--column {name}={column}: {self.path} has no column {column!r}; it has {', '.join(self.header)}"
                )
        if "U" in self.reading.units and self._find_count("U") is None:
            raise DataError(
                f"--U-unit {self.reading.units['U']}: {self.path} has no column {self._column('U')}; leave the flag out"
            )
        used: dict[str, str] = {}
        for name in QUANTITIES:
            column = self._column(name)
            if column in self.header and used.setdefault(column, name) != name:
                raise DataError(
                    f"--column: {column} of {self.path} cannot be both {used[column]} and {name}; tell each its own "
                    "column"
                )

    def _column(self, quantity: str) -> str:
        return self.reading.columns.get(quantity, quantity)

    def _missing(self, name: str) -> DataError:
        return DataError(
            f"{self.path} has no column {self._column(name)!r}; it has {', '.join(self.header)}. Add it, or tell its "
            f"name: --column {name}=NAME"
        )

    def _find_count(self, quantity: str) -> tuple[str, str] | None:
        """(column, unit) of N, D or U; the unit is "" where nothing declares one."""
        declared = self.reading.units.get(quantity, "")
        named = [(f"{quantity}_{unit}", unit) for unit in UNITS[quantity] if f"{quantity}_{unit}" in self.header]
        if self._column(quantity) in self.header:
            named = [
                (self._column(quantity), declared),
                *(pair for pair in named if quantity not in self.reading.columns),
            ]
        if not named:
            return None
        if len(named) > 1:
            raise DataError(f"{self.path} has both {named[0][0]} and {named[1][0]}; keep one")
        if declared and declared != named[0][1]:
            raise DataError(
                f"--{quantity}-unit {declared} contradicts the column {named[0][0]} of {self.path}; leave the flag out"
            )
        return named[0]

    def _counts(self, quantity: str, *, zero_allowed: bool) -> Array:
        found = self._find_count(quantity)
        if found is None:
            raise self._missing(quantity)
        column, unit = found
        factor = UNITS[quantity][unit or _COUNTS[quantity]]
        values = self._numbers(column)
        low, high = _PLAUSIBLE[quantity]
        for (line, _), value in zip(self.rows, values, strict=True):
            if value == 0 and zero_allowed:
                continue
            if not low <= value * factor <= high:
                raise self._implausible(quantity, column, unit, line, float(value))
        return values * factor

    def _unique(self, tokens: Array) -> Array:
        """Distinct tokens; 0 only before training."""
        values = self._counts("U", zero_allowed=True)
        column, unit = self._find_count("U") or ("U", "")
        for (line, _), value, trained in zip(self.rows, values, tokens, strict=True):
            if value == 0 and trained > 0:
                raise self._implausible("U", column, unit, line, 0.0)
        return values

    def _implausible(self, quantity: str, column: str, unit: str, line: int, value: float) -> DataError:
        low, high = _PLAUSIBLE[quantity]
        noun = _COUNTS[quantity]
        where = f"{self.path} line {line}: {column} = {value:g}"
        if value <= 0:
            return DataError(f"{where}; {quantity} must be above zero")
        if not unit:
            return DataError(
                f"{where} cannot be a number of {noun} ({low:g} to {high:g}). Which unit is it? Say "
                f"--{quantity}-unit billions or --{quantity}-unit millions, or call the column {quantity}_billions"
            )
        return DataError(
            f"{where} in {unit} would be {value * UNITS[quantity][unit]:g} {noun}, outside {low:g} to {high:g}; "
            f"correct --{quantity}-unit or the column's name"
        )

    def _numbers(self, column: str) -> Array:
        values: list[float] = []
        for line, cells in self.rows:
            try:
                value = float(cells[column])
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise DataError(
                    f"{self.path} line {line}: {column} = {cells[column]!r} is not a number; correct it or leave the "
                    "row out"
                )
            values.append(value)
        return np.array(values)

    def _texts(self, column: str) -> tuple[str, ...]:
        return tuple(cells[column] for _, cells in self.rows)

    def _domains(self) -> tuple[str, ...]:
        column = self._column("domain")
        if column not in self.header:
            return ("",) * len(self.rows)
        names = self._texts(column)
        if not all(names):
            line = self.rows[names.index("")][0]
            raise DataError(f"{self.path} line {line}: {column} is empty; name the domain, or leave the column out")
        return names

    def _ratios(self) -> Array:
        column = self._column("r")
        values = self._numbers(column)
        for (line, _), value in zip(self.rows, values, strict=True):
            if not 0 <= value <= 1:
                hint = "; it looks like percent: divide by 100" if 1 < value <= 100 else ""
                raise DataError(
                    f"{self.path} line {line}: {column} = {value:g}, expected the domain's share of the tokens, 0 to 1"
                    + hint
                )
        return values

    def _losses(self, name: str) -> Array:
        column = self._column(name)
        values = self._numbers(column)
        for (line, _), value in zip(self.rows, values, strict=True):
            if value <= 0:
                raise DataError(
                    f"{self.path} line {line}: {column} = {value:g}, expected a positive loss in nats per token"
                )
            if value > LARGEST_NLL:
                raise DataError(
                    f"{self.path} line {line}: {column} = {value:g} is too large for a loss in nats per token (at most "
                    f"{LARGEST_NLL:g}); is it a perplexity? Then take its natural logarithm"
                )
        return values

    def _stderrs(self, losses: Iterable[str]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name in losses:
            column = self._column(f"{name}_stderr")
            if column not in self.header:
                continue
            found[name] = self._numbers(column)
            for (line, _), value in zip(self.rows, found[name], strict=True):
                if value <= 0:
                    raise DataError(f"{self.path} line {line}: {column} = {value:g}, expected a value above zero")
        return found

    def _runs(self, size: Array, ratio: Array | None, domain: Sequence[str]) -> NDArray[np.int64]:
        if self._column("run") in self.header:
            keys: list[Any] = list(self._texts(self._column("run")))
        else:
            shares = [None] * len(size) if ratio is None else [float(value) for value in ratio]
            keys = list(zip((float(value) for value in size), shares, domain, strict=True))
        order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return np.array([order[key] for key in keys], dtype=np.int64)


def _base_losses(size: Array, loss: Array) -> tuple[tuple[float, float], ...]:
    return tuple((float(value), float(np.mean(loss[size == value]))) for value in np.unique(size))
