"""The PTQ law: what a plan will cost, from features of the original model alone.

Source of the question, of most features and of the forest it is compared with (`ptq_forest.py`): Xu et al., "Scaling
laws for post-training quantized large language models", arXiv 2410.12119. The law itself is in `ptq_forms.py`, what its
predictions are worth in `ptq_scores.py`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from cptquant.core.artifact import Artifact, digest_file
from cptquant.core.errors import DataError
from cptquant.core.forecast import Interval, PlanFeatures, PtqPrediction
from cptquant.core.provenance import Stopwatch
from cptquant.laws.ptq_forms import FORMS, LEAST_KL_NATS, Design, PtqCoefficients, fit_coefficients
from cptquant.laws.ptq_scores import (
    LEVEL,
    Bands,
    HeldOutScores,
    fit_bands,
    leave_one_family_out,
    score_held_out,
)
from cptquant.laws.ptq_table import SHIPPED, SHIPPED_LAW, PtqObservation, read_observations

DEFAULT_FORM = "full"
FEWEST_ROWS, FEWEST_FAMILIES = 24, 3


class PtqLawFit(Artifact):
    """A fitted PTQ law (law.json).

    Attributes:
        laws: form -> coefficients, fitted on all rows. bands: form -> widths of its intervals.
        held_out: form -> scores with each family left out in turn. `landscape` against `full` is the ablation of the
            round-to-nearest loss.
        families, rows: what it was fitted on. source: name of the table.
    """

    SCHEMA: ClassVar[str] = "cptquant.ptq_law"
    MADE_BY: ClassVar[str] = "cptquant law fit ptq RESULTS.csv"

    form: str
    laws: dict[str, PtqCoefficients]
    bands: dict[str, Bands]
    held_out: dict[str, HeldOutScores]
    families: tuple[str, ...]
    rows: int
    source: str

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.form not in self.laws:
            raise ValueError(f"its form {self.form!r} is none of its laws ({', '.join(self.laws) or 'it has none'})")
        for name, law in self.laws.items():
            if name not in FORMS or law.form != name:
                raise ValueError(f"the law {name!r} is of form {law.form!r}; known forms: {', '.join(FORMS)}")
            if name not in self.bands:
                raise ValueError(f"the law {name!r} has no bands, from which its intervals come")
            if law.lacking():
                raise ValueError(f"the law {name!r} lacks {law.lacking()}")
        return self

    def knows(self, method: str) -> bool:
        """Whether all its forms were fitted on plans carried out so."""
        return all(method in law.intercepts for law in self.laws.values())

    def predict(self, features: PlanFeatures, form: str | None = None) -> PtqPrediction:
        """Predict one plan under one method.

        Args:
            features: as `plan_features` adds them up. form: another than the law's own; without a measured landscape
                only `error`, `curvature` and `taylor` can be used.

        Raises:
            DataError: unknown form, a feature it needs is missing, or a method the table does not hold.
        """
        chosen = self.form if form is None else form
        if chosen not in self.laws:
            raise DataError(f"the PTQ law has no form {chosen!r}; choose one of: {', '.join(self.laws)}")
        law, bands = self.laws[chosen], self.bands[chosen]
        kl, rise = law.kl_nats(features), law.rise_nats(features)
        kl_range = Interval(value=kl, low=bands.kl_interval(kl)[0], high=bands.kl_interval(kl)[1])
        low, high = bands.rise_interval(rise, kl)
        nll = Interval(value=features.nll_nats + rise, low=features.nll_nats + low, high=features.nll_nats + high)
        return PtqPrediction(
            kl_nats=kl_range,
            rise_nats=Interval(value=rise, low=low, high=high),
            nll_nats=nll,
            perplexity=Interval(value=_exp(nll.value), low=_exp(nll.low), high=_exp(nll.high)),
            outside=law.outside(features) if features.taylor_kl_nats > 0 else (),
        )


def _exp(nll_nats: float) -> float:
    """A perplexity; of a hopeless extrapolation the largest float rather than an overflow."""
    return math.exp(min(nll_nats, 700.0))


def load_ptq_law(path: Path | None = None) -> PtqLawFit:
    """A fitted law: its folder or file, or for None the one that comes with the package.

    Raises:
        ArtifactError: missing, damaged, or of another version.
    """
    if path is None:
        path = SHIPPED_LAW
    elif path.is_dir():
        path = path / "law.json"
    return PtqLawFit.load(path)


def fit_ptq_law(results_csv: Path | None = None, *, form: str = DEFAULT_FORM) -> PtqLawFit:
    """Fit every form on a table of observations and judge each on families left out.

    Args:
        results_csv: as `cptquant quantize --record FILE` appends to; None for the table that comes with the package.
        form: which of `FORMS` predictions use.

    Raises:
        DataError: unreadable table, or too few rows, families, or distinct plans for a law.
    """
    path = SHIPPED if results_csv is None else results_csv
    watch = Stopwatch()
    fit = fit_observations(read_observations(path), form=form, source=path.name)
    return fit.model_copy(update={"inputs": {"table": digest_file(path)}, "provenance": watch.provenance()})


def fit_observations(observations: Sequence[PtqObservation], *, form: str, source: str) -> PtqLawFit:
    """As `fit_ptq_law`, on rows in memory."""
    if form not in FORMS:
        raise DataError(f"--form {form!r} is unknown; choose one of: {', '.join(FORMS)}")
    usable = usable_observations(observations)
    families = tuple(dict.fromkeys(row.family for row in usable))
    if len(usable) < FEWEST_ROWS or len(families) < FEWEST_FAMILIES:
        raise DataError(
            f"{source} has {len(usable)} usable rows of {len(families)} families; a PTQ law needs at least "
            f"{FEWEST_ROWS} rows of {FEWEST_FAMILIES} families, so that each family can be predicted from others: "
            "quantize more models with --record"
        )
    laws: dict[str, PtqCoefficients] = {}
    bands: dict[str, Bands] = {}
    held_out: dict[str, HeldOutScores] = {}
    for name in FORMS:
        try:
            design = Design.build(usable, name)
        except DataError:
            if name == form:
                raise
            continue  # a table without that feature has no such form
        laws[name] = fit_coefficients(usable, name)
        bands[name] = fit_bands(design, leave_one_family_out(design))
        held_out[name] = score_held_out(usable, name)
    return PtqLawFit(
        form=form, laws=laws, bands=bands, held_out=held_out, families=families, rows=len(usable), source=source
    )


def usable_observations(observations: Sequence[PtqObservation]) -> list[PtqObservation]:
    """Rows with damage to learn from: above what float32 forward passes resolve."""
    return [row for row in observations if row.kl_nats >= LEAST_KL_NATS and row.features.taylor_kl_nats > 0]


__all__ = ["LEVEL", "PtqLawFit", "fit_observations", "fit_ptq_law", "load_ptq_law", "usable_observations"]
