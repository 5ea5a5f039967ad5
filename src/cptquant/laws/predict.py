"""Losses a fitted law predicts, with their 90% intervals."""

from pathlib import Path

import numpy as np

from cptquant.core.errors import ArtifactError, UserError
from cptquant.core.laws import Interval, LawFit, LossFit
from cptquant.laws.bootstrap import Scatter, interval, new_run_losses
from cptquant.laws.forms import BILLION, Array, Form, Points
from cptquant.laws.methods import find_form

LEAST = {"N": 1e4, "D": 1e4, "U": 1e4}
LARGEST = {"N": 1e14, "D": 1e17, "U": 1e17}
"""What can be a number of parameters, of tokens of a run, and of distinct tokens."""
_NOUNS = {"N": ("parameters", "1.8 billion is --N 1.8e9"), "D": ("tokens", "10 billion is --D 10e9"),
          "U": ("distinct tokens", "10 billion is --U 10e9")}  # fmt: skip


def fitted_theta(fit: LossFit) -> tuple[Form, Array, Array]:
    """Form, internal vector (P,) and internal draws (B, P) of a stored fit."""
    form = find_form(fit.form)
    values = np.array([parameter.value for parameter in fit.parameters])
    return form, form.internal(values), form.internal(np.array(fit.draws))


def check_law(law: LawFit, path: Path) -> None:
    """Refuse a stored law whose form is unknown, or whose numbers are none of that form's.

    Raises:
        ArtifactError: with the parameter and its range.
    """
    features = np.array(next(iter(law.features.values()), (1.0, 0.1, 0.0)))
    for name, fit in law.fits.items():
        try:
            form = find_form(fit.form)
            _check_ranges(fit, form)
            _check_parameters(fit, form)
            _check_losses(fit, form, features)
        except UserError as error:
            raise ArtifactError(
                f"{path}, {name}: {error}; mend the file or make it anew with: {LawFit.MADE_BY}"
            ) from None


def _check_ranges(fit: LossFit, form: Form) -> None:
    corpus = "" if not form.ratios else "general" if fit.target == "general_nll" else "domain"
    if fit.corpus != corpus:
        raise UserError(f"corpus is {fit.corpus!r}, expected {corpus!r} for {fit.target} and law {form.name}")
    for letter in form.needs:
        if letter == "K":
            continue
        if letter not in fit.ranges:
            raise UserError(f"the range of {letter} is missing")
        low, high = (0.0, 1.0) if letter == "r" else (LEAST[letter], LARGEST[letter])
        found = fit.ranges[letter]
        if not low <= found.low <= found.high <= high:
            raise UserError(
                f"the range of {letter} is {found.low:g} to {found.high:g}, expected low to high within {low:g} to "
                f"{high:g}"
            )


def _check_parameters(fit: LossFit, form: Form) -> None:
    found, expected = [parameter.name for parameter in fit.parameters], list(form.index)
    if found != expected:
        raise UserError(f"law {fit.form} has the parameters {', '.join(expected)}, the file has {', '.join(found)}")
    vectors = np.array([[parameter.value for parameter in fit.parameters], *fit.draws])
    for place, parameter in enumerate(form.parameters):
        low = 0.0 if parameter.relative or parameter.removable else parameter.low
        slack = 0.0 if parameter.signed else 1e-6
        values = vectors[:, place]
        wrong = ~((values >= low * (1 - slack)) & (values <= parameter.high * (1 + slack)))
        if wrong.any():
            raise UserError(f"{parameter.name} = {values[wrong.argmax()]:g} lies outside {low:g} to {parameter.high:g}")


def _check_losses(fit: LossFit, form: Form, features: Array) -> None:
    """Numbers that are allowed one by one can still leave no term, or none that is finite."""
    _, theta, draws = fitted_theta(fit)
    ends = [1.0 if letter not in fit.ranges else fit.ranges[letter].high for letter in ("N", "D", "r", "U")]
    points = make_points(fit, ends[0], ends[1], ends[2] / 2, features, ends[3])
    with np.errstate(all="ignore"):
        if not np.isfinite(form.log_loss(np.concatenate([theta[None], draws]), points)[0]).all():
            raise UserError("the parameters or a draw give no finite loss")


def refuse_features(law: LawFit, command: str, *, unique: bool = False) -> None:
    """Refuse a law that needs what a command does not take: features of a domain, or (unless `unique`) distinct tokens.

    Raises:
        UserError: with the command that can.
    """
    for fit in law.fits.values():
        needs = find_form(fit.form).needs
        if "K" in needs:
            raise UserError(
                f"{command} cannot use a cross-domain law, whose losses depend on a domain's early features; use: "
                "cptquant law transfer LAW --features early.csv"
            )
        if "U" in needs and not unique:
            raise UserError(
                f"{command} cannot use law {fit.form}, whose losses depend on the distinct tokens U; fit another, e.g. "
                "cptquant law fit chinchilla RUNS.csv"
            )


