"""Flags of `cptquant law` that are text: `--fix alpha=0.35`, `--column domain_nll=math_loss`, `--holdout by=N`."""

from collections.abc import Sequence

import typer

from cptquant.core.errors import UserError
from cptquant.laws.forms import Form
from cptquant.laws.methods import find_form
from cptquant.laws.observations import UNITS, Reading


def parse_reading(
    size_unit: str | None, token_unit: str | None, unique_unit: str | None, columns: Sequence[str] | None
) -> Reading:
    """How to read the CSV.

    Raises:
        UserError: an unknown unit, or a --column that is no NAME=COLUMN.
    """
    units: dict[str, str] = {}
    for quantity, unit in (("N", size_unit), ("D", token_unit), ("U", unique_unit)):
        if unit is None:
            continue
        if unit not in UNITS[quantity]:
            raise UserError(f"--{quantity}-unit {unit!r} is unknown; choose one of: {', '.join(UNITS[quantity])}")
        units[quantity] = unit
    return Reading(units, _pairs("--column", columns))


def parse_fixed(fixed: Sequence[str] | None) -> dict[str, float]:
    """Parameters to hold.

    Raises:
        UserError: not NAME=NUMBER.
    """
    held: dict[str, float] = {}
    for name, text in _pairs("--fix", fixed).items():
        try:
            held[name] = float(text)
        except ValueError:
            raise UserError(f"--fix {name}={text}: {text!r} is not a number") from None
    return held


def given_flags(ctx: typer.Context) -> list[str]:
    """Flags a person wrote, as spelled in the help, `--json` and arguments left out."""
    written = [
        param.opts[0]
        for param in ctx.command.params
        if param.name is not None and getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE"
    ]
    return [flag for flag in written if flag.startswith("--") and flag != "--json"]


def refuse_unused(kind: str, flags: Sequence[str]) -> None:
    """Refuse flags of `law fit` that a kind of law does not use.

    Raises:
        UserError: with the flag.
    """
    if kind == "ptq":
        unused = [flag for flag in flags if flag != "--output"]
        if unused:
            raise UserError(
                f"law fit ptq takes RESULTS.csv, --output and --json, not {unused[0]}; leave {unused[0]} out"
            )
    elif kind != "cross-domain":
        unused = [flag for flag in flags if flag in ("--features", "--variant")]
        if unused:
            raise UserError(f"{unused[0]} goes with law fit cross-domain, not {kind}; leave {unused[0]} out")
    elif "--drop-highest" in flags:
        raise UserError("law fit cross-domain leaves no rows out; leave --drop-highest out")


def _pairs(flag: str, texts: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{flag} {text!r} is not readable; write NAME=VALUE")
        if name.strip() in pairs:
            raise UserError(f"{flag} {name.strip()} is given twice; keep one")
        pairs[name.strip()] = value.strip()
    return pairs


def parse_increase(text: str) -> float:
    """`3%` or `0.03` -> 0.03.

    Raises:
        UserError: no number, or not above zero.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UserError(f"--max-general-increase {text!r} is not readable; write 3% or 0.03") from None
    if not 0 < value < 1:
        raise UserError(f"--max-general-increase {text!r} must lie between 0 and 100%; write 3% or 0.03")
    return value


def parse_forms(text: str) -> list[Form]:
    """Forms by name.

    Raises:
        UserError: no name, or an unknown one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--forms names no law; write e.g. --forms dcpt,chinchilla")
    return [find_form(name) for name in dict.fromkeys(names)]


def parse_holdout(text: str) -> str:
    """`by=N` -> N.

    Raises:
        UserError: not of that form.
    """
    head, equals, by = text.partition("=")
    if head != "by" or not equals or not by:
        raise UserError(f"--holdout {text!r} is not readable; write by=N, by=r, by=D or by=run")
    return by


def parse_run(size: float | None, tokens: float | None, ratio: float | None) -> tuple[float, float, float] | None:
    """N, D and r of a run, or none of them.

    Raises:
        UserError: some are given and some are not.
    """
    from cptquant.laws.predict import check_quantities

    if size is None and tokens is None and ratio is None:
        return None
    if size is None or tokens is None or ratio is None:
        raise UserError("give --N, --D and --r together to predict a run, or none of them for K alone")
    check_quantities(size, tokens, ratio)
    return size, tokens, ratio
