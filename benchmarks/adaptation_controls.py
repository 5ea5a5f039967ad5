"""Which ingredient of Mix-CPT holds what the model knew: controls with the same tokens, domains and seeds.

    OMP_NUM_THREADS=1 python benchmarks/adaptation_controls.py                # every cell, then the table
    ... --domains law medical math --seeds 0 1 2 --arms cpt replay mix-0.5    # some cells
    ... --table                                                               # the table of what stands
    ... --step-time                                                           # cost of a step with each teacher

A cell is one training of one arm: AdamW at a constant rate (so that points along a run compare), looks at held-out
domain and general text at equal distances, questions at the end. The teacher is the start, cached (top k) or live.
Cells stand in --work as lines of cells.jsonl and are not run again; a cell that was killed goes on.

`rise` is the rise of the general loss, `gain` the fall of the domain loss. Arms are compared with plain CPT of the same
domain and seed at the smaller of the two gains, interpolated linearly between looks. Writes
results/adaptation_controls.json and, with --step-time, results/adaptation_step.json.
"""

import argparse
import atexit
import copy
import itertools
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, source_revision
from results_file import REPOSITORY, SHARED, model_folder, write_results

from cptquant.adaptation.logit_swap import PLAIN, LossShape, TopTargets, counted_loss
from cptquant.adaptation.methods import METHODS
from cptquant.adaptation.mix_cpt import Distillation, Looks, TrainingSettings, train_causal
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.overlap import OverlapFilter
from cptquant.adaptation.sources import SourceDocument, read_documents, read_records
from cptquant.adaptation.teacher import LiveTeacher, build_cache, round_to_8_bits_
from cptquant.adaptation.token_files import TokenSource, tokenise_source
from cptquant.core.mixture import divide_tokens
from cptquant.evaluation.tasks import read_questions, score_questions, task_measurements
from cptquant.models.corpus import Document, Texts
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.losses import IGNORED
from cptquant.models.text import TokenSet, tokenize

TEXT, TASKS = SHARED / "data" / "text", SHARED / "data" / "tasks"


@dataclass(frozen=True)
class Arm:
    """Attributes: shares: ratio and chat share; the domain alone for ratio 1. shape: of the loss."""

    ratio: float | None
    chat: float
    shape: LossShape = PLAIN