def share_of(fit: LossFit, ratio: Array) -> Array:
    """The share the law's r stands for, from domain shares."""
    return 1 - ratio if fit.corpus == "general" else ratio


def make_points(
    fit: LossFit,
    size: Array | float,  # parameters
    tokens: Array | float,  # tokens
    ratio: Array | float,  # domain share
    features: Array | None = None,  # (3,)
    unique: float | None = None,  # tokens
) -> Points:
    """Points of a fit from natural units; scalars broadcast."""
    sizes, counts, ratios = np.broadcast_arrays(
        np.atleast_1d(np.asarray(size, dtype=np.float64)),
        np.atleast_1d(np.asarray(tokens, dtype=np.float64)),
        np.atleast_1d(np.asarray(ratio, dtype=np.float64)),
    )
    rows = None if features is None else np.repeat(np.asarray(features)[None], len(sizes), axis=0)
    distinct = None if unique is None else np.full(len(sizes), unique / BILLION)
    return Points(sizes / BILLION, counts / BILLION, share_of(fit, ratios), distinct, rows)


def predict_loss(fit: LossFit, points: Points, *, new_run: bool = True, seed: int = 0) -> list[Interval]:
    """Predicted loss at each point.

    Args:
        new_run: the interval of the loss a new run will show (scatter between runs included); otherwise that of the
            law's mean.
    """
    form, theta, draws = fitted_theta(fit)
    value = form.log_loss(theta[None], points)[0][0]
    samples = form.log_loss(draws, points)[0]
    if new_run:
        low, high = new_run_losses(value, samples, fit.widening, Scatter(fit.run_std, fit.row_std), seed)
    else:
        low, high = interval(value, samples, fit.widening)
    ends = np.exp(np.stack([value, low, high], axis=1))
    return [Interval(value=float(v), low=float(min(a, v)), high=float(max(b, v))) for v, a, b in ends]


def predict_law(
    law: LawFit,
    size: float | None,
    tokens: float | None,
    ratio: float | None,
    unique: float | None = None,
) -> dict[str, Interval | None]:
    """Loss column -> predicted loss of one run. A mixture law always has both keys; a loss it lacks is None.

    Raises:
        UserError: a quantity the law needs is not given, or is implausible.
    """
    refuse_features(law, "law predict", unique=True)
    fits = list(law.fits.values())
    needs = {letter for fit in fits for letter in find_form(fit.form).needs}
    given = {"N": size, "D": tokens, "r": ratio, "U": unique}
    for letter in ("N", "D", "r", "U"):
        if letter in needs and given[letter] is None:
            raise UserError(f"law {law.kind} needs --{letter}; give its value, N in parameters and D in tokens")
    check_quantities(size, tokens, ratio, unique)
    for letter, noun in (("r", "mixture ratio"), ("U", "distinct tokens")):
        if given[letter] is not None and letter not in needs:
            raise UserError(f"law {law.kind} has no {noun}; leave --{letter} out")
    found: dict[str, Interval | None] = {"general_nll": None, "domain_nll": None} if "r" in needs else {}
    for name, fit in law.fits.items():
        points = make_points(fit, size or BILLION, tokens or BILLION, 1.0 if ratio is None else ratio, None, unique)
        found[name] = predict_loss(fit, points)[0]
    return found


def check_quantities(
    size: float | None, tokens: float | None, ratio: float | None, unique: float | None = None
) -> None:
    """Refuse values that cannot be parameters, tokens or shares.

    Raises:
        UserError: with the flag.
    """
    for letter, value in (("N", size), ("D", tokens), ("U", unique)):
        low, high = LEAST[letter], LARGEST[letter]
        if value is not None and not low <= value <= high:
            noun, example = _NOUNS[letter]
            span = f"{spell_power(low)} to {spell_power(high)}"
            raise UserError(f"--{letter} {value:g} cannot be a number of {noun} ({span}); {example}")
    if ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"--r {ratio:g} must be the domain's share of the tokens, 0 to 1")


def spell_power(value: float) -> str:
    """`1e4` rather than `10000`."""
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def outside_range(law: LawFit, size: float | None, tokens: float | None, ratio: float | None) -> list[str]:
    """A sentence for each quantity that lies outside what the law was fitted on."""
    ranges = next(iter(law.fits.values())).ranges
    sentences: list[str] = []
    for letter, value in (("N", size), ("D", tokens), ("r", ratio)):
        if value is None or letter not in ranges:
            continue
        low, high = ranges[letter].low, ranges[letter].high
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            sentences.append(f"{letter} = {value:g} lies outside the data ({low:g} to {high:g}): an extrapolation")
    return sentences
