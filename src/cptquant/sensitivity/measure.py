"""The verb `measure_sensitivity`: how much each format is expected to hurt at each site."""

import math
from collections.abc import Sequence

from cptquant.core.errors import DataError, ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.sensitivity import BlockScore, Damage, SensitivityTable
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.sensitivity.corrections import add_corrections, corrected_formats, without_corrections
from cptquant.sensitivity.estimates import Estimate
from cptquant.sensitivity.scores import Scores, SensitivityMethod, SiteFormats


def measure_sensitivity(
    model: LoadedModel,
    tokens: TokenSet,
    formats: SiteFormats,
    method: SensitivityMethod,
    *,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Score every candidate format of every site.

    Args:
        model: never changed. tokens: calibration text; a method may use fewer sequences than given and says so in n.
        formats: site name -> candidate formats, for every site of the layout. 16 bits has damage 0 by definition.
        method: Cmpq(), Pmpq(), Tdmpq(), PathIntegral(), Sketch() or Ablation(), with the hyper-parameters wanted.
        progress: told how far it is.

    Raises:
        DataError: no calibration text. ModelError: the model gives no finite loss on it.
        ValueError: `formats` leaves out a site or names one the model does not have.
    """
    _check(model, tokens, formats)
    scores = method(model, tokens, without_corrections(formats), progress or ignore_progress)
    if corrected_formats(formats):
        scores = add_corrections(model, tokens, formats, scores, progress or ignore_progress)
    _check_finite(model, scores)
    return SensitivityTable(
        method=method.name,
        unit=scores.unit,
        damages={site.name: _row(formats[site.name], scores, site.name) for site in model.layout.sites},
        block_scores=tuple(
            BlockScore(block_index=index, value=score.value, stderr=score.stderr, n=score.n)
            for index, score in enumerate(scores.block_scores)
        ),
        metadata={**scores.metadata, "tokens": tokens.description},
        curves={name: dict(curve) for name, curve in scores.curves.items()},
    )


def _check(model: LoadedModel, tokens: TokenSet, formats: SiteFormats) -> None:
    known = set(model.layout.site_by_name)
    if set(formats) != known:
        wrong = ", ".join(sorted(known ^ set(formats))[:5])
        raise ValueError(f"formats must name every site of the layout once; missing or unknown: {wrong}")
    if tokens.sequence_count < 1:
        raise DataError("the calibration text gives no sequence; give more text with --calibration")


def _row(formats: Sequence[QuantFormat], scores: Scores, site: str) -> dict[str, Damage]:
    row: dict[str, Damage] = {}
    for fmt in formats:
        estimate = Estimate(0.0, None, 0) if fmt.is_float else scores.damages[site][fmt.name]
        row[fmt.name] = Damage(value=estimate.value, stderr=estimate.stderr, n=estimate.n)
    return row


def _check_finite(model: LoadedModel, scores: Scores) -> None:
    found = {f"block {index}": score for index, score in enumerate(scores.block_scores)}
    found |= {f"{site} in {fmt}": value for site, row in scores.damages.items() for fmt, value in row.items()}
    for where, estimate in found.items():
        if not math.isfinite(estimate.value) or not math.isfinite(estimate.stderr or 0.0):
            raise ModelError(
                f"the sensitivity of {where} of {model.layout.source} is {estimate.value}: the model overflows on the "
                "calibration text; check the model with `cptquant evaluate`, or give other text with --calibration"
            )
