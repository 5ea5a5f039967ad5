"""What bits cost in a sweep: a law of KL and rise over N, tokens and share, fitted to its quantized models.

The shipped PTQ law (`ptq.py`) reads features of one finished model. A plan has no such model yet, so it needs the cost
as a function of what is being chosen. That more training makes low bits dearer is reported elsewhere as a power of the
tokens (arXiv 2411.04330, 2411.17691); here the term is in only as far as the sweep's own left-out runs say so.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import DataError
from cptquant.core.joint import DamageLaw

Array = NDArray[np.float64]
_MILLION = 1e6
_LEAST_KL = 1e-7
_RATIO_FLOOR = 0.1
"""Relative error of a single rise over KL that is there besides its standard error."""
_OPTIONAL = {"ln T": "tokens", "r": "the domain's share"}


@dataclass(frozen=True)
class DamageRow:
    """One quantized model on one text. tokens: T, everything it was trained on. Losses in nats per token."""

    run: str
    parameters: float
    tokens: float
    ratio: float
    bits: int
    kl: float
    rise: float
    rise_stderr: float


def read_damages(path: Path, domain: str, base_tokens: float = 0.0) -> dict[str, list[DamageRow]]:
    """Rows of a sweep's ptq_runs.csv about one domain: text ("general", "domain") -> rows.

    Args:
        base_tokens: of the base models, added to every D.

    Raises:
        DataError: not such a table; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); make it with quantize: in a sweep's plan") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    header = next(csv.reader([numbered[0][1]])) if numbered else []
    found: dict[str, list[DamageRow]] = {"general": [], "domain": []}
    for number, line in numbered[1:]:
        cells = dict(zip(header, next(csv.reader([line])), strict=False))
        if cells.get("domain") != domain:
            continue
        for text, rows in found.items():
            try:
                row = DamageRow(
                    cells["run"], float(cells["N"]), base_tokens + float(cells["D"]), float(cells["r"]),
                    int(cells["bits"]), float(cells[f"{text}_kl"]), float(cells[f"{text}_rise"]),
                    float(cells[f"{text}_rise_stderr"]),
                )  # fmt: skip
            except (KeyError, ValueError) as error:
                raise DataError(f"{path} line {number}: {error} is missing or no number; make the file anew") from None
            if row.kl > _LEAST_KL:  # below, float32 passes resolve nothing
                rows.append(row)
    return found


def fit_damage(rows: Sequence[DamageRow], text: str, *, draws: int = 200, seed: int = 0) -> DamageLaw:
    """Least squares of ln KL, optional terms by leaving runs out, the rise as a multiple of the KL.

    Raises:
        DataError: fewer than four quantized models, or fewer than two runs.
    """
    runs = list(dict.fromkeys(row.run for row in rows))
    if len(rows) < 4 or len(runs) < 2:
        raise DataError(
            f"{len(rows)} quantized models of {len(runs)} runs are too few for a law of what bits cost; name more bits "
            "under quantize: in the sweep's plan"
        )
    problem = _Problem.of(rows, runs)
    chosen: list[str] = []
    decided: list[str] = []
    for name in _OPTIONAL:
        better, sentence = problem.judge(chosen, name)
        decided.append(sentence)
        if better:
            chosen.append(name)
    weights = np.ones(len(runs))
    vector, residual = problem.solve(chosen, weights)
    rng = np.random.default_rng(seed)
    drawn = rng.exponential(size=(draws, len(runs)))
    samples = [problem.solve(chosen, row / row.mean())[0] for row in drawn]
    degrees = max(1, len(rows) - len(problem.bits) - (len(problem.sizes) > 1) - len(chosen))
    relative = (problem.rise - vector[-1] * problem.kl) / problem.kl
    return DamageLaw(
        text=text,
        intercepts={bits: float(vector[index]) for index, bits in enumerate(problem.bits)},
        size_power=float(vector[-4]),
        tokens_power=float(vector[-3]),
        share_slope=float(vector[-2]),
        rise_per_kl=float(vector[-1]),
        kl_scatter=math.sqrt(float(np.sum(residual**2)) / degrees),
        rise_scatter=math.sqrt(float(np.average(relative**2, weights=problem.ratio_weights))),
        draws=tuple(tuple(float(x) for x in sample) for sample in samples),
        rows=len(rows),
        runs=len(runs),
        decided=tuple(decided),
    )


