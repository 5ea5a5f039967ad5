"""A sweep of short training runs: the plan a person writes, the grid of runs it means, and where each is evaluated.

Every run continues the pre-training of a base model of N parameters on D tokens, a share r of them from a domain. The
runs with r = 0 read general text alone, so one such run serves all domains.
"""

import math
from collections.abc import Sequence

from cptquant.core.artifact import Frozen
from cptquant.core.errors import UserError

LEAST_TOKENS = 10_000
"""Fewest tokens of an evaluation point: what `cptquant law` takes for a number of tokens at all."""
GENERAL = "general"
"""Name of the corpus that every mixture has; no domain may be called so."""


class SizeSpec(Frozen):
    """One rung of the ladder: either a shape (hidden and layers, or parameters of the blocks) or an existing model.

    Attributes:
        name: stands in the ids of runs. parameters: of the blocks, without embedding; hidden and layers are chosen.
        path: folder of a model that is continued as it is.
    """

    name: str
    hidden: int | None = None
    layers: int | None = None
    parameters: int | None = None
    path: str | None = None


EMBEDDED = "embedded"
"""Spelling of the text that comes with the package, in place of files."""


class CorpusSpec(Frozen):
    """Text of one corpus: files to learn from and a held-out one, which is dealt to validation and test."""

    train: tuple[str, ...]
    valid: str

    @property
    def is_embedded(self) -> bool:
        """Whether it is the text that comes with the package."""
        return self.valid == EMBEDDED


class PretrainSpec(Frozen):
    """How a rung without a folder of its own comes to be: trained from scratch on the general text."""

    tokens: int
    learning_rate: float = 2e-3


class EvaluationSpec(Frozen):
    """Where runs are evaluated: `count` points from `first` tokens to the last, dense early (see `point_tokens`)."""

    count: int = 5
    first: int = 100_000
    decay: float = 3.0
    windows: int = 64


class SweepPlan(Frozen):
    """What `cptquant sweep` was asked for; every field is a key of plan.yaml.

    Attributes:
        family: model whose architecture and tokenizer the rungs share. ratios: shares of domain tokens.
        tokens: D of the last evaluation point. window, batch: tokens of a window, windows of a step.
        warm_up: steps. anneal: share of D in which the rate falls to zero. max_epochs: passes over a source.
        quantize: code bits at which each run's first and last annealed models are quantized too, `group` columns
            sharing a scale.
        threads, gpus: of one task. attempts: how often a task is begun whose worker dies.
    """

    family: str
    sizes: tuple[SizeSpec, ...]
    pretrain: PretrainSpec | None
    general: CorpusSpec
    domains: dict[str, CorpusSpec]
    ratios: tuple[float, ...]
    tokens: int
    seeds: tuple[int, ...] = (0,)
    window: int = 128
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 10
    anneal: float = 0.2
    weight_decay: float = 0.1
    evaluations: EvaluationSpec = EvaluationSpec()
    max_epochs: float = 4.0
    quantize: tuple[int, ...] = ()
    group: int = 64
    threads: int = 1
    gpus: int = 0
    attempts: int = 3

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.window * self.batch

    @property
    def corpora(self) -> dict[str, CorpusSpec]:
        """General text and domains by name."""
        return {GENERAL: self.general, **self.domains}


class SweepRun(Frozen):
    """One run of the grid.

    Attributes:
        id: stable: the same for the same size, domain, share and seed in any plan.
        domain: whose text is mixed in; "" where r = 0. judged: domains on which it is evaluated.
    """

    id: str
    size: str
    domain: str
    ratio: float
    seed: int
    judged: tuple[str, ...]


class EvaluationPoint(Frozen):
    """One evaluation: the trunk up to `branch_step`, then an anneal of its own up to `last_step`.

    Attributes:
        tokens: D, of both parts. branch_step, last_step: optimizer steps done when the branch leaves, when it ends.
    """

    tokens: int
    branch_step: int
    last_step: int

    @property
    def annealed(self) -> bool:
        """Whether the rate falls before it; early looks are taken on the trunk itself."""
        return self.last_step > self.branch_step


