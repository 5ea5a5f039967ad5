"""What a training step costs: surrogates against straight-through, training on the grid against plain fine-tuning.

And the memory of training the steps alone against inference.

    OMP_NUM_THREADS=1 python benchmarks/qat_step.py --model reference-llama

A step is forward, backward and optimizer on 8 windows of 256 tokens, cross-entropy, 2 bits in groups of 64; variants
take turns, medians of CPU seconds, and ratios of one run. Peak memory is VmHWM of a process of its own, above what the
process had before its first pass. Writes results/qat_step.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from machine import describe_machine, source_revision
from results_file import model_folder, write_results
from torch import nn

from cptquant.core.formats import QuantFormat
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import read_weight
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_layer import Trains
from cptquant.quantizers.rtn import Rtn
from cptquant.recovery.grid_optimizer import GridAdam
from cptquant.recovery.lesson import Lesson, Weights
from cptquant.recovery.student import Student, StudentOptions, build_student

VARIANTS: dict[str, StudentOptions | None] = {
    "fine-tuning": None,
    "STE, clamp": StudentOptions(Trains(), Surrogate()),
    "sigmoid, clamp": StudentOptions(Trains(), Surrogate(rounding="sigmoid")),
    "sigmoid, soft sigmoid 4": StudentOptions(Trains(), Surrogate(rounding="sigmoid", clamp="soft")),
    "sigmoid, soft phi": StudentOptions(Trains(), Surrogate(rounding="sigmoid", clamp="soft", gate="phi")),
    "steps alone": StudentOptions(Trains(latent=False), others=False),
}
ROWS, LENGTH = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:opt-mini")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--peak", choices=["inference", "steps alone"], default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak_bytes(args.model, args.bits, args.peak)))
        return
    steps = {name: make_step(args.model, args.bits, options) for name, options in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.runs + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    peaks = {kind: in_own_process(args, kind) for kind in ("inference", "steps alone")}
    result = {
        "machine": describe_machine(),
        "revision": source_revision(),
        "model": args.model,
        "bits": args.bits,
        "runs": args.runs,
        "cpu_seconds": medians,
        "relative_to_ste": {name: found / medians["STE, clamp"] for name, found in medians.items()},
        "relative_to_fine_tuning": {name: found / medians["fine-tuning"] for name, found in medians.items()},
        "peak_bytes": peaks,
        "peak_of_steps_alone_over_inference": peaks["steps alone"] / peaks["inference"],
    }
    print(write_results("qat_step", result), json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))


def quantized(model: LoadedModel, bits: int) -> MemoryWeights:
    """All linear layers of the blocks rounded to nearest."""
    fmt = QuantFormat.parse(f"int{bits}-g64")
    weights = {}
    for site in model.layout.block_sites:
        weight = read_weight(model.module.get_submodule(site.name), site).detach().float()
        weights[site.name] = Rtn(clip_search=False)(weight, fmt, torch.bfloat16)
    return MemoryWeights(weights)


def make_step(name: str, bits: int, options: StudentOptions | None) -> Any:
    """A function that makes one step."""
    model = load(name)
    ids = torch.randint(model.layout.vocabulary_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask, targets = torch.ones_like(ids), ids.roll(-1, 1)
    if options is None:
        module: nn.Module = model.module.float().requires_grad_(True)
        parameters = [parameter for parameter in module.parameters() if parameter.ndim == 2 or parameter.ndim == 1]
        units = {}
    else:
        student = build_student(model, quantized(model, bits), {}, options)
        module, parameters = student.module, [parameter for _, parameter in student.trainable()]
        units = {v.latent: v.latent_unit for v in student.layers.values() if v.latent is not None}
    lesson = Lesson(module, nn.Module(), "causal_lm", Weights(kl=0.0, ce=1.0), coarse=True)
    optimizer = GridAdam([{"params": parameters, "lr": 1e-5}], units)

    def step() -> None:
        lesson(ids, mask, targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load(name: str) -> LoadedModel:
    """A private copy."""
    return load_model(name if name.startswith("embedded:") else str(model_folder(name)))


def peak_bytes(name: str, bits: int, kind: str) -> int:
    """Resident bytes at the peak of three passes, without what the process had before it loaded the model."""
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = resident("VmRSS")
    if kind == "inference":
        model = load(name)
        module = model.module.float()
        for _ in range(3):
            with torch.no_grad():
                module(input_ids=ids)
        return resident("VmHWM") - before
    step = _steps_alone(name, bits, ids)
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def _steps_alone(name: str, bits: int, ids: torch.Tensor) -> Any:
    model = load(name)
    options = cast(StudentOptions, VARIANTS["steps alone"])
    student: Student = build_student(model, quantized(model, bits), {}, options)
    del model
    student.module.activation_checkpointing_enable()
    student.module.train()
    lesson = Lesson(student.module, nn.Module(), "causal_lm", Weights(kl=0.0, ce=1.0), coarse=False)
    optimizer = GridAdam([{"params": [parameter for _, parameter in student.trainable()], "lr": 1e-5}], {})

    def step() -> None:
        lesson(ids, torch.ones_like(ids), ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_own_process(args: argparse.Namespace, kind: str) -> int:
    """`peak_bytes` in a fresh process."""
    command = [sys.executable, __file__, "--model", args.model, "--bits", str(args.bits), "--peak", kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
