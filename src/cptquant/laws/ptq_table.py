"""The table of observations: one row for each model, plan and method, features beside what was measured afterwards."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from cptquant.core.artifact import Frozen, output_error, write_whole
from cptquant.core.errors import DataError
from cptquant.core.forecast import METHODS, PlanFeatures

SHIPPED = Path(__file__).parent / "data" / "ptq_observations.csv"
"""Our own grid, made by runs/ptq_grid.sh; its provenance stands in the comment lines on top."""

SHIPPED_LAW = SHIPPED.with_name("ptq_law.json")
"""The law fitted on it."""


class PtqObservation(Frozen):
    """One quantized model that was measured.

    Attributes:
        model: name of the original. family: models that are held out together (architecture and training run).
        plan: format name of a uniform plan, `mixed-N` otherwise. group: `gN`, `channel` or `mixed`.
        features: measured on the original beforehand, on calibration text.
        kl_nats, kl_stderr_nats: KL(original ‖ quantized) per token on held-out text.
        rise_nats, rise_stderr_nats: of the NLL per token, paired, on the same text. tokens: scored.
        original_nll_nats: of the original on that text.
    """

    model: str
    family: str
    plan: str
    features: PlanFeatures
    kl_nats: float
    kl_stderr_nats: float
    rise_nats: float
    rise_stderr_nats: float
    original_nll_nats: float
    tokens: int


_OWN = ("model", "family", "plan")
_TARGETS = ("kl_nats", "kl_stderr_nats", "rise_nats", "rise_stderr_nats", "original_nll_nats", "tokens")
_FEATURES = tuple(PlanFeatures.model_fields)
COLUMNS = (*_OWN, *_FEATURES, *_TARGETS)
_OPTIONAL = {"tokens_seen", "half_kl_nats", "slope", "curvature", "rtn_kl_nats", "rtn_rise_nats"}
_POSITIVE = ("parameters", "nll_nats", "bits_per_weight", "taylor_kl_nats", "random_curvature", "kl_nats")
_LARGEST_NATS = 1e3
_ROUNDING_NATS = -1e-3
"""A KL measured in float32 can end a little below zero."""
_RANGES = {
    "parameters": (1.0, 1e14), "sqnr_db": (-300.0, 300.0), "taylor_kl_nats": (0.0, 1e6),
    "random_curvature": (1e-9, 1e9), "random_growth": (-1e2, 1e2), "slope": (-_LARGEST_NATS, _LARGEST_NATS),
    "curvature": (-1e6, 1e6), "rtn_rise_nats": (-_LARGEST_NATS, _LARGEST_NATS),
    "tokens_seen": (1.0, 1e17), "code_bits": (1.0, 32.0), "bits_per_weight": (0.1, 64.0), "group_columns": (1.0, 1e7),
    "output_error": (0.0, 1e6), "method_ratio": (1e-9, 1e3), "rtn_kl_nats": (_ROUNDING_NATS, _LARGEST_NATS),
    "half_kl_nats": (_ROUNDING_NATS, _LARGEST_NATS), "kl_nats": (0.0, _LARGEST_NATS),
    "kl_stderr_nats": (0.0, _LARGEST_NATS), "rise_nats": (-_LARGEST_NATS, _LARGEST_NATS),
    "rise_stderr_nats": (0.0, _LARGEST_NATS), "nll_nats": (0.0, _LARGEST_NATS),
    "original_nll_nats": (0.0, _LARGEST_NATS), "tokens": (1.0, 1e15),
}  # fmt: skip


def read_observations(path: Path) -> tuple[PtqObservation, ...]:
    """Read a table; lines that begin with # are comments.

    Raises:
        DataError: missing file or columns, a value that is no number, not finite, or outside its range; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); give a table that `cptquant quantize --record` wrote"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbered:
        raise DataError(f"{path} holds no rows; its header must name the columns {', '.join(COLUMNS)}")
    header = next(csv.reader([numbered[0][1]]))
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise DataError(f"{path} has two columns called {doubled[0]!r}; rename one")
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)}; a PTQ law needs all of {', '.join(COLUMNS)}: write the "
            "table with `cptquant quantize --record FILE` or runs/ptq_grid.sh"
        )
    observations: list[PtqObservation] = []
    for number, line in numbered[1:]:
        cells, where = next(csv.reader([line])), f"{path}, line {number}"
        if len(cells) != len(header):
            raise DataError(f"{where} has {len(cells)} cells, the header has {len(header)}; one row a line")
        observations.append(_observation(dict(zip(header, cells, strict=True)), where))
    return tuple(observations)


