"""Published perplexities of quantized models, and how well a law fitted on other families predicts them.

A check on data nobody here made: Llama 2 and Qwen2 with micro-scaled and integer weights (Sharify et al., PMLR v262)
and LLaMA with GPTQ (the README of IST-DASLab/gptq). Weights of these models are not at hand, so the error of a format
is that on normal numbers (as in arXiv 2506.01863), and the only thing known of the model's own response is, where it
was published, the loss of rounding to nearest in the same format:

    error      ln rise = ln k_m - a ln N + b ln D + c ln E
    rounding   ln rise = ln k_m + p_m ln R + q (ln R)^2 + c ln E        R: rise under round to nearest
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cptquant.core.artifact import Frozen
from cptquant.laws.ptq_forms import Floats
from cptquant.laws.ptq_scores import r_squared

PublishedForm = Literal["error", "rounding"]
LEAST_RISE_NATS = 0.005
"""Perplexities are printed to 0.01, about 0.002 nats: smaller rises are not resolved; logarithmic scores skip them."""
_FLOOR_NATS = 1e-3
_RIDGE = 1e-2
_ROW = 4096
_MODELS = {
    "Llama2-7B": (6.74e9, 2e12), "Llama2-13B": (13.02e9, 2e12), "Qwen2-1.5B": (1.54e9, 7e12),
    "Qwen2-7B": (7.62e9, 7e12), "LLaMa-7B": (6.74e9, 1e12), "LLaMa-13B": (13.02e9, 1e12),
    "LLaMa-30B": (32.53e9, 1.4e12), "LLaMa-65B": (65.29e9, 1.4e12),
}  # fmt: skip
"""Parameters and training tokens, from the models' reports (arXiv 2302.13971, 2307.09288, 2407.10671)."""


@dataclass(frozen=True)
class PublishedPoint:
    """One published perplexity, as a rise of the NLL over the float model in the same table.

    Attributes:
        error: squared error of the format on normal numbers, over their variance.
        rounding_rise_nats: of round to nearest in the same table, model and format; None if it was not printed.
    """

    family: str
    model: str
    method: str
    format: str
    parameters: float
    tokens_seen: float
    nll_nats: float
    rise_nats: float
    error: float
    rounding_rise_nats: float | None


def read_published(folder: Path) -> list[PublishedPoint]:
    """Read `mx_ptq_sharify2024.csv` and `gptq_llama1_wiki2.csv`; float baselines and NaN are no points."""
    points: list[PublishedPoint] = []
    mx = _rows(folder / "mx_ptq_sharify2024.csv")
    floats = {(row["table"], row["model"]): float(row["value"]) for row in mx if row["weight_format"] == "FP16"}
    for row in mx:
        match = re.fullmatch(r"(MXINT|INT)(\d)(?:-(\d+))?", row["weight_format"])
        if match is None or math.isnan(float(row["value"])):
            continue
        family = "Llama 2" if row["model"].startswith("Llama2") else "Qwen2"
        columns = int(match[3] or 128) if match[1] == "MXINT" else _ROW
        points.append(
            _point(family, row["model"], row["method"], f"{row['table']} {match[1]}{match[2]}-{columns}",
                   normal_error(match[1] == "MXINT", int(match[2]), columns),
                   (floats[row["table"], row["model"]], float(row["value"])))
        )  # fmt: skip
    gptq = _rows(folder / "gptq_llama1_wiki2.csv")
    bases = {row["model"]: float(row["ppl"]) for row in gptq if row["method"] == "FP16"}
    for row in gptq:
        if row["method"] != "FP16":
            columns = int(row["group"] or _ROW)
            points.append(
                _point("LLaMA", row["model"], row["method"], f"INT{row['bits']}-{columns}",
                       normal_error(False, int(row["bits"]), columns), (bases[row["model"]], float(row["ppl"])))
            )  # fmt: skip
    rounded = {(p.model, p.format): p.rise_nats for p in points if p.method == "RTN"}
    return [replace(p, rounding_rise_nats=rounded.get((p.model, p.format))) for p in points]


