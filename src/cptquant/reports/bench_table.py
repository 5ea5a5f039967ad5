"""A benchmark for people: one table for the terminal, one page with one picture."""

import shlex
from typing import TYPE_CHECKING

from cptquant.core.bench import BASELINE, BenchRecord, BenchVariant, Spread
from cptquant.reports.pages import load_template
from cptquant.reports.quantities import spell_bytes, spell_count, spell_number, spell_seconds
from cptquant.reports.svg import Canvas, Frame, value_scale
from cptquant.reports.tables import TextTable, render_text

if TYPE_CHECKING:
    pass

_SPEEDS = {
    "decode_tokens_per_second": "Decode, tok/s",
    "prefill_128_tokens_per_second": "Prefill 128, tok/s",
    "prefill_512_tokens_per_second": "Prefill 512, tok/s",
    "encode_128_ms": "128 tokens, ms",
    "encode_512_ms": "512 tokens, ms",
}


def bench_table(record: BenchRecord) -> str:
    """The table as text."""
    columns, rows = bench_rows(record)
    return render_text(
        TextTable(f"{record.model}, {spell_setting(record)}", tuple(columns), rows, lines=bench_notes(record))
    )


def bench_rows(record: BenchRecord) -> tuple[list[str], list[list[str]]]:
    """Headings, and one row a variant: median (least to largest) and, in brackets, times the bf16 baseline."""
    speeds = [name for name in _SPEEDS if any(name in variant.figures for variant in record.variants)]
    decodes = any(variant.bandwidth_share for variant in record.variants)
    columns = ["Engine", "Files", *(_SPEEDS[name] for name in speeds), *(["Of bandwidth"] if decodes else [])]
    columns += ["Load", "Peak memory"]
    return columns, [_row(variant, speeds, decodes=decodes) for variant in record.variants]


def _row(variant: BenchVariant, speeds: list[str], *, decodes: bool) -> list[str]:
    row = [variant.name, spell_bytes(variant.file_bytes)]
    for name in speeds:
        figure, ratio = variant.figures.get(name), variant.ratios.get(name)
        text = "–" if figure is None else spell_spread(figure)
        row.append(text if ratio is None else f"{text} [{ratio.median:.2f} ×]")
    if decodes:
        share = variant.bandwidth_share
        row.append("–" if share is None else f"{share.median:.0%}")
    load, peak = variant.figures.get("load_seconds"), variant.figures.get("peak_bytes")
    row.append("–" if load is None else spell_seconds(load.median))
    row.append("–" if peak is None else spell_bytes(peak.median))
    return row


def bench_notes(record: BenchRecord) -> tuple[str, ...]:
    """What the numbers are, and which engines gave none."""
    bandwidth = record.bandwidth_bytes_per_second
    ratios = f"; in brackets the median of the rounds' ratios to {BASELINE}"
    compared = any(variant.ratios for variant in record.variants)
    notes = [
        f"Median (least to largest) of {record.rounds} interleaved rounds{ratios if compared else ''}. Decoding at "
        "batch 1.",
        f"Memory is read at {bandwidth.median / 1e9:.1f} GB/s ({bandwidth.low / 1e9:.1f} to {bandwidth.high / 1e9:.1f})"
        f" by {record.threads} thread{'s' if record.threads > 1 else ''}; models that fit the caches can be faster.",
    ]
    return (*notes, *(f"{variant.name}: {variant.problem}" for variant in record.variants if variant.problem))


def spell_spread(figure: Spread) -> str:
    """`12.3 (11.9–12.8)`."""
    return f"{spell_number(figure.median)} ({spell_number(figure.low)}–{spell_number(figure.high)})"


def spell_setting(record: BenchRecord) -> str:
    """Size of the model and threads."""
    return f"{spell_count(record.parameters)} parameters, {record.threads} thread{'s' if record.threads > 1 else ''}"


def draw_speeds(record: BenchRecord, name: str) -> str:
    """One bar a variant from zero, with the range over rounds."""
    found = [(variant, variant.figures[name]) for variant in record.variants if name in variant.figures]
    height = 34.0
    canvas = Canvas(640, height * len(found) + 40, _SPEEDS[name])
    frame = Frame(150, 4, 520, height * len(found) + 6)
    scale = value_scale([figure.high for _, figure in found], frame.left, frame.right, logarithmic=False)
    for tick in scale.ticks(5):
        canvas.line((scale(tick), frame.top), (scale(tick), frame.bottom), "grid")
        canvas.text(scale(tick), frame.bottom + 15, spell_number(tick), "tick mid")
    for index, (variant, figure) in enumerate(found):
        y = frame.top + (index + 0.5) * height
        canvas.text(frame.left - 10, y + 4, variant.name, "label end")
        title = f"{variant.name}: {spell_spread(figure)}, n = {figure.n}"
        canvas.rect(frame.left, y - 9, scale(figure.median) - frame.left, 18, "bar", title=title)
        canvas.line((scale(figure.low), y), (scale(figure.high), y), "whisker")
        ratio = variant.ratios.get(name)
        text = spell_number(figure.median) + ("" if ratio is None else f"  ({ratio.median:.2f} ×)")
        canvas.text(scale(figure.high) + 8, y + 4, text, "label")
    return canvas.render()


def bench_page(record: BenchRecord) -> str:
    """The page: self-contained HTML."""
    columns, rows = bench_rows(record)
    shown = next((name for name in _SPEEDS if any(name in variant.figures for variant in record.variants)), None)
    provenance = record.provenance
    return load_template("bench.html.jinja").render(
        record=record,
        setting=spell_setting(record),
        columns=columns,
        rows=rows,
        notes=bench_notes(record),
        heading="" if shown is None else _SPEEDS[shown],
        drawing="" if shown is None else draw_speeds(record, shown),
        engines=[f"{variant.name}: {variant.engine}" for variant in record.variants if variant.engine],
        versions=[f"{package} {version}" for package, version in provenance.versions.items()],
        command=shlex.join(shlex.split(provenance.command)) if provenance.command else "",
    )