def _observation(row: dict[str, str], where: str) -> PtqObservation:
    for name in _OWN:
        if not row[name].strip():
            raise DataError(f"{where}: {name} is empty; name the {name}")
    if row["method"] not in METHODS:
        raise DataError(f"{where}: method is {row['method']!r}; choose one of: {', '.join(METHODS)}")
    values: dict[str, float | None] = {}
    for name in (*_FEATURES, *_TARGETS):
        if name != "method":
            values[name] = _number(row.get(name), name, where)
    for name in _POSITIVE:
        value = values[name]
        if value is None or value < 0 or (value == 0 and name != "kl_nats"):
            raise DataError(f"{where}: {name} is {value}, it must be above zero; remove or correct the row")
    for name, (low, high) in _RANGES.items():
        value = values[name]
        if value is not None and not low <= value <= high:
            raise DataError(f"{where}: {name} is {value:g}, expected {low:g} to {high:g}; remove or correct the row")
    if values["tokens"] != int(values["tokens"] or 0):
        raise DataError(f"{where}: tokens is {values['tokens']:g}, expected a whole number; correct the row")
    features = {name: values[name] for name in _FEATURES if name != "method"}
    targets: dict[str, object] = {name: values[name] for name in _TARGETS if name != "tokens"}
    try:
        return PtqObservation.model_validate(
            {
                **{name: row[name] for name in _OWN},
                "features": PlanFeatures.model_validate({"method": row["method"], **features}),
                **targets,
                "tokens": int(values["tokens"] or 0),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _number(text: str | None, name: str, where: str) -> float | None:
    if text is None or text == "":
        if name in _OPTIONAL:
            return None
        raise DataError(f"{where}: {name} is empty; only {', '.join(sorted(_OPTIONAL))} may be")
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {name} is {text!r}, expected a number") from None
    if not math.isfinite(value):
        raise DataError(f"{where}: {name} is {text!r}, expected a finite number; leave collapsed models out")
    return value


def format_rows(observations: Iterable[PtqObservation]) -> str:
    """The rows as CSV, without header; floats in six significant digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for observation in observations:
        flat = {**observation.features.model_dump(), **observation.model_dump(exclude={"features"})}
        writer.writerow([_spell(flat[name]) for name in COLUMNS])
    return buffer.getvalue()


def _spell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_observations(path: Path, observations: Sequence[PtqObservation], comments: Sequence[str] = ()) -> None:
    """Write a whole table.

    Raises:
        OutputError: not writable.
    """
    head = "".join(f"# {line}\n" for line in comments) + ",".join(COLUMNS) + "\n"
    write_whole(path, (head + format_rows(observations)).encode())


def append_observations(path: Path, observations: Sequence[PtqObservation]) -> int:
    """Add rows to a table, which is made with its header if it does not exist.

    Returns:
        Rows added. A row that is there already is not added again.

    Raises:
        DataError: the file is no such table, or holds a row already with another `tokens_seen`. OutputError: not
            writable.
    """
    if not path.exists():
        write_observations(path, observations)
        return len(observations)
    known = {_identity(row): row.features.tokens_seen for row in read_observations(path)}
    for row in observations:
        told, held = row.features.tokens_seen, known.get(_identity(row), row.features.tokens_seen)
        if told is not None and _spell(held) != _spell(told):
            raise DataError(
                f"{path} holds {row.model}, {row.plan}, {row.features.method} already, with tokens_seen "
                f"{_spell(held) or 'empty'}, not {_spell(told)}; correct that column in the file"
            )
    fresh = [row for row in observations if _identity(row) not in known]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(format_rows(fresh))
    except OSError as error:
        raise output_error(path, error) from None
    return len(fresh)


def _identity(row: PtqObservation) -> str:
    """What two records of one measurement share, in the table's own digits."""
    return format_rows([row.model_copy(update={"features": row.features.model_copy(update={"tokens_seen": None})})])
