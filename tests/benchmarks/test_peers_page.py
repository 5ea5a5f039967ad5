from pathlib import Path
from typing import Any

import pytest
from peers_page import BEGIN, END, draw, replace_between, summary, tables


def row(tool: str, setting: str, bits: float, kl: float, *, cpu: float = 10.0) -> dict[str, Any]:
    return {
        "model": "toy", "tool": tool, "setting": setting, "bits_per_weight": bits, "kl_nats_per_token": kl,
        "stderr": kl / 100, "windows": 64, "cpu_seconds": cpu, "peak_memory_bytes": 5e8,
    }  # fmt: skip


ROWS = [
    row("peer A", "W2", 2.25, 0.16, cpu=17.2), row("peer A", "W4", 4.25, 0.0016, cpu=21.4),
    row("peer B", "average 3", 2.5, 0.04), row("peer B", "average 4", 3.5, 0.01),
    {"model": "toy", "tool": "peer C", "setting": "W2", "failure": "return code 1: a|b", "cpu_seconds": 3.0},
    row("cptquant gptq", "2.5 bpw@sites", 2.4987, 0.02), row("cptquant gptq", "3 bpw@sites", 2.9987, 0.01),
]  # fmt: skip


def test_the_summary_reads_every_tool_at_the_sizes():
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in summary(ROWS)}
    # peer A: ln KL falls by ln 100 over 2 bits, so KL(3.25) = 0.016; at 2.5 bits 0.16 * 100 ** -(0.25 / 2)
    assert lines["peer A"][0] == f"{0.16 * 100**-0.125:.5f} ± {0.16 * 100**-0.125 / 100:.5f}"
    assert lines["peer A"][4:] == ["2.25 to 4.25", "17 to 21", "500"]
    assert lines["peer B"][0] == "**0.04000 ± 0.00040**"
    assert lines["peer B"][1] == "**0.02000 ± 0.00020**"  # half way from 0.04 to 0.01 on a log axis
    assert lines["peer B"][3] == "out of range"
    assert lines["peer C"][4] == "failed"
    assert lines["cptquant gptq"][:4] == ["0.02000 ± 0.00020", "0.01000 ± 0.00010", "out of range", "out of range"]
    assert lines["cptquant gptq / best peer"][:3] == ["0.50 ± 0.01", "0.50 ± 0.01", ""]


def test_every_cell_is_listed_and_failures_in_the_tools_words():
    noted = row("peer D", "W3", 3.25, 0.02) | {"note": "measured earlier"}
    text = "\n".join(tables([*ROWS, noted]))
    assert "\n\npeer D W3: measured earlier." in text
    assert "| peer C | W2 | failed | return code 1: a/b | 3 | |" in text
    assert "| peer A | W4 | 4.250 | 0.00160 ± 0.00002 | 21 | 500 |" in text


def test_only_what_is_between_the_markers_changes():
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    made = replace_between(page, ["new"])
    assert made == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    assert replace_between(made, ["new"]) == made
    with pytest.raises(ValueError, match="the page lacks <!-- end"):
        replace_between(f"{BEGIN}\nold", [])


def test_the_picture_is_drawn_where_a_tool_failed(tmp_path: Path):
    draw(ROWS, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
