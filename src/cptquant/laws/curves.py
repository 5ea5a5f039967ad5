"""The lines a report draws: a fitted law along one quantity at a time, with its interval."""

import numpy as np

from cptquant.core.laws import Curve, CurveSet, LawFit, LossFit
from cptquant.laws.bootstrap import interval
from cptquant.laws.forms import BILLION, Array
from cptquant.laws.methods import find_form
from cptquant.laws.observations import Observations
from cptquant.laws.predict import fitted_theta, make_points

_SAMPLES = 41
_MOST_CURVES = 5


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
        line: Array = np.geomspace(float(tokens.min()), last, _SAMPLES)
        curves = [_line(fit, data, "D", line, size, last, float(r)) for r in _pick(ratios)]
        sets.append(CurveSet("D", f"at {spell_count(size)} parameters", tuple(curves)))
    if "r" in needs and len(ratios) > 1:
        line = np.linspace(float(ratios.min()), float(ratios.max()), _SAMPLES)
        counts = [float(tokens[len(tokens) // 4]), last] if "D" in needs else [last]
        curves = [_line(fit, data, "r", line, size, count, 1.0) for count in dict.fromkeys(counts)]
        sets.append(CurveSet("r", f"at {spell_count(size)} parameters", tuple(curves)))
    if "N" in needs and len(sizes) > 1:
        line: Array = np.geomspace(float(sizes.min()), float(sizes.max()), _SAMPLES)
        curves = [_line(fit, data, "N", line, size, last, float(r)) for r in _pick(ratios)]
        sets.append(CurveSet("N", f"at {spell_count(last)} tokens", tuple(curves)))
    return tuple(sets)


def spell_count(value: float) -> str:
    """`1.8B`, `500M`: parameters and tokens in sentences."""
    factor, name = (1e9, "B") if value >= 1e9 else (1e6, "M")
    return f"{value / factor:.3g}{name}"


def _pick(values: Array) -> Array:
    return values[np.unique(np.linspace(0, len(values) - 1, _MOST_CURVES).round().astype(int))]


def _line(fit: LossFit, data: Observations, quantity: str, x: Array, size: float, tokens: float, ratio: float) -> Curve:
    at = {"N": size, "D": tokens, "r": ratio}
    form, theta, draws = fitted_theta(fit)
    arguments = {letter: (x if letter == quantity else value) for letter, value in at.items()}
    points = make_points(fit, arguments["N"], arguments["D"], arguments["r"])
    law_loss = form.loss(theta[None], points)[0]
    low, high = interval(law_loss, form.loss(draws, points), fit.widening)
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
        value=tuple(float(loss) for loss in law_loss),
        low=tuple(float(value) for value in low),
        high=tuple(float(value) for value in high),
        observed=tuple((float(a), float(b)) for a, b in observed),
    )


def optimum_curves(
    law: LawFit, quantity: str, x: Array, size: Array, tokens: Array, ratio: Array
) -> dict[str, CurveSet]:
    """Loss column -> one curve along a path of (size, tokens, ratio), drawn against x."""
    sets: dict[str, CurveSet] = {}
    for name, fit in law.fits.items():
        form, theta, draws = fitted_theta(fit)
        points = make_points(fit, size, tokens, ratio)
        value = form.loss(theta[None], points)[0]
        low, high = interval(value, form.loss(draws, points), fit.widening)
        curve = Curve(
            label="",
            x=tuple(float(value) for value in x),
            value=tuple(float(loss) for loss in value),
            low=tuple(float(value) for value in low),
            high=tuple(float(value) for value in high),
        )
        sets[name] = CurveSet(quantity, "with the optimum", (curve,))
    return sets
