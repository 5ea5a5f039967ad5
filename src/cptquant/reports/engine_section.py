"""What an export became in its engine, arranged for the report: one part a target."""

from dataclasses import dataclass

from cptquant.core.engine_export import EngineComparison, ExportRecord
from cptquant.reports.export_table import spell_memory, spell_round_trip, spell_tokens, spell_way
from cptquant.reports.quantities import spell_exact_bytes, spell_measured, spell_share
from cptquant.reports.run_folder import RunRecord


@dataclass(frozen=True)
class EngineSection:
    """One target: how the engine's outputs compare with our own model's, and facts about its files."""

    target: str
    not_run: str
    columns: list[str]
    rows: list[list[str]]
    facts: list[tuple[str, str]]


def engine_sections(record: RunRecord) -> list[EngineSection]:
    """One part for each export/TARGET/export.json."""
    return [_engine_section(export) for export in record.exports]


def _engine_section(export: ExportRecord) -> EngineSection:
    ran = bool(export.comparisons)
    facts = [("Engine", export.engine)] if ran else []
    facts += [
        ("Round trip", spell_round_trip(export)),
        ("Token ids", spell_tokens(export)),
        ("Predicted", f"{spell_exact_bytes(export.tensor_bytes)} of tensors, by the plan"),
        ("Files", _spell_files(export)),
        ("File", export.entry),
    ]
    if export.memory is not None:
        facts.append(("Memory", spell_memory(export.memory)))
    is_encoder = ran and export.comparisons[0].kl_nats is None
    columns = ["Cosine to ours", "Lowest"] if is_encoder else ["KL(ours ‖ engine), nats", "Same top answer"]
    return EngineSection(
        target=export.target,
        not_run="" if ran else export.engine,
        columns=["In the engine", *columns, "n", "Bound"] if ran else [],
        rows=[_comparison_row(found) for found in export.comparisons],
        facts=facts,
    )


def _comparison_row(found: EngineComparison) -> list[str]:
    if found.kl_nats is None:
        cells = [_spell(found.cosine, found.stderr), _spell(found.cosine_lowest)]
        bound = "" if found.bound is None else f"1 − cosine at most {found.bound:g}"
    else:
        share = "–" if found.top1_agreement is None else f"{found.top1_agreement:.2%}"
        cells = [_spell(found.kl_nats, found.stderr), share]
        bound = "" if found.bound is None else f"at most {found.bound:g}"
    return [spell_way(found), *cells, f"{found.n:,}", bound or "none, stated only"]


def _spell(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return "–"
    if stderr is None and 0.5 < value <= 1:  # a cosine of three digits says nothing
        return f"{value:.6f}"
    return spell_measured(value, stderr)


def _spell_files(export: ExportRecord) -> str:
    beside = export.file_bytes - export.tensor_bytes
    share = spell_share(beside, export.file_bytes)
    return f"{spell_exact_bytes(export.file_bytes)}, of which {share} are metadata, tokenizer and padding"
