"""Everything of a sweep that can be known, checked and counted before compute is spent: ladder, texts, tasks, cost."""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cptquant.adaptation.ladder import Rung, build_ladder, load_trainable, new_model
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.sources import SourceDocument, embedded_documents, read_documents
from cptquant.adaptation.token_files import TokenSource, tokenise_once
from cptquant.adaptation.trunk import Trunk, TrunkSettings
from cptquant.core.artifact import digest_json
from cptquant.core.errors import DataError, UserError
from cptquant.core.sweep import (
    GENERAL,
    LEAST_TOKENS,
    CorpusSpec,
    EvaluationPoint,
    SweepPlan,
    SweepRun,
    evaluation_points,
    make_grid,
    steps_of,
    trained_tokens,
)
from cptquant.models.arithmetic import describe_arithmetic
from cptquant.models.load import load_model, read_layout
from cptquant.models.text import MINIMUM_EVALUATION_SEQUENCES, TokenSet, read_texts, tokenize
from cptquant.stages.sweep_task import SweepTask, TrainingSpec, save_windows
from cptquant.stages.task_pool import Task

_FLOPS = 6
_TIMED_STEPS, _UNTIMED_STEPS = 2, 1
_EARLY_SHARE = 0.01
_JUDGED_STEP = 0.4
"""Time of judging some tokens over that of training on them: forward only, but float32."""
_PRETRAIN_ANNEAL = 0.2
_SPREAD = 64
"""Held-out windows are spread evenly over this many times the tokens needed, so that many places have a say."""


@dataclass(frozen=True)
class Texts:
    """Tokenised corpora and their held-out windows, by name of the corpus."""

    sources: dict[str, TokenSource]
    held: dict[str, TokenSet]


@dataclass(frozen=True)
class Cost:
    """What a task costs: training tokens, FLOPs (6 N D) and seconds on one worker."""

    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Setup:
    """A sweep that is ready to begin.

    Attributes:
        step_seconds: of each size, by name. tasks: base models first. costs: by id of the task.
        bases: (size, seed) -> its task. runs: run id -> its task.
    """

    plan: SweepPlan
    ladder: tuple[Rung, ...]
    grid: tuple[SweepRun, ...]
    texts: Texts
    step_seconds: dict[str, float]
    bases: dict[tuple[str, int], SweepTask]
    runs: dict[str, SweepTask]
    costs: dict[str, Cost]

    @property
    def tasks(self) -> tuple[Task[SweepTask], ...]:
        """All tasks with what they wait for."""
        found = [Task(task.id, task, (), self.costs[task.id].seconds) for task in self.bases.values()]
        for run in self.grid:
            task = self.runs[run.id]
            needs = (self.bases[run.size, run.seed].id,)
            found.append(Task(task.id, task, needs, self.costs[task.id].seconds))
        return tuple(found)


def set_up(plan: SweepPlan, output: Path, known_steps: dict[str, float] | None = None) -> Setup:
    """Read, tokenise, check, time a step of each size, and lay out the tasks; nothing is written.

    Args:
        known_steps: size -> seconds of a step, where they were timed before.

    Raises:
        UserError: whatever makes the sweep impossible: texts that are missing, tiny or repeated too often, sizes that
            do not belong together, windows longer than the model's positions.
    """
    ladder = build_ladder(plan.family, plan.sizes)
    texts = read_corpora(plan, _text_folder(output))
    grid, points = make_grid(plan), evaluation_points(plan)
    _check_epochs(plan, grid, texts)
    seconds = {
        rung.name: (known_steps or {}).get(rung.name) or time_step(rung, plan, texts.sources[GENERAL])
        for rung in ladder
    }
    layout = _Layout(plan, output, texts)
    bases = {(rung.name, seed): layout.base(rung, seed) for rung in ladder for seed in plan.seeds}
    early = _early_run(plan, grid)
    runs = {run.id: layout.run(run, points, bases[run.size, run.seed], early=run.id in early) for run in grid}
    costs = {task.id: layout.cost(task, _rung(ladder, size), seconds[size]) for (size, _), task in bases.items()}
    costs |= {runs[run.id].id: layout.cost(runs[run.id], _rung(ladder, run.size), seconds[run.size]) for run in grid}
    return Setup(plan, ladder, grid, texts, seconds, bases, runs, costs)