def _rows(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def _point(
    family: str, model: str, method: str, fmt: str, error: float, perplexities: tuple[float, float]
) -> PublishedPoint:
    parameters, tokens = _MODELS[model]
    before, after = perplexities
    return PublishedPoint(
        family, model, method, fmt, parameters, tokens, math.log(before), math.log(after / before), error, None
    )


@cache
def normal_error(shared_exponent: bool, code_bits: int, columns: int) -> float:
    """Mean squared error of a format on standard normal numbers, over 1.6 million of them (seed 0).

    Args:
        shared_exponent: MXINT: a power-of-two scale for each block, codes symmetric (OCP MX 1.0); else integers between
            the smallest and the largest of a group. columns: of a block or group.
    """
    numbers: NDArray[np.float64] = np.random.default_rng(0).standard_normal((400, 4096)).reshape(-1, columns)
    rounded: NDArray[np.float64]
    if shared_exponent:
        largest = np.asarray(np.abs(numbers).max(axis=1, keepdims=True), dtype=np.float64)
        scale = np.exp2(np.floor(np.log2(largest)) - (code_bits - 2))
        top = 2 ** (code_bits - 1) - 1
        codes = np.asarray(np.rint(numbers / scale), dtype=np.float64)
        rounded = np.minimum(np.maximum(codes, -top), top) * scale
    else:
        low = np.asarray(numbers.min(axis=1, keepdims=True), dtype=np.float64)
        scale = (np.asarray(numbers.max(axis=1, keepdims=True), dtype=np.float64) - low) / (2**code_bits - 1)
        rounded = np.rint((numbers - low) / scale) * scale + low
    return float(np.mean(np.square(rounded - numbers)))


def usable_points(points: Sequence[PublishedPoint], form: PublishedForm) -> list[PublishedPoint]:
    """All for `error`; for `rounding` those of other methods whose rounding loss was printed."""
    if form == "error":
        return list(points)
    return [p for p in points if p.method != "RTN" and p.rounding_rise_nats is not None]


def point_features(points: Sequence[PublishedPoint], form: PublishedForm) -> Floats:
    """(n, k): the terms of a form, then one column a method."""
    methods = sorted({p.method for p in points})
    rows: list[list[float]] = []
    for p in points:
        chosen = [float(p.method == method) for method in methods]
        if form == "error":
            terms = [math.log(p.parameters), math.log(p.tokens_seen), math.log(p.error)]
        else:
            rounding = math.log(max(p.rounding_rise_nats or 0.0, _FLOOR_NATS))
            terms = [rounding, rounding**2, math.log(p.error), *(rounding * one for one in chosen)]
        rows.append([*terms, *chosen])
    return np.array(rows)


def log_rises(points: Sequence[PublishedPoint]) -> Floats:
    """(n,): ln of the rise, floored where the printed digits end."""
    return np.log(np.maximum([p.rise_nats for p in points], 0.0) + _FLOOR_NATS)


def predict_left_out(points: Sequence[PublishedPoint], form: PublishedForm) -> Floats:
    """Rise of every point, (n,) nats, by ridge regression on the other families."""
    features, target = point_features(points, form), log_rises(points)
    families = np.array([p.family for p in points])
    predicted = np.zeros(len(points))
    for family in dict.fromkeys(p.family for p in points):
        known, asked = features[families != family], features[families == family]
        centre, spread = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-9)
        design = np.hstack([(known - centre) / spread, np.ones((len(known), 1))])
        penalty = math.sqrt(_RIDGE * len(known)) * np.eye(design.shape[1])[:-1]
        factors = np.linalg.lstsq(
            np.vstack([design, penalty]),
            np.concatenate([target[families != family], np.zeros(len(penalty))]),
            rcond=None,
        )[0]
        scaled = np.clip((asked - centre) / spread, -5, 5)  # a family beyond everything known is held at the edge
        predicted[families == family] = np.exp(np.hstack([scaled, np.ones((len(asked), 1))]) @ factors) - _FLOOR_NATS
    return predicted


class PublishedScores(Frozen):
    """`r2_log`: over `resolved` points, a rise of 0.005 or more; `median_error_nats`: where the rise is below 0.5."""

    points: int
    resolved: int
    r2_log: float
    median_error_nats: float


def score_published(points: Sequence[PublishedPoint], predicted: Floats) -> PublishedScores:
    """Scores of predictions, (n,) nats."""
    rises = np.array([p.rise_nats for p in points])
    clear = rises >= LEAST_RISE_NATS
    small = rises < 0.5
    return PublishedScores(
        points=len(points),
        resolved=int(clear.sum()),
        r2_log=r_squared(np.log(rises[clear]), np.log(np.maximum(predicted[clear], _FLOOR_NATS))),
        median_error_nats=float(np.median(np.abs(predicted - rises)[small])),
    )