def arms(ratio: float, chat: float) -> dict[str, Arm]:
    swap = METHODS["mix-cpt"].swap
    made = {
        "cpt": Arm(1.0, 0.0),
        "replay": Arm(ratio, 0.0),
        "kl-0.5": Arm(ratio, chat, LossShape(0.5, swap=METHODS["kl"].swap)),
        "no-chat-0.5": Arm(ratio, 0.0, LossShape(0.5, swap=swap)),
        "domain-alone-0.5": Arm(1.0, 0.0, LossShape(0.5, swap=swap)),
    }
    return made | {f"mix-{lam:g}": Arm(ratio, chat, LossShape(lam, swap=swap)) for lam in (0, 0.1, 0.3, 0.5, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference-llama")
    parser.add_argument("--domains", nargs="+", default=["law", "medical", "math"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--chat-share", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--teacher-cache", type=int, default=128, help="0: live")
    parser.add_argument("--looks", type=int, default=4)
    parser.add_argument("--eval-sequences", type=int, default=32)
    parser.add_argument("--tasks", nargs="*", default=["arc_easy", "lambada"])
    parser.add_argument("--task-limit", type=int, default=60)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the processor is fast at it")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "adaptation_controls")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--step-time", action="store_true")
    args = parser.parse_args()
    if args.step_time:
        step_time(args)
        return
    known = arms(args.ratio, args.chat_share)
    args.work.mkdir(parents=True, exist_ok=True)
    for domain in args.domains:
        for seed in args.seeds:
            for name in args.arms or list(known):
                key = cell_key(args, domain, seed, name)
                if not args.table and key not in [cell["key"] for cell in finished(args.work)]:
                    began = time.process_time()
                    cell = {"key": key, **run_cell(args, domain, seed, known[name])}
                    cell["cell_cpu_seconds"] = time.process_time() - began
                    with (args.work / "cells.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
                    ends = cell["looks"][-1]
                    print(domain, seed, name, {k: round(v[0], 4) for k, v in ends.items() if k != "tokens"},
                          f"{cell['cell_cpu_seconds']:.0f} s CPU", flush=True)  # fmt: skip
            shutil.rmtree(args.work / "teachers", ignore_errors=True)  # of one domain and seed
    settings = settings_of(args)
    cells = [cell for cell in finished(args.work) if cell["key"]["settings"] == settings]
    rows = table(cells)
    write_results(
        "adaptation_controls",
        {
            "machine": describe_machine(),
            "source": source_revision(),
            "settings": settings,
            "table": rows,
            "cells": cells,
        },
    )
    print_table(rows)


# --- cells ------------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "ratio", "chat_share", "tokens", "window", "batch", "learning_rate", "teacher_cache", "looks",
             "eval_sequences", "tasks", "task_limit", "bf16")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def cell_key(args: argparse.Namespace, domain: str, seed: int, arm: str) -> dict[str, Any]:
    return {"domain": domain, "seed": seed, "arm": arm, "settings": settings_of(args)}


def finished(work: Path) -> list[dict[str, Any]]:
    path = work / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@cache
def original(name: str) -> LoadedModel:
    return load_model(model_folder(name))


@cache
def held_out(model: str, domain: str, sequences: int, window: int) -> TokenSet:
    """The test split, its documents as pieces of about a thousand characters."""
    documents = read_documents([str(TEXT / domain / "test.txt")], "--eval-domain")
    rows = tuple(
        Document(document.text, index, index + 1, ends=document.ends) for index, document in enumerate(documents)
    )
    texts = Texts(rows, "test", domain, f"{domain} test")
    return tokenize(texts, original(model), sequences=sequences, length=window, seed=0)


@cache
def source(model: str, name: str, domain: str) -> TokenSource:
    """Training text, cleaned of what the test splits of domain and general text hold."""
    evaluation = [text.text for each in (domain, "general")
                  for text in read_documents([str(TEXT / each / "test.txt")], "--eval-domain")]  # fmt: skip
    if name in ("instructions", "preferences"):
        records = read_records([str(TEXT / name / "train.jsonl")], f"--{name}", preferences=name == "preferences")
        documents = [SourceDocument(record.text) for record in records]
    else:
        folder = domain if name == "domain" else name
        documents = list(read_documents([str(TEXT / folder / "train.txt")], f"--{name}"))
    cleaned = OverlapFilter(evaluation).clean(documents)
    place = Path(tempfile.mkdtemp(prefix="tokens-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return tokenise_source(name, cleaned, original(model).require_tokenizer(), place / name)


def mixture_of(args: argparse.Namespace, domain: str, seed: int, arm: Arm) -> Mixture:
    available = ["domain", "general", "instructions", "preferences"]
    shares = divide_tokens(args.ratio if arm.ratio is None else arm.ratio, arm.chat, available)
    sources = [source(args.model, name, domain) for name in shares]
    return Mixture(sources, list(shares.values()), window_tokens=args.window, total_tokens=args.tokens, seed=seed)


def run_cell(args: argparse.Namespace, domain: str, seed: int, arm: Arm) -> dict[str, Any]:
    mixture = mixture_of(args, domain, seed, arm)
    texts = {"domain": held_out(args.model, domain, args.eval_sequences, args.window),
             "general": held_out(args.model, "general", args.eval_sequences, args.window)}  # fmt: skip
    distillation, teacher = teach(args, mixture, arm)
    settings = TrainingSettings(
        batch_windows=args.batch, learning_rate=args.learning_rate, schedule="constant", anneal=0.0, looks=args.looks,
        saves=1, bf16=args.bf16, seed=seed,
    )  # fmt: skip
    student = copy.deepcopy(original(args.model).module).float().requires_grad_(True)
    folder = args.work / "training"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    training = train_causal(student, mixture, folder, settings, distillation=distillation, looks=Looks(texts))
    spent = time.process_time() - began
    shutil.rmtree(folder, ignore_errors=True)
    looks = [
        {"tokens": look.tokens, **{n: [f.nll_nats_per_token, f.stderr, f.n] for n, f in look.held_out.items()}}
        for look in training.looks
    ]
    return {
        "looks": looks,
        "stopped": training.stopped,
        "tasks": ask(args, student),
        "epochs": {count.name: round(count.epochs, 4) for count in mixture.counts()},
        "training_cpu_seconds": spent,  # looks included
        "training_wall_seconds": training.seconds,  # of the steps alone
        "teacher": {**teacher, "live_wall_seconds": training.teacher_seconds},
    }


def teach(args: argparse.Namespace, mixture: Mixture, arm: Arm) -> tuple[Distillation | None, dict[str, Any]]:
    if not arm.shape.weight:
        return None, {"kind": "none"}
    began = time.process_time()
    frozen = copy.deepcopy(original(args.model).module).float()
    if not args.teacher_cache:
        return Distillation(LiveTeacher(frozen), arm.shape), {"kind": "live"}
    folder = args.work / "teachers" / f"{mixture.digest[:16]}-{arm.shape.swap}-{args.teacher_cache}"
    made = build_cache(frozen, mixture, arm.shape, args.teacher_cache, folder, teacher_digest=args.model)
    return Distillation(made, arm.shape), {
        "kind": made.kind, "seconds": made.seconds, "cpu_seconds_now": time.process_time() - began,
        "discarded_mass": made.discarded_mass, "bytes": made.size_bytes,
    }  # fmt: skip


def ask(args: argparse.Namespace, student: Any) -> dict[str, list[float | None]]:
    """Name -> value, standard error, n; and the change against the original on the same questions."""
    measured: dict[str, list[float | None]] = {}
    tokenizer = original(args.model).require_tokenizer()
    for name in args.tasks:
        scores = {"original": before(args.model, name, args.task_limit)}
        questions = read_questions(str(TASKS / f"{name}.jsonl"), args.task_limit)
        scores["adapted"] = score_questions(student.eval(), tokenizer, questions)
        for found in task_measurements(name, scores):
            if found.subject == "adapted":
                measured[found.name] = [found.value, found.stderr, found.n]
    return measured


@cache
def before(model: str, name: str, limit: int) -> Any:
    loaded = original(model)
    module = copy.deepcopy(loaded.module).float()
    return score_questions(module, loaded.require_tokenizer(), read_questions(str(TASKS / f"{name}.jsonl"), limit))


# --- the table --------------------------------------------------------------------------------------------------------


def path_of(cell: dict[str, Any]) -> list[tuple[float, float]]:
    """(gain, rise) at every look."""
    first = cell["looks"][0]
    return [
        (first["domain"][0] - look["domain"][0], look["general"][0] - first["general"][0]) for look in cell["looks"]
    ]


def rise_at(path: Sequence[tuple[float, float]], gain: float) -> float:
    """The rise where the path first reaches a gain."""
    for (low, start), (high, end) in itertools.pairwise(path):
        if low <= gain <= high:
            return end if high == low else start + (end - start) * (gain - low) / (high - low)
    return math.nan


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(cell["key"]["domain"], cell["key"]["arm"], cell["key"]["seed"]): cell for cell in cells}
    rows: list[dict[str, Any]] = []
    for domain in dict.fromkeys(domain for domain, _, _ in by):
        for arm in dict.fromkeys(arm for found, arm, _ in by if found == domain):
            seeds = [seed for found, name, seed in by if (found, name) == (domain, arm)]
            paths = {seed: path_of(by[domain, arm, seed]) for seed in seeds}
            pairs: list[tuple[float, float]] = []
            for seed, path in paths.items():
                plain = by.get((domain, "cpt", seed))
                if plain is not None:
                    gain = min(path[-1][0], path_of(plain)[-1][0])
                    pairs.append((rise_at(path, gain), rise_at(path_of(plain), gain)))
            rows.append(
                {
                    "domain": domain, "arm": arm, "seeds": len(seeds),
                    "gain": mean([path[-1][0] for path in paths.values()]),
                    "rise": mean([path[-1][1] for path in paths.values()]),
                    "rise_at_equal_gain": mean([own for own, _ in pairs]) if pairs else None,
                    "cpt_rise_at_equal_gain": mean([plain for _, plain in pairs]) if pairs else None,
                    "ratio": ratio(pairs),
                    "tasks": {
                        name: mean([by[domain, arm, seed]["tasks"][name][0] for seed in seeds])
                        for name in by[domain, arm, seeds[0]]["tasks"]
                    },
                    "training_cpu_seconds": mean([by[domain, arm, seed]["training_cpu_seconds"] for seed in seeds])[0],
                    "teacher_seconds": mean(
                        [by[domain, arm, seed]["teacher"].get("seconds", 0.0) for seed in seeds]
                    )[0],
                }
            )  # fmt: skip
    return rows


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None] | None:
    """Ratio of the mean rises, with a jackknife error over seeds."""
    if not pairs or any(math.isnan(value) for pair in pairs for value in pair):
        return None

    def of(some: Sequence[tuple[float, float]]) -> float:
        return sum(own for own, _ in some) / sum(plain for _, plain in some)

    n = len(pairs)
    left = [of([*pairs[:k], *pairs[k + 1 :]]) for k in range(n)] if n > 1 else []
    error = math.sqrt((n - 1) / n * sum((value - statistics.fmean(left)) ** 2 for value in left)) if left else None
    return of(pairs), error


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    def spell(found: tuple[float, float | None] | None) -> str:
        return "–" if found is None else f"{found[0]:+.4f}" + (f" ± {found[1]:.4f}" if found[1] is not None else "")

    print("| domain | arm | n | gain | rise | rise at cpt's gain | ratio to cpt | CPU s |\n" + "|---" * 8 + "|")
    for row in rows:
        cells = [spell(row[name]) for name in ("gain", "rise", "rise_at_equal_gain", "ratio")]
        seconds = f"{row['training_cpu_seconds']:.0f}"
        print(f"| {row['domain']} | {row['arm']} | {row['seeds']} | {' | '.join(cells)} | {seconds} |")


# --- the cost of a step -----------------------------------------------------------------------------------------------


def step_time(args: argparse.Namespace, runs: int = 9) -> None:
    """Variants take turns; medians of CPU seconds of a step, and the median ratio to plain CPT in the same turn."""
    arm = arms(args.ratio, args.chat_share)["mix-0.5"]
    mixture = mixture_of(args, args.domains[0], 0, arm)
    distillation, _ = teach(args, mixture, arm)
    assert distillation is not None
    frozen = copy.deepcopy(original(args.model).module).float()
    rounded = copy.deepcopy(frozen)
    round_to_8_bits_(rounded, original(args.model).layout)
    teachers = {"plain": None, f"cache of the top {args.teacher_cache}": distillation.teacher,
                "live": LiveTeacher(frozen), "live, 8 bits": LiveTeacher(rounded)}  # fmt: skip
    steps = {name: make_step(args, mixture, teacher, arm.shape) for name, teacher in teachers.items()}
    steps = {"transformers' own loss": make_step(args, mixture, None, PLAIN, own=True), **steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(runs + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(turn)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(found, seconds["plain"], strict=True))
              for name, found in seconds.items()}  # fmt: skip
    content = {"machine": describe_machine(), "source": source_revision(), "settings": settings_of(args), "runs": runs,
               "cpu_seconds": medians, "ratio_to_plain": ratios, "all": seconds}  # fmt: skip
    write_results("adaptation_step", content)
    for name in steps:
        print(f"{name:<26} {medians[name]:.3f} s CPU  {ratios[name]:.3f} of plain")


def make_step(
    args: argparse.Namespace, mixture: Mixture, teacher: Any, shape: LossShape, *, own: bool = False
) -> Callable[[int], None]:
    """A step on `--batch` windows: reading, forward, loss, backward, clipping, AdamW."""
    student = copy.deepcopy(original(args.model).module).float().requires_grad_(True).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step(turn: int) -> None:
        indices = range(turn * args.batch, (turn + 1) * args.batch)
        ids = torch.stack([torch.from_numpy(mixture[index].input_ids) for index in indices])
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:]
        given: TopTargets | Any = None
        if teacher is not None:
            stored = [teacher.stored(index) for index in indices]
            batch = {name: torch.stack([each[name] for each in stored]) for name in stored[0]}
            given = teacher.targets({"input_ids": ids}, batch)
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            if own:
                loss = student(input_ids=ids, labels=ids, use_cache=False).loss
            else:
                logits = student(input_ids=ids, use_cache=False).logits
                loss = counted_loss(logits, targets, shape if given is not None else PLAIN, given).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()

    return step


if __name__ == "__main__":
    main()
