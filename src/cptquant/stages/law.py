"""CSV -> law folder: law.json and report.html, for every kind of law."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cptquant.core.artifact import digest_file, output_error
from cptquant.core.errors import UserError
from cptquant.core.laws import LawFit
from cptquant.laws.curves import law_curves
from cptquant.laws.fit_law import FitOptions, fit_law
from cptquant.laws.methods import FORMS, find_form
from cptquant.laws.observations import Reading, read_observations
from cptquant.laws.predict import check_law
from cptquant.laws.ptq import PtqLawFit, fit_ptq_law
from cptquant.laws.transfer import fit_cross_domain, read_features
from cptquant.reports.law import write_law_report

LAW_FILE = "law.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class FitRequest:
    """What `law fit KIND CSV` was asked for.

    Attributes:
        features: CSV of early features, for laws across domains. variant: k1 to k4.
    """

    kind: str
    data: Path
    output: Path
    reading: Reading = field(default_factory=Reading)
    options: FitOptions = field(default_factory=FitOptions)
    features: Path | None = None
    variant: str = "k3"


def fit_mixture(request: FitRequest) -> LawFit:
    """A law of `FORMS`, fitted to each loss column."""
    data = read_observations(request.data, request.reading)
    law = fit_law(data, find_form(request.kind), request.options)
    law = law.model_copy(update={"inputs": {"data": digest_file(request.data)}})
    save_law(law, request.output)
    write_law_report(request.output / REPORT_FILE, law, law_curves(law, data))
    return law


def fit_across_domains(request: FitRequest) -> LawFit:
    """The cross-domain law."""
    if request.features is None:
        raise UserError("law fit cross-domain needs --features early.csv (domain, initial_nll, early_nll)")
    data = read_observations(request.data, request.reading)
    law = fit_cross_domain(data, read_features(request.features), request.options, request.variant)
    inputs = {"data": digest_file(request.data), "features": digest_file(request.features)}
    law = law.model_copy(update={"inputs": inputs})
    save_law(law, request.output)
    write_law_report(request.output / REPORT_FILE, law, {})
    return law


FITTERS: dict[str, Callable[[FitRequest], LawFit]] = {
    **dict.fromkeys(FORMS, fit_mixture),
    "cross-domain": fit_across_domains,
}
"""`law fit KIND`: what reads the CSV, fits, and leaves law.json and report.html in the output folder."""


def fit_stage(request: FitRequest) -> LawFit:
    """Fit and save.

    Raises:
        UserError: the kind is unknown.
    """
    check_kind(request.kind)
    return FITTERS[request.kind](request)


def check_kind(kind: str) -> None:
    """Refuse a kind of law that `fit_stage` does not know.

    Raises:
        UserError: with those it knows.
    """
    if kind not in FITTERS:
        raise UserError(f"law {kind!r} is unknown; choose one of: {', '.join(FITTERS)}, ptq")


def fit_ptq_stage(data: Path, output: Path) -> PtqLawFit:
    """Observations of quantized models (`quantize --record`) -> law.json, which `predict --law` reads.

    Raises:
        DataError: an unreadable table, or too few rows or families. OutputError: the folder cannot be made or written.
    """
    law = fit_ptq_law(data)
    save_law(law, output)
    return law


def save_law(law: LawFit | PtqLawFit, folder: Path) -> Path:
    """Write law.json into a folder, made if missing.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    law.save(folder / LAW_FILE)
    return folder / LAW_FILE


def load_law(folder: Path) -> LawFit:
    """law.json of a folder (or the file itself).

    Raises:
        ArtifactError: missing, damaged or of another version.
    """
    path = folder if folder.suffix == ".json" and not folder.is_dir() else folder / LAW_FILE
    law = LawFit.load(path)
    check_law(law, path)
    return law
