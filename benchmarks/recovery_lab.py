"""What the benchmarks of recovery share: quantized starts, one training in memory, and its figures."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from machine import source_revision
from results_file import REPOSITORY, SHARED, model_folder
from torch import Tensor

from cptquant.core.recovery import RecoveryRequest
from cptquant.evaluation.evaluate import evaluate
from cptquant.models.own_text import join_texts, write_own_text
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.packing.shards import ShardFolder
from cptquant.pipeline import quantize_model
from cptquant.recovery.end_to_end import Material, run_end_to_end, split_text
from cptquant.recovery.methods import end_to_end
from cptquant.stages.recovery_pieces import Parent, open_parent
from cptquant.stages.run import Run

GENERAL = SHARED / "data" / "text" / "general"
WORK = REPOSITORY / "build" / "recovery"
MEASURED = ("kl_nats_per_token", "nll_increase_nats_per_token", "perplexity")


@dataclass(frozen=True)
class Start:
    """A quantized model: uniform or mixed bits inside the blocks, embedding and head in 16 bits.

    Attributes:
        plan: a format such as `int2-g64`, or a budget such as `2.5bpw@sites`. quantizer: with its own text, where it
            asks for that.
    """

    model: str
    plan: str
    quantizer: str
    work: Path = WORK

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.work / f"{self.model.replace(':', '-')}-{self.plan.replace('@', '-')}-{self.quantizer}"

    @cached_property
    def parent(self) -> Parent:
        """Made where it does not stand yet."""
        if not (self.folder / "evaluation.json").is_file():
            mixed = "bpw" in self.plan
            choices: dict[str, Any] = {} if self.own else {
                "calibration": str(GENERAL / "train.txt"), "eval_text": str(GENERAL / "test.txt"),
            }  # fmt: skip
            if not mixed:
                choices |= {"formats": (self.plan,), "allocator": "uniform", "baselines": ()}
            budget = self.plan if mixed else f"{_bits(self.plan)}bpw@sites"
            source = self.model if self.own else str(model_folder(self.model))
            quantize_model(source, budget, self.folder, quantizer=self.quantizer, predict=False, **choices)
        return open_parent(Run.look(self.folder))

    @property
    def own(self) -> bool:
        """Whether it is a model that comes with the package."""
        return self.model.startswith("embedded:")


def _bits(fmt: str) -> str:
    """A budget that one format everywhere just fits."""
    bits, group = int(fmt[3 : fmt.index("-")]), int(fmt.rpartition("g")[2])
    return f"{bits + 16 / group + 0.02:g}"


@dataclass
class Trained:
    """The trained weights as a source for the evaluation."""

    weights: Mapping[str, StoredWeight]
    others: ShardFolder
    norms: Mapping[str, Tensor]

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and steps."""
        return self.weights.get(site_name) or self.others.quantized(site_name)

    def weight(self, site_name: str) -> Tensor | None:
        """Float32."""
        found = self.quantized(site_name)
        return None if found is None else found.dequantize()

    def kept(self) -> Mapping[str, Tensor]:
        """Norms and biases."""
        return self.norms


def training_text(start: Start, sequences: int, own_text: int, data: str | None) -> tuple[TokenSet, TokenSet, float]:
    """(learned on, held out, CPU seconds for writing own text), the same for every method and seed."""
    run = start.parent.run
    text = load_tokens(
        run.model, data or run.settings.calibration, "training", sequences=sequences,
        length=run.settings.sequence_length, seed=0,
    )  # fmt: skip
    learned, held_out = split_text(text)
    if not own_text:
        return learned, held_out, 0.0
    begin = time.process_time()
    written = write_own_text(run.model, learned, own_text, seed=0)
    return join_texts(learned, written), held_out, time.process_time() - begin


def train(
    start: Start,
    request: RecoveryRequest,
    texts: tuple[TokenSet, TokenSet, float],
    splits: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:
    """One training in memory, judged on validation and test text."""
    parent, (learned, held_out, writing) = start.parent, texts
    material = Material(parent.run.model, parent.run.model, parent.shards, parent.shards.kept(), learned, held_out)
    folder = start.work / f"training-{time.time_ns()}"
    begin = time.process_time()
    found = run_end_to_end(material, end_to_end(request), folder, lambda done, total: None)
    seconds = time.process_time() - begin
    shutil.rmtree(folder, ignore_errors=True)
    source = Trained(found.weights, parent.shards, found.kept)
    return {
        "model": start.model,
        "plan": start.plan,
        "start": start.quantizer,
        "request": request.model_dump(exclude_defaults=True),
        "learned": learned.description,
        "steps": found.training.done,
        "best_step": found.training.best_step,
        "stopped": found.training.stopped,
        "held_out": [round(look.held_out_loss, 5) for look in found.training.looks],
        "training_cpu_seconds": round(seconds, 1),
        "writing_cpu_seconds": round(writing, 1),
        "moved_share": found.moved_share,
        **{split: judge(start, source, split) for split in splits},
        "revision": source_revision(),
    }


def judge(start: Start, source: Any, split: str) -> dict[str, Any]:
    """Value, standard error over documents and n of each measurement, and the original's perplexity."""
    run = start.parent.run
    tokens = run.validation if split == "validation" else run.test
    measured = evaluate(run.model, {"trained": source}, tokens)
    found = {
        f.name: {"value": f.value, "stderr": f.stderr, "n": f.n}
        for f in measured
        if f.subject == "trained" and f.name in MEASURED
    }
    original = next(f for f in measured if f.name == "perplexity" and f.subject == "original")
    return {**found, "original_perplexity": original.value}


def start_row(start: Start) -> dict[str, Any]:
    """The start itself, untrained."""
    parent = start.parent
    source = Trained({}, parent.shards, parent.shards.kept())
    return {
        "model": start.model, "plan": start.plan, "start": start.quantizer, "request": {"method": "none"},
        "bits_per_weight_sites": parent.plan.bits_per_weight_sites,
        "quantize_cpu_seconds": parent.manifest.provenance.cpu_seconds,
        "validation": judge(start, source, "validation"), "test": judge(start, source, "test"),
    }  # fmt: skip
