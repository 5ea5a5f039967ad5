"""The page and the terminal table of an adaptation, from adaptation.json as it is."""

from pathlib import Path

from cptquant.core.adaptation import AdaptationReport, AlignmentRecord, TeacherRecord
from cptquant.core.artifact import write_whole
from cptquant.core.evaluation import Measurement
from cptquant.reports.figures.adaptation import draw_losses, draw_training
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import spell_bytes, spell_measured, spell_number, spell_seconds
from cptquant.reports.tables import TextTable, render_text

SUBJECTS = {"original": "before", "adapted": "after stage 1", "aligned": "after format alignment"}
_TEXTS = ("domain", "general")
_NAMES = {
    "nll_nats_per_token": "loss, nats/token",
    "nll_increase_nats_per_token": "change of the loss, nats/token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "kl_nats_per_token": "KL to the original, nats/token",
}


def write_adaptation_report(path: Path, report: AdaptationReport) -> None:
    """Write the page.

    Raises:
        OutputError: the folder cannot be written.
    """
    context = {
        "report": report,
        "title": f"{report.request.model} adapted",
        "lead": report.options.get("method", report.request.method),
        "cards": _cards(report),
        "sources": source_rows(report),
        "measurements": measurement_rows(report),
        "tasks": task_rows(report),
        "columns": _columns(report),
        "drawings": _drawings(report),
        "teacher": [] if report.teacher is None else _teacher_facts(report.teacher),
        "alignment": [(record.kind, _alignment_facts(record)) for record in report.alignment],
        "wall": spell_seconds(report.provenance.wall_seconds or 0.0),
        "training": spell_seconds(report.training_seconds),
        "versions": sorted(report.provenance.versions.items()),
    }
    write_whole(path, load_template("adaptation.html.jinja").render(context).encode())


def adaptation_table(report: AdaptationReport) -> str:
    """What a person wants to know at once."""
    sources = TextTable(
        "", ("source", "share", "tokens", "epochs", "dropped by overlap", "held out"),
        [[row[0], *row[2:]] for row in source_rows(report)],
    )  # fmt: skip
    rows = [[f"{text} {name}" if text else name, *cells] for text, name, cells in measurement_rows(report)]
    rows += [[name, *cells] for name, cells in task_rows(report)]
    lines = list(report.notes)
    if report.teacher is not None:
        lines.append("Teacher: " + "; ".join(f"{key} {value}" for key, value in _teacher_facts(report.teacher)) + ".")
    for record in report.alignment:
        facts = "; ".join(f"{key} {value}" for key, value in _alignment_facts(record))
        lines.append(f"Format alignment on {record.kind}: {facts}.")
    return render_text(sources, TextTable("", ("", *_columns(report)), rows, lines=tuple(lines)))


def source_rows(report: AdaptationReport) -> list[list[str]]:
    """Name, files, share, tokens, epochs, documents dropped, documents held out."""
    return [
        [
            source.name,
            ", ".join(source.files),
            f"{source.count.share:.3g}",
            f"{source.count.tokens:,}",
            f"{source.count.epochs:.2f}",
            f"{source.dropped:,} of {source.documents - source.held_out:,}",
            f"{source.held_out:,}",
        ]
        for source in report.sources
    ]


def measurement_rows(report: AdaptationReport) -> list[tuple[str, str, list[str]]]:
    """Text, name, and a cell for each subject, of both held-out texts."""
    rows: list[tuple[str, str, list[str]]] = []
    for text in _TEXTS:
        for name, spelled in _NAMES.items():
            cells = _cells(report, f"{text}_{name}")
            if any(cells):
                rows.append((text, spelled, cells))
    return rows


def task_rows(report: AdaptationReport) -> list[tuple[str, list[str]]]:
    """Name and a cell for each subject, of everything that is no held-out text."""
    texts = {f"{text}_{name}" for text in _TEXTS for name in _NAMES}
    names = dict.fromkeys(found.name for found in report.measurements if found.name not in texts)
    return [(name.replace("_", " "), _cells(report, name)) for name in names]


def _subjects(report: AdaptationReport) -> list[str]:
    present = {found.subject for found in report.measurements}
    return [subject for subject in SUBJECTS if subject in present]


def _columns(report: AdaptationReport) -> list[str]:
    return [SUBJECTS[subject] for subject in _subjects(report)]


def _cells(report: AdaptationReport, name: str) -> list[str]:
    found = {each.subject: each for each in report.measurements if each.name == name}
    return [_spell(found[subject]) if subject in found else "" for subject in _subjects(report)]


def _spell(found: Measurement) -> str:
    return spell_measured(found.value, found.stderr)


def _cards(report: AdaptationReport) -> list[tuple[str, str, str]]:
    last = next((subject for subject in reversed(SUBJECTS) if subject in _subjects(report)), "")
    cards: list[tuple[str, str, str]] = []
    for text in _TEXTS:
        for found in report.measurements:
            if found.name == f"{text}_nll_increase_nats_per_token" and found.subject == last:
                cards.append((f"{text} loss", _spell(found), f"nats/token against the original, n = {found.n:,}"))
    cards.append(("trained on", f"{report.tokens:,}", f"tokens in {report.steps:,} steps"))
    return cards


def _drawings(report: AdaptationReport) -> list[tuple[str, str]]:
    drawn = [(f"{text} text, held out", draw_losses(report.looks, text, f"{text} loss")) for text in _TEXTS]
    drawn.append(("cross entropy in training", draw_training(report.looks, "training loss")))
    return [(name, drawing) for name, drawing in drawn if drawing is not None]


def _teacher_facts(teacher: TeacherRecord) -> list[tuple[str, str]]:
    facts = [
        ("kind", teacher.kind),
        ("time", f"{spell_seconds(teacher.seconds)}, {teacher.share:.0%} of stage 1"),
    ]
    if teacher.discarded_mass is not None:
        facts.append(("discarded mass", f"{spell_number(teacher.discarded_mass)} of the probability, mean a position"))
        facts.append(("cache", spell_bytes(teacher.cache_bytes)))
    return facts


def _alignment_facts(record: AlignmentRecord) -> list[tuple[str, str]]:
    facts = [
        ("samples", f"{record.chosen:,} of {record.candidates:,}, {record.dropped:,} left out as too hard"),
        ("steps", f"{record.steps:,} in {spell_seconds(record.seconds)}"),
        ("format score", f"{spell_number(record.score_before, 4)} → {spell_number(record.score_after, 4)}"),
    ]
    if record.held_out_before is not None and record.held_out_after is not None:
        facts.append(
            (
                "format score, held out",
                f"{spell_number(record.held_out_before, 4)} → {spell_number(record.held_out_after, 4)} "
                f"(n = {record.held_out_count:,})",
            )
        )
    return [*facts, ("line numbers", record.indices_file)]
