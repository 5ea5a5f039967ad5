"""KL against file size: our mixed GGUF at the bytes of llama.cpp's presets, and at the presets' own types.

    python benchmarks/gguf_presets.py [--models reference-llama reference-opt embedded:opt-mini] [--windows 64]

Per model: the original as GGUF in 16 bits; llama.cpp quantizes it to Q2_K, Q3_K_M, Q4_K_M and Q5_K_M with an importance
matrix (mean squared inputs of every matrix on our calibration text, as `llama-imatrix` collects them: none for the
token embedding). Each file is read back by the `gguf` package, so that weights are compared, not engines. Ours: the
default chain (tdmpq, knapsack, GPTQ) with the file's tensor bytes as the budget, and GPTQ at the preset's own type of
every tensor. All KL on the same held-out tokens. Needs llama-cpp-python (CPTQUANT_LLAMACPP_PYTHON).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf_source import quantize_preset, write_importance, write_source
from machine import describe_machine
from results_file import SHARED, model_folder, write_results
from torch import Tensor

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.artifact import digest_json
from cptquant.core.budget import Budget
from cptquant.core.errors import EngineError
from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import BLOCK_LAYOUTS
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import candidate_formats, find_target
from cptquant.engines.llamacpp_python import find_llamacpp
from cptquant.evaluation.evaluate import evaluate
from cptquant.exporters.gguf.read_back import GgufWeights, open_gguf
from cptquant.models.load import load_model
from cptquant.models.stream import WeightSource
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method

GGUF = find_target("gguf")
PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M")
FORMATS = tuple(QuantFormat.parse(name) for name in GGUF.default_formats)
LIKE = {"IQ4_NL": "Q4_0"}
"""A type that we do not write -> ours of the same bytes."""


class Memory:
    """Quantized weights in memory."""

    def __init__(self) -> None:
        self.weights: dict[str, StoredWeight] = {}

    def keep(self, _index: int | None, weights: dict[str, StoredWeight], _records: object) -> None:
        self.weights.update(weights)

    def weight(self, site_name: str) -> Tensor | None:
        found = self.weights.get(site_name)
        return None if found is None else found.dequantize()


class Bench:
    """One model, its texts and its importance matrix."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.model, self.folder = name, load_model(str(model_folder(name))), folder
        general = SHARED / "data" / "text" / "general"
        own = name.startswith("embedded:")

        def tokens(file: str, split: Any, sequences: int) -> TokenSet:
            source = None if own else general / file
            return load_tokens(self.model, source, split, sequences=sequences, length=256, seed=0)

        self.calibration = tokens("train.txt", "calibration", args.calibration)
        self.test = tokens("test.txt", "test", args.windows)

    def plan(self, formats: dict[str, QuantFormat] | None, limit_bytes: int, table: SensitivityTable | None) -> Plan:
        """The allocator's plan, or one with given formats."""
        layout = self.model.layout
        allocator = find_allocator("uniform" if table is None else "knapsack")
        made = allocate(layout, table, Budget(limit_bytes, "bytes"), GGUF, allocator, formats=FORMATS)
        if formats is None:
            return made
        size_bytes = GGUF.plan_bytes(layout, formats)
        names = {site: fmt.name for site, fmt in formats.items()}
        return made.model_copy(update={"formats": names, "size_bytes": size_bytes})

    def table(self) -> SensitivityTable:
        """TDMPQ on GGUF's formats."""
        layout = self.model.layout
        candidates = {site.name: candidate_formats(site, layout, GGUF, FORMATS) for site in layout.sites}
        return measure_sensitivity(self.model, self.calibration, candidates, find_method("tdmpq"))

    def quantize(self, plan: Plan) -> Memory:
        """GPTQ."""
        memory = Memory()
        quantize_sites(self.model, plan, find_quantizer("gptq"), self.calibration, memory.keep)
        return memory

    def preset_formats(self, path: Path) -> dict[str, QuantFormat]:
        """Our format of every site at the preset's own type."""
        types = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(path).tensors}
        weights = GgufWeights(path, self.model)
        formats: dict[str, QuantFormat] = {}
        for site in self.model.layout.sites:
            tensor = weights.tensor_of(site)
            name = types.get(tensor or "", "")
            name = LIKE.get(name, name)
            formats[site.name] = QuantFormat.parse(name) if name in BLOCK_LAYOUTS else self.model.layout.keep_format
        return formats


def measure(bench: Bench) -> list[dict[str, Any]]:
    """One row a preset and method."""
    source, importance = bench.folder / "original.gguf", bench.folder / "importance.npz"
    write_source(bench.model, source)
    write_importance(bench.model, bench.calibration, source, importance)
    python = find_llamacpp().python
    table = bench.table()
    rows: list[dict[str, Any]] = []
    for preset in PRESETS:
        path = bench.folder / f"{preset}.gguf"
        quantize_preset(python, preset, source, importance, path)
        size_bytes = sum(int(tensor.n_bytes) for tensor in open_gguf(path).tensors)
        same = bench.preset_formats(path)
        plans = {
            "ours, mixed": bench.plan(None, size_bytes, table),
            "ours, preset's types": bench.plan(same, size_bytes, None),
        }
        sources: dict[str, WeightSource] = {"llama.cpp": GgufWeights(path, bench.model)}
        sources.update({label: bench.quantize(plan) for label, plan in plans.items()})
        sizes = {"llama.cpp": size_bytes, **{label: plan.size_bytes for label, plan in plans.items()}}
        for found in evaluate(bench.model, sources, bench.test):
            if found.name == "kl_nats_per_token":
                rows.append(
                    {
                        "model": bench.name, "preset": preset, "method": found.subject,
                        "tensor_bytes": sizes[found.subject],
                        "bits_per_weight": 8 * sizes[found.subject] / bench.model.layout.parameters,
                        "kl_nats_per_token": found.value, "stderr": found.stderr, "n": found.n,
                    }
                )  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference-llama", "reference-opt", "embedded:opt-mini"])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128)
    args = parser.parse_args()
    try:
        find_llamacpp()
    except EngineError as error:
        sys.exit(str(error))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="cptquant-") as folder:
            rows += measure(Bench(name, args, Path(folder)))
        key = digest_json({"models": args.models})[:8]
        write_results("gguf_presets", {"machine": describe_machine(), "key": key, "calibration": args.calibration,
                                       "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
