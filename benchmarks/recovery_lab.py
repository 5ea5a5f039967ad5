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
from cptquant.quantizers.blocks.blockwise import Start as BlockStart
from cptquant.quantizers.blocks.blockwise import train_blocks
from cptquant.recovery.end_to_end import Material, run_end_to_end, split_text
from cptquant.recovery.methods import BLOCK_BY_BLOCK, block_by_block, end_to_end
from cptquant.stages.recovery_pieces import Parent, open_parent
from cptquant.stages.run import Run

GENERAL = SHARED / "data" / "text" / "general"
WORK = REPOSITORY / "build" / "recovery"
BLOCK_SEQUENCES = 128
Row = dict[str, Any]
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
    begin = time.process_time()
    block_wise = request.method in BLOCK_BY_BLOCK
    source, figures = (_train_blocks if block_wise else _train_whole)(start, request, texts[0], texts[1])
    seconds = time.process_time() - begin
    return {
        "model": start.model,
        "plan": start.plan,
        "start": start.quantizer,
        "request": request.model_dump(exclude_defaults=True),
        "learned": texts[0].description,
        "training_cpu_seconds": round(seconds, 1),
        "writing_cpu_seconds": round(texts[2], 1),
        **figures,
        **{split: judge(start, source, split) for split in splits},
        "revision": source_revision(),
    }


def _train_whole(start: Start, request: RecoveryRequest, learned: TokenSet, held_out: TokenSet) -> tuple[Trained, Row]:
    parent = start.parent
    material = Material(parent.run.model, parent.run.model, parent.shards, parent.shards.kept(), learned, held_out)
    folder = start.work / f"training-{time.time_ns()}"
    found = run_end_to_end(material, end_to_end(request), folder, lambda done, total: None)
    shutil.rmtree(folder, ignore_errors=True)
    return Trained(found.weights, parent.shards, found.kept), {
        "steps": found.training.done,
        "best_step": found.training.best_step,
        "stopped": found.training.stopped,
        "held_out": [round(look.held_out_loss, 5) for look in found.training.looks],
        "moved_share": found.moved_share,
    }


def _train_blocks(start: Start, request: RecoveryRequest, learned: TokenSet, held_out: TokenSet) -> tuple[Trained, Row]:
    """On the text that was given alone, as many windows as GPTQ reads: the published recipes' amount."""
    parent, weights, norms, looks = start.parent, {}, {}, []

    def keep(index: int, found: Any, kept: Any, look: Any) -> None:
        weights.update(found)
        norms.update(kept)
        looks.append(look)

    given = learned.subset(slice(0, min(BLOCK_SEQUENCES, learned.sequence_count)))
    train_blocks(parent.run.model, BlockStart(parent.shards, {}), block_by_block(request), given, keep)
    return Trained(weights, parent.shards, norms), {
        "learned": given.description,
        "held_out": [[round(look.held_out_start, 5), round(look.held_out_end, 5)] for look in looks],
        "blocks_taken": sum(look.best_step is not None for look in looks),
        "moved_share": sum(look.moved for look in looks) / parent.layout.parameters,
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