def base_id(size: str, seed: int) -> str:
    """Name of the task that makes (or judges) a base model."""
    return f"base {size} seed {seed}"


def _rung(ladder: Sequence[Rung], name: str) -> Rung:
    return next(rung for rung in ladder if rung.name == name)


def _text_folder(output: Path) -> Path:
    """Where tokens go: to those of a sweep that has begun, else to a folder that ends with this process.

    It stands beside the output, since temporary folders can be in memory.
    """
    kept = output / "work/text"
    if kept.is_dir():
        return kept
    near = next((path for path in output.absolute().parents if path.is_dir()), None)
    near = near if near is not None and os.access(near, os.W_OK) else None
    scratch = tempfile.mkdtemp(prefix=".cptquant-text-", dir=near)
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)


def read_corpora(plan: SweepPlan, folder: Path) -> Texts:
    """Tokenise every corpus once, with the family's tokenizer.

    Args:
        folder: for tokens; those that stand are used again.

    Raises:
        DataError: missing, unreadable or tiny text; names the key of the plan.
    """
    model = load_model(plan.family)
    tokenizer = model.require_tokenizer()
    most = model.layout.max_positions
    if most is not None and plan.window > most:
        raise UserError(f"window: {plan.window} tokens are more than the {most} positions of {plan.family}")
    sources: dict[str, TokenSource] = {}
    held: dict[str, TokenSet] = {}
    for name, corpus in plan.corpora.items():
        place = name if name == GENERAL else f"domains.{name}"
        train = f"{place}.train"
        source = tokenise_once(name, partial(read_corpus, corpus, train), tokenizer, folder, flag=train)
        if len(source.tokens) < LEAST_TOKENS:
            raise DataError(
                f"{train} holds {len(source.tokens):,} tokens; a law of its share needs at least {LEAST_TOKENS:,}: "
                "give more text"
            )
        sources[name] = source
        try:
            found = tokenize(
                read_texts(None if corpus.is_embedded else corpus.valid, "validation", "causal_lm"), model,
                sequences=_SPREAD * plan.evaluations.windows, length=plan.window, seed=0,
            )  # fmt: skip
        except DataError as error:
            raise DataError(
                str(error).replace("--eval-text", f"{place}.valid")
                + f" (a third of {place}.valid is used, in windows of {plan.window} tokens, at least "
                f"{MINIMUM_EVALUATION_SEQUENCES} of them; the rest is left for plans that are carried out)"
            ) from None
        taken = min(plan.evaluations.windows, found.sequence_count)
        held[name] = found.subset([index * found.sequence_count // taken for index in range(taken)])
    return Texts(sources, held)


def read_corpus(corpus: CorpusSpec, flag: str) -> Iterator[SourceDocument]:
    """Documents to learn from."""
    return embedded_documents() if corpus.is_embedded else read_documents(corpus.train, flag)


def _check_epochs(plan: SweepPlan, grid: Sequence[SweepRun], texts: Texts) -> None:
    """Refuse, with all the numbers, a plan that repeats a text too often.

    Raises:
        DataError: with the share that asks most.
    """
    asked = {run.domain: run.ratio for run in sorted(grid, key=lambda run: run.ratio) if run.domain}
    wanted = {name: (plan.tokens, share) for name, share in asked.items()}
    wanted[GENERAL] = (plan.tokens, 1 - min(plan.ratios))
    if plan.pretrain is not None and plan.pretrain.tokens > wanted[GENERAL][0] * wanted[GENERAL][1]:
        if any(size.path is None for size in plan.sizes):
            wanted[GENERAL] = (plan.pretrain.tokens, 1.0)
    for name, (tokens, share) in wanted.items():
        held = len(texts.sources[name].tokens) // plan.window * plan.window
        epochs = tokens * share / held
        if epochs > plan.max_epochs * (1 + plan.step_tokens / max(tokens, 1)):
            place = name if name == GENERAL else f"domains.{name}"
            key = "pretrain.tokens" if name == GENERAL and tokens != plan.tokens else "tokens"
            raise DataError(
                f"{place}.train holds {held:,} tokens in whole windows, and {key} = {tokens:,} at a share of {share:g} "
                f"reads {tokens * share:,.0f}: {epochs:.1f} epochs, above max_epochs = {plan.max_epochs:g}; give more "
                f"text, fewer {key}, or a larger max_epochs"
            )


def _early_run(plan: SweepPlan, grid: Sequence[SweepRun]) -> set[str]:
    """One run a domain that is looked at early: the middle size, the share nearest to a half, the first seed.

    So the features of domains differ in the domain alone, as the cross-domain law wants them.
    """
    size = plan.sizes[(len(plan.sizes) - 1) // 2].name
    ratio = min((ratio for ratio in plan.ratios if ratio > 0), key=lambda each: (abs(each - 0.5), each))
    return {run.id for run in grid if (run.size, run.ratio, run.seed) == (size, ratio, plan.seeds[0]) and run.domain}


def early_looks(plan: SweepPlan, points: Sequence[EvaluationPoint]) -> tuple[EvaluationPoint, ...]:
    """Two looks at the trunk, the later after 1% of the steps, but no earlier than twice the warm-up.

    None where the first evaluation comes as early.
    """
    early = max(2, round(_EARLY_SHARE * points[-1].last_step), 2 * plan.warm_up)
    if early >= points[0].branch_step:
        return ()
    return tuple(
        EvaluationPoint(tokens=step * plan.step_tokens, branch_step=step, last_step=step)
        for step in (max(1, early // 2), early)
    )


def time_step(rung: Rung, plan: SweepPlan, source: TokenSource) -> float:
    """Seconds of one training step of a size, the fastest of a few, on this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        model: Any = new_model(rung, 0).eval() if rung.path is None else load_trainable(rung.path).module
        model.to("cuda" if plan.gpus and torch.cuda.is_available() else "cpu")
        steps = _UNTIMED_STEPS + _TIMED_STEPS
        mixture = Mixture(
            [source], [1.0], window_tokens=plan.window, total_tokens=steps * plan.step_tokens, seed=0, max_epochs=1e9
        )
        trunk = Trunk(model, mixture, TrunkSettings(plan.batch, plan.learning_rate, plan.warm_up, plan.weight_decay))
        trunk.run_to(_UNTIMED_STEPS)
        timed: list[float] = []
        for _ in range(_TIMED_STEPS):
            began = time.perf_counter()
            trunk.run_to(trunk.step + 1)
            timed.append(time.perf_counter() - began)
        return min(timed)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Layout:
    """Where tasks keep their files: folders named after everything they depend on, so that a changed plan does anew
    what it changes and nothing else."""

    plan: SweepPlan
    output: Path
    texts: Texts

    def source_path(self, name: str) -> Path:
        folder = self.texts.sources[name].folder
        assert folder is not None
        return self.output / "work/text" / folder.name

    def held_path(self, name: str) -> Path:
        return self.output / "work/text" / f"{name}-held-{self.texts.held[name].digest[:12]}.npz"

    def save_texts(self) -> None:
        for name in self.texts.sources:
            if not self.source_path(name).is_dir():
                shutil.move(str(self.texts.sources[name].folder), self.source_path(name))
            if not self.held_path(name).is_file():
                save_windows(self.texts.held[name], self.held_path(name))

    def base(self, rung: Rung, seed: int) -> SweepTask:
        plan, name = self.plan, f"{rung.name}-s{seed}"
        judged = {each: str(self.held_path(each)) for each in self.texts.held}
        if rung.path is not None:
            model_key = self._key([read_layout(rung.path).source_digest])
            folder = self.output / "work" / f"base-{name}-{self._key([model_key, *sorted(judged.values())])}"
            return SweepTask(
                kind="base", id=base_id(rung.name, seed), folder=str(folder), model=rung.path, model_key=model_key,
                judged=judged, threads=plan.threads, gpus=min(plan.gpus, 1),
            )  # fmt: skip
        assert plan.pretrain is not None
        last = max(2, round(plan.pretrain.tokens / plan.step_tokens))
        annealed = max(1, round(_PRETRAIN_ANNEAL * last))
        training = TrainingSpec(
            sources={GENERAL: str(self.source_path(GENERAL))}, shares={GENERAL: 1.0}, window=plan.window,
            batch=plan.batch, tokens=last * plan.step_tokens, max_epochs=plan.max_epochs * 1.01,
            points=(
                EvaluationPoint(tokens=last * plan.step_tokens, branch_step=last - annealed, last_step=last),
            ),
            peak_rate=plan.pretrain.learning_rate, warm_up=max(plan.warm_up, last // 50),
            weight_decay=plan.weight_decay, seed=seed, save_steps=max(1, last // 10),
        )  # fmt: skip
        spec = training.model_dump(mode="json", exclude={"sources"})
        model_key = self._key([rung.config, spec, *self._texts(training)])
        folder = self.output / "work" / f"base-{name}-{self._key([model_key, *sorted(judged.values())])}"
        return SweepTask(
            kind="base", id=base_id(rung.name, seed), folder=str(folder), model_key=model_key,
            model=str(self.output / "models" / f"{name}-{model_key}"), judged=judged, training=training,
            rung=asdict(rung), family=self.plan.family, threads=plan.threads, gpus=plan.gpus,
        )  # fmt: skip

    def run(
        self, run: SweepRun, points: Sequence[EvaluationPoint], base: SweepTask, *, early: bool
    ) -> SweepTask:  # fmt: skip
        plan = self.plan
        shares = {GENERAL: 1 - run.ratio, **({run.domain: run.ratio} if run.domain else {})}
        training = TrainingSpec(
            sources={name: str(self.source_path(name)) for name, share in shares.items() if share > 0},
            shares={name: share for name, share in shares.items() if share > 0}, window=plan.window, batch=plan.batch,
            tokens=points[-1].last_step * plan.step_tokens, max_epochs=plan.max_epochs * 1.01,
            points=(*(early_looks(plan, points) if early else ()), *points), peak_rate=plan.learning_rate,
            warm_up=plan.warm_up, weight_decay=plan.weight_decay, seed=run.seed,
        )  # fmt: skip
        judged = {name: str(self.held_path(name)) for name in (GENERAL, *run.judged)}
        key = self._key(
            [
                base.model_key, training.model_dump(mode="json", exclude={"sources"}),
                *self._texts(training), *sorted(judged.values()), list(plan.quantize), plan.group,
            ]
        )  # fmt: skip
        return SweepTask(
            kind="run", id=run.id, folder=str(self.output / "work" / f"{run.id}-{key}"), model=base.model,
            model_key=base.model_key, judged=judged,
            training=training, quantize=plan.quantize, group=plan.group, threads=plan.threads, gpus=plan.gpus,
        )  # fmt: skip

    def cost(self, task: SweepTask, rung: Rung, step_seconds: float) -> Cost:
        spec, plan = task.training, self.plan
        judged = len(task.judged) * plan.evaluations.windows * plan.window
        points = 1 if spec is None else len(spec.points)
        tokens = 0 if spec is None else trained_tokens(plan, spec.points)
        per_token = step_seconds / plan.step_tokens
        seconds = per_token * (tokens + _JUDGED_STEP * judged * points)
        quantized = len(task.quantize) * min(2, sum(point.annealed for point in spec.points)) if spec else 0
        seconds += per_token * quantized * (judged + 64 * plan.window)  # GPTQ's passes and one more judgement
        return Cost(tokens, _FLOPS * rung.parameters * float(tokens), seconds)

    def _texts(self, training: TrainingSpec) -> list[str]:
        return [self.texts.sources[name].digest for name in sorted(training.sources)]

    def _key(self, parts: list[object]) -> str:
        names = [part.rpartition("/")[2] if isinstance(part, str) else part for part in parts]
        return digest_json([*names, describe_arithmetic(coarse=True)])[:12]


def save_texts(setup: Setup, output: Path) -> None:
    """Write what the workers read."""
    (output / "work/text").mkdir(parents=True, exist_ok=True)
    _Layout(setup.plan, output, setup.texts).save_texts()


def fixed_points(plan: SweepPlan, tokens: int) -> tuple[EvaluationPoint, ...]:
    """The one point of a run that is made to have its model: D tokens, in whole steps."""
    return steps_of(plan, [max(2, round(tokens / plan.step_tokens))])
