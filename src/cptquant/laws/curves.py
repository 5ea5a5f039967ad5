"""The lines a report draws: a fitted law along one quantity at a time, with its interval."""

from dataclasses import dataclass

import numpy as np

from cptquant.core.laws import LawFit, LossFit
from cptquant.laws.bootstrap import interval
from cptquant.laws.forms import BILLION, Array
from cptquant.laws.methods import find_form
from cptquant.laws.observations import Observations
from cptquant.laws.predict import fitted_theta, make_points

_SAMPLES = 41
_MOST_CURVES = 5


@dataclass(frozen=True)
class Curve:
    """One line: x and the law's mean with its 90% interval, and the observed points beside it.

    Attributes:
        label: what is held, e.g. `r = 0.5`. observed: (x, loss) pairs.
    """

    label: str
    x: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    observed: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class CurveSet:
    """Curves over one quantity.

    Attributes:
        quantity: N (parameters), D (tokens) or r (domain share). held: sentence on what is held.
    """

    quantity: str
    held: str
    curves: tuple[Curve, ...]


def law_curves(law: LawFit, observations: Observations) -> dict[str, tuple[CurveSet, ...]]:
    """Loss column -> curves over tokens by ratio, over ratio by tokens, and over size."""
    return {name: _curves(fit, observations) for name, fit in law.fits.items() if name in observations.losses}


def _curves(fit: LossFit, data: Observations) -> tuple[CurveSet, ...]:
    needs = find_form(fit.form).needs
    if "K" in needs or "U" in needs:
        return ()
    sizes, tokens = np.unique(data.size), np.unique(data.tokens)
    ratios = np.array([1.0]) if data.ratio is None else np.unique(data.ratio)
    size, last = float(sizes[len(sizes) // 2]), float(tokens.max())
    sets: list[CurveSet] = []
    if "D" in needs and len(tokens) > 1:
        line = np.geomspace(tokens.min(), last, _SAMPLES)
        curves = [_line(fit, data, "D", line, size, last, float(r)) for r in _pick(ratios)]
        sets.append(CurveSet("D", f"at {size:.3g} parameters", tuple(curves)))
    if "r" in needs and len(ratios) > 1:
        line = np.linspace(float(ratios.min()), float(ratios.max()), _SAMPLES)
        counts = [float(tokens[len(tokens) // 4]), last] if "D" in needs else [last]
        curves = [_line(fit, data, "r", line, size, count, 1.0) for count in dict.fromkeys(counts)]
        sets.append(CurveSet("r", f"at {size:.3g} parameters", tuple(curves)))
    if "N" in needs and len(sizes) > 1:
        line = np.geomspace(sizes.min(), sizes.max(), _SAMPLES)
        curves = [_line(fit, data, "N", line, size, last, float(r)) for r in _pick(ratios)]
        sets.append(CurveSet("N", f"at {last:.3g} tokens", tuple(curves)))
    return tuple(sets)


def _pick(values: Array) -> Array:
    return values[np.unique(np.linspace(0, len(values) - 1, _MOST_CURVES).round().astype(int))]


def _line(
    fit: LossFit, data: Observations, quantity: str, x: Array, size: float, tokens: float, ratio: float
) -> Curve:
    at = {"N": size, "D": tokens, "r": ratio}
    form, theta, draws = fitted_theta(fit)
    arguments = {letter: (x if letter == quantity else value) for letter, value in at.items()}
    points = make_points(fit, arguments["N"], arguments["D"], arguments["r"])
    low, high = interval(form.loss(draws, points))
    ratios = np.ones(len(data)) if data.ratio is None else data.ratio
    columns = {"N": data.size, "D": data.tokens, "r": ratios}
    near = np.ones(len(data), dtype=bool)
    for letter, value in at.items():
        if letter != quantity and not (letter == "r" and data.ratio is None):
            near &= np.abs(columns[letter] - value) <= 1e-9 * max(abs(value), 1e-9)
    observed = zip(columns[quantity][near], data.losses[fit.target][near], strict=True)
    labels = {"D": f"r = {ratio:g}", "r": f"{tokens / BILLION:.3g}B tokens", "N": f"r = {ratio:g}"}
    return Curve(
        label="" if data.ratio is None else labels[quantity],
        x=tuple(float(value) for value in x),
        value=tuple(float(value) for value in form.loss(theta[None], points)[0]),
        low=tuple(float(value) for value in low),
        high=tuple(float(value) for value in high),
        observed=tuple((float(a), float(b)) for a, b in observed),
    )
