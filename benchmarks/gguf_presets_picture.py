"""KL against file size, ours and llama.cpp's presets: docs/gguf-presets.png and a table, of results/gguf_presets.json.

python benchmarks/gguf_presets_picture.py
"""

import json
from typing import Any

import matplotlib
from results_file import FOLDER, REPOSITORY

matplotlib.use("Agg")
from matplotlib import pyplot

STYLES = {
    "llama.cpp": ("o-", "#b4552d", "llama.cpp's presets, importance matrix"),
    "ours, preset's types": ("s--", "#7f8fa6", "ours, the preset's types"),
    "ours, mixed": ("D-", "#1f6f8b", "ours, mixed types"),
}


def main() -> None:
    rows: list[dict[str, Any]] = json.loads((FOLDER / "gguf_presets.json").read_text())["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.1 * len(models), 3.6), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        for method, (line, colour, label) in STYLES.items():
            found = [row for row in rows if row["model"] == model and row["method"] == method]
            sizes, values = [row["tensor_bytes"] / 1e6 for row in found], [row["kl_nats_per_token"] for row in found]
            errors = [2 * row["stderr"] for row in found]
            axis.errorbar(sizes, values, errors, fmt=line, color=colour, label=label, markersize=5, capsize=2)
            if method == "llama.cpp":
                for row, size, value in zip(found, sizes, values, strict=True):
                    axis.annotate(row["preset"], (size, value), (4, 5), textcoords="offset points", fontsize=8)
        axis.set(title=model, xlabel="tensors in the file, MB", yscale="log")
        axis.grid(True, which="both", alpha=0.25)
        axis.margins(x=0.22, y=0.1)
    axes[0][0].set_ylabel("KL to the original, nats per token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(REPOSITORY / "docs" / "gguf-presets.png", dpi=110)
    print("| model | preset | MB | llama.cpp | ours, its types | ours, mixed | mixed / llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    cells = {(row["model"], row["preset"], row["method"]): row for row in rows}
    for model, preset in dict.fromkeys((row["model"], row["preset"]) for row in rows):
        theirs, same, mixed = (cells[model, preset, method] for method in STYLES)
        shown = [f"{row['kl_nats_per_token']:.5f} ± {row['stderr']:.5f}" for row in (theirs, same, mixed)]
        ratio = mixed["kl_nats_per_token"] / theirs["kl_nats_per_token"]
        print(f"| {model} | {preset} | {theirs['tensor_bytes'] / 1e6:.2f} | {' | '.join(shown)} | **{ratio:.2f}** |")


if __name__ == "__main__":
    main()