def predict_damage(
    law: DamageLaw,
    bits: int,
    parameters: float,
    tokens: Array,  # (m,), T
    ratio: Array,  # (m,)
) -> Array:
    """Rise of the NLL, (1 + draws, m), row 0 the fit; the scatter between runs is not in it.

    Raises:
        DataError: the law was not fitted to these bits.
    """
    if bits not in law.intercepts:
        raise DataError(f"--bits {bits}: the sweep quantized to {', '.join(map(str, law.intercepts))} bits; give those")
    place = list(law.intercepts).index(bits)
    fit = (*law.intercepts.values(), law.size_power, law.tokens_power, law.share_slope, law.rise_per_kl)
    vectors = np.array([fit, *law.draws])
    log_kl = (
        vectors[:, [place]]
        + vectors[:, [-4]] * math.log(parameters / _MILLION)
        + vectors[:, [-3]] * np.log(tokens / _MILLION)
        + vectors[:, [-2]] * ratio
    )
    return vectors[:, [-1]] * np.exp(np.minimum(log_kl, 5.0))


def damage_scatter(law: DamageLaw) -> float:
    """Standard deviation of a new run's rise over its prediction, relative."""
    if law.rise_per_kl == 0:
        return law.kl_scatter
    return math.sqrt(law.kl_scatter**2 + (law.rise_scatter / law.rise_per_kl) ** 2)


@dataclass(frozen=True)
class _Problem:
    bits: tuple[int, ...]
    sizes: tuple[float, ...]
    run: NDArray[np.int64]  # (n,)
    columns: dict[str, Array]  # (n,) each
    one_hot: Array  # (n, bits)
    kl: Array
    rise: Array
    ratio_weights: Array

    @classmethod
    def of(cls, rows: Sequence[DamageRow], runs: Sequence[str]) -> "_Problem":
        bits = tuple(sorted({row.bits for row in rows}))
        kl = np.array([row.kl for row in rows])
        relative = np.array([row.rise_stderr for row in rows]) / kl
        return cls(
            bits,
            tuple(sorted({row.parameters for row in rows})),
            np.array([runs.index(row.run) for row in rows]),
            {
                "ln N": np.log([row.parameters / _MILLION for row in rows]),
                "ln T": np.log([row.tokens / _MILLION for row in rows]),
                "r": np.array([row.ratio for row in rows]),
            },
            np.array([[float(row.bits == each) for each in bits] for row in rows]),
            kl,
            np.array([row.rise for row in rows]),
            1 / (relative**2 + _RATIO_FLOOR**2),
        )

    def solve(self, chosen: Sequence[str], run_weights: Array) -> tuple[Array, Array]:
        """((bits + 4,) intercepts, powers of N and T, slope in r, rise over KL), residuals of ln KL (n,)."""
        weights = run_weights[self.run]
        names = [*(["ln N"] if len(self.sizes) > 1 else []), *chosen]
        design = np.column_stack([self.one_hot, *(self.columns[name] for name in names)])
        root = np.sqrt(weights)
        found = np.linalg.lstsq(design * root[:, None], np.log(self.kl) * root, rcond=None)[0]
        slopes = dict(zip(names, found[len(self.bits) :], strict=True))
        multiple = float(np.average(self.rise / self.kl, weights=weights * self.ratio_weights))
        vector = [*found[: len(self.bits)], *(slopes.get(name, 0.0) for name in self.columns), multiple]
        residual: Array = np.log(self.kl) - design @ found
        return np.array(vector), residual

    def judge(self, chosen: Sequence[str], name: str) -> tuple[bool, str]:
        """Whether a term predicts left-out runs better, by more than the standard error of that difference."""
        what = _OPTIONAL[name]
        if len(np.unique(self.columns[name])) < 2:
            return False, f"{what}: left out, one value in all rows"
        before, after = self._left_out(chosen), self._left_out([*chosen, name])
        if before is None or after is None:
            return False, f"{what}: left out, too few runs to leave one out"
        gain = before - after
        mean = float(gain.mean())
        stderr = float(gain.std(ddof=1)) / math.sqrt(len(gain))
        numbers = (
            f"squared error of ln KL on left-out runs {float(before.mean()):.4f} without it, {float(after.mean()):.4f} "
            f"with it (difference {mean:.4f} ± {stderr:.4f}, n = {len(gain)} runs)"
        )
        better = mean > stderr
        return better, f"{what}: {'in' if better else 'left out'}, {numbers}"

    def _left_out(self, chosen: Sequence[str]) -> Array | None:
        """Mean squared error of each run predicted from the others, (runs,)."""
        count = int(self.run.max()) + 1
        if count < 4:
            return None
        errors: list[float] = []
        for index in range(count):
            weights = np.ones(count)
            weights[index] = 0.0
            _, residual = self.solve(chosen, weights)
            errors.append(float(np.mean(residual[self.run == index] ** 2)))
        return np.array(errors)
