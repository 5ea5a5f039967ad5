"""docs/peers.md's tables and docs/peers.png, of results/peers.json; called by peers_table.py."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from own_frontier import Point, at_most, best, frontier, interpolate, ratio
from results_file import FOLDER, REPOSITORY

matplotlib.use("Agg")
from matplotlib import pyplot

SIZES = (2.5, 3.0, 3.5, 4.0)
BEGIN, END = "<!-- begin benchmarks/peers_table.py -->", "<!-- end benchmarks/peers_table.py -->"
OUT_OF_RANGE = "out of range"
Rows = list[dict[str, Any]]


def write_page() -> None:
    """The tables between the markers of docs/peers.md, and the picture."""
    content = json.loads((FOLDER / "peers.json").read_text())
    page = REPOSITORY / "docs" / "peers.md"
    page.write_text(replace_between(page.read_text(encoding="utf-8"), tables(content["rows"])), encoding="utf-8")
    draw(content["rows"], REPOSITORY / "docs" / "peers.png")


def replace_between(text: str, lines: Iterable[str]) -> str:
    """The text with everything between the markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN if not begin else END}")
    return "\n".join([before + BEGIN, "", *lines, "", END]) + after


def tables(rows: Rows) -> list[str]:
    """Per model: every tool at the four sizes, and every cell as it was measured."""
    lines: list[str] = []
    for model in unique(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines += [f"**{model}**", "", *summary(mine), ""]
    lines += ["### Every cell", ""]
    for model in unique(row["model"] for row in rows):
        lines += [f"**{model}**", "", *cells([row for row in rows if row["model"] == model]), ""]
    return lines[:-1]


def unique(values: Iterable[str]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(values))


def is_ours(tool: str) -> bool:
    """Rows of ours are named so."""
    return tool.startswith("cptquant")


def points_of(rows: Rows, tool: str) -> list[Point]:
    """What one tool reached."""
    return [
        Point(row["bits_per_weight"], row["kl_nats_per_token"], row["stderr"])
        for row in rows if row["tool"] == tool and "failure" not in row
    ]  # fmt: skip


def summary(rows: Rows) -> list[str]:
    """One model: KL of every tool at the sizes, CPU seconds and memory of its runs, and ours over the best peer."""
    tools = unique(row["tool"] for row in rows)
    peers = sorted((tool for tool in tools if not is_ours(tool)), key=lambda tool: -len(points_of(rows, tool)))
    read = {
        tool: {bits: (at_most if is_ours(tool) else interpolate)(points_of(rows, tool), bits) for bits in SIZES}
        for tool in tools
    }
    winners = {bits: best({tool: read[tool][bits] for tool in peers}) for bits in SIZES}
    lines = ["| tool | " + " | ".join(f"{bits:g} bits" for bits in SIZES) + " | range | CPU s | peak MB |",
             "|---" * (len(SIZES) + 4) + "|"]  # fmt: skip
    for tool in [*(tool for tool in tools if not is_ours(tool)), *filter(is_ours, tools)]:
        texts = [spell(read[tool][bits], bold=winners[bits] == tool) for bits in SIZES]
        lines.append(f"| {tool} | " + " | ".join([*texts, *effort(rows, tool)]) + " |")
    for tool in filter(is_ours, tools):
        texts = []
        for bits in SIZES:
            own, winner = read[tool][bits], winners[bits]
            other = read[winner][bits] if winner else None
            texts.append("" if own is None or other is None else "{:.2f} ± {:.2f}".format(*ratio(own, other)))
        lines.append(f"| {tool} / best peer | " + " | ".join(texts) + " | | | |")
    return lines


def spell(point: Point | None, *, bold: bool = False) -> str:
    """KL ± stderr."""
    if point is None:
        return OUT_OF_RANGE
    digits = 4 if point.kl >= 0.1 else 5
    text = f"{point.kl:.{digits}f} ± {point.stderr:.{digits}f}"
    return f"**{text}**" if bold else text


def effort(rows: Rows, tool: str) -> list[str]:
    """Bits reached, CPU seconds of the cells, and the largest memory."""
    found = [row for row in rows if row["tool"] == tool and "failure" not in row]
    if not found:
        return ["failed", "", ""]
    bits = [row["bits_per_weight"] for row in found]
    seconds = sorted(round(row["cpu_seconds"]) for row in found)
    spent = f"{seconds[0]}" if seconds[0] == seconds[-1] else f"{seconds[0]} to {seconds[-1]}"
    return [f"{min(bits):.2f} to {max(bits):.2f}", spent, megabytes(found)]


def megabytes(rows: Rows) -> str:
    """The largest peak; empty where none was measured."""
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]]
    return f"{max(peaks) / 1e6:.0f}" if peaks else ""


def cells(rows: Rows) -> list[str]:
    """As measured; failures in the tool's own words."""
    lines = ["| tool | setting | bits | KL | CPU s | peak MB |", "|---" * 6 + "|"]
    for row in rows:
        start = f"| {row['tool']} | {row['setting']} "
        if "failure" in row:
            lines.append(f"{start}| failed | {row['failure'].replace('|', '/')} | {row['cpu_seconds']:.0f} | |")
            continue
        point = Point(row["bits_per_weight"], row["kl_nats_per_token"], row["stderr"])
        lines.append(f"{start}| {point.bits:.3f} | {spell(point)} | {row['cpu_seconds']:.0f} | {megabytes([row])} |")
    for note in unique(row["note"] for row in rows if "note" in row):
        settings = ", ".join(f"{row['tool']} {row['setting']}" for row in rows if row.get("note") == note)
        lines += ["", f"{settings}: {note}."]
    return lines


def draw(rows: Rows, path: Path) -> None:
    """KL against bits, one line a tool, two standard errors."""
    models, tools = unique(row["model"] for row in rows), unique(row["tool"] for row in rows)
    peers = [tool for tool in tools if not is_ours(tool)]
    colours = dict(zip(peers, pyplot.get_cmap("tab10")(range(len(peers))), strict=True))
    ours = [tool for tool in tools if is_ours(tool)]
    shapes = dict(zip(ours, "Dsv^P*Xp"[: len(ours)].ljust(len(ours), "D"), strict=True))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(max(4.6 * len(models), 7.5), 4.6), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        for tool in tools:
            kept = frontier(points_of([row for row in rows if row["model"] == model], tool))
            if not kept:
                continue
            axis.errorbar(
                [point.bits for point in kept], [point.kl for point in kept], [2 * point.stderr for point in kept],
                fmt=f"{shapes.get(tool, 'o')}-", color="#1f6f8b" if is_ours(tool) else colours[tool], label=tool,
                markersize=5 if is_ours(tool) else 4, linewidth=2 if is_ours(tool) else 1.2, capsize=2,
            )  # fmt: skip
        axis.set(title=model, xlabel="bits per weight of the blocks' matrices, scales counted", yscale="log")
        axis.set_xlim(2, 4.75)
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel("KL to the original, nats per token")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