def make_grid(plan: SweepPlan) -> tuple[SweepRun, ...]:
    """All runs: by size, then share, domain and seed, in the order of the plan."""
    runs: list[SweepRun] = []
    for size in plan.sizes:
        for ratio in plan.ratios:
            for domain in [""] if ratio == 0 else list(plan.domains):
                for seed in plan.seeds:
                    judged = tuple(plan.domains) if ratio == 0 else (domain,)
                    name = f"{domain or GENERAL}-{size.name}-r{ratio:g}-s{seed}"
                    runs.append(SweepRun(id=name, size=size.name, domain=domain, ratio=ratio, seed=seed, judged=judged))
    return tuple(runs)


def point_tokens(first: int, last: int, count: int, decay: float) -> list[float]:
    """Tokens of the evaluation points: their density along the run falls as exp(-decay * position).

    Position 0 is `first`, 1 is `last`; both are points. Losses move most at the beginning, so that is where a law
    needs points (arXiv 2406.01375 compares samplings and finds an exponentially decaying frequency the best trade).
    decay = 0 spaces them evenly.
    """
    if count == 1:
        return [float(last)]
    places = [index / (count - 1) for index in range(count)]
    if decay > 0:
        places = [-math.log1p(-place * -math.expm1(-decay)) / decay for place in places]
    return [first + place * (last - first) for place in places]


def evaluation_points(plan: SweepPlan) -> tuple[EvaluationPoint, ...]:
    """The points in whole steps; every one leaves the trunk no earlier than the one before.

    Raises:
        UserError: two points fall on one step, or one has no step left for its anneal.
    """
    spec = plan.evaluations
    wanted = point_tokens(spec.first, plan.tokens, spec.count, spec.decay)
    return steps_of(plan, [max(1, round(tokens / plan.step_tokens)) for tokens in wanted])


def steps_of(plan: SweepPlan, last_steps: Sequence[int]) -> tuple[EvaluationPoint, ...]:
    """Points that end after these optimizer steps.

    Raises:
        UserError: two end on one step, or one has no step left for its anneal.
    """
    points: list[EvaluationPoint] = []
    for last in last_steps:
        annealed = max(1, round(plan.anneal * last))
        if points and last <= points[-1].last_step:
            raise UserError(
                f"evaluations: two of the points fall on step {last} ({plan.step_tokens:,} tokens a step); ask for "
                "fewer (evaluations.count), a smaller decay, or smaller steps (batch, window)"
            )
        if last - annealed < 1:
            raise UserError(
                f"evaluations.first: {last * plan.step_tokens:,} tokens are {last} optimizer step(s), too few for a "
                "trunk and an anneal; begin later, or make steps smaller (batch, window)"
            )
        points.append(EvaluationPoint(tokens=last * plan.step_tokens, branch_step=last - annealed, last_step=last))
    return tuple(points)


def trained_tokens(plan: SweepPlan, points: Sequence[EvaluationPoint]) -> int:
    """Tokens a run reads in all: the trunk up to its last branch, and every anneal."""
    anneals = sum(point.last_step - point.branch_step for point in points)
    return plan.step_tokens * (points[-1].branch_step + anneals)


def learning_rate(step: int, peak: float, warm_up: int, branch_step: int | None = None, last_step: int = 0) -> float:
    """Rate of step 0, 1, ...: linear warm-up, constant; on a branch linear to zero over its steps.

    The rate of the last step of a branch is peak / (steps of the branch + 1), not 0: a step with rate 0 is none.
    """
    rate = peak * min(1.0, (step + 1) / max(1, warm_up))
    if branch_step is not None and step >= branch_step:
        rate *= (last_step - step) / (last_step - branch_step + 1)
    return rate


def parse_tokens(text: str | int | float) -> int | None:
    """`2M`, `500k`, `1.5e6`, `1B` or a number -> tokens; None where it is none, or below one."""
    if isinstance(text, bool):
        return None
    factor, digits = 1.0, text
    if isinstance(text, str):
        spelled = text.strip().replace("_", "").replace(",", "")
        unit = spelled[-1:].lower()
        factor = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}.get(unit, 1.0)
        digits = spelled[:-1] if factor > 1 else spelled
    try:
        value = float(digits) * factor
    except ValueError:
        return None
    return round(value) if math.isfinite(value) and 1 <= value < 1e17 else None
