"""plan.json -> a better plan.json of no more bytes: swaps between sites, judged on the KL of the whole quantized model.

The knapsack's plan is quantized first (and kept, as plan-unrefined.json, for the guard); every site's neighbouring
formats are quantized beside it; `allocation.swaps` then searches. All of it reads calibration text only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cptquant.allocation.allocate import solve_problem, source_digests
from cptquant.allocation.choices import build_problem
from cptquant.allocation.price import chosen_option
from cptquant.allocation.problem import Choice, Problem, Solution
from cptquant.allocation.swaps import Refined, SwapSearch
from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.refinement import Refinement, SwapRound
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import find_target
from cptquant.models.load import LoadedModel
from cptquant.models.stream import WeightSource
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.alternatives import Alternatives, quantize_alternatives
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.methods import find_quantizer, first_pass
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.signround import SignRound
from cptquant.sensitivity.perturbation import original_weight
from cptquant.sensitivity.plan_loss import Change, PlanLoss
from cptquant.stages.allocate import UNREFINED, allocate_stage
from cptquant.stages.own_text import settle_own_text
from cptquant.stages.quantize import Work, quantize_stage
from cptquant.stages.run import Run

_MINIMUM_SEQUENCES = 16


@dataclass(frozen=True)
class QuantizedPlan:
    """A plan that was carried out, and how: what a search starts from.

    Attributes:
        weights: of the plan, by `quantizer` on `tokens`.
    """

    plan: Plan
    weights: WeightSource
    quantizer: Gptq | Rtn
    tokens: TokenSet


class SwapJudge:
    """The `Judge` of a search: KL per sequence of the start with other formats at some sites.

    Args:
        start: one option index a group. alternatives: weights of every option that the search may choose.
    """

    def __init__(
        self, model: LoadedModel, problem: Problem, start: Choice, alternatives: Alternatives, loss: PlanLoss
    ) -> None:
        self._model, self._problem, self._start = model, problem, tuple(start)
        self._alternatives, self._loss = alternatives, loss

    @property
    def sequence_count(self) -> int:
        """Calibration sequences."""
        return self._loss.sequence_count

    def __call__(self, choices: Sequence[Choice], sequences: Sequence[int]) -> NDArray[np.float64]:
        """KL in nats per scored token, (choices, sequences)."""
        return self._loss.losses([self._change(choice) for choice in choices], sequences)

    def _change(self, choice: Choice) -> Change:
        changes: dict[str, Tensor | StoredWeight] = {}
        for group, before, after in zip(self._problem.groups, self._start, choice, strict=True):
            if before == after:
                continue
            for site, fmt in zip(group.sites, group.options[after].formats, strict=True):
                stored = self._alternatives.get(site.name, {}).get(fmt.name)
                changes[site.name] = original_weight(self._model, site) if stored is None else stored
        return changes


def search_swaps(
    model: LoadedModel,
    problem: Problem,
    start: QuantizedPlan,
    search: SwapSearch,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Refined:
    """Quantize what the search may choose, and search.

    Args:
        problem: of the plan, with its limit. progress: told (stage, done, in all).

    Raises:
        UserError: a bare encoder, groups of mixed width, too little calibration text.
    """
    choice = [chosen_option(group, start.plan) for group in problem.groups]
    wanted = _formats_to_make(problem, choice, search.reachable(problem, choice))
    loss = PlanLoss(model, start.weights, start.tokens)
    alternatives = quantize_alternatives(
        model, start.weights, wanted, start.quantizer, start.tokens,
        progress=None if progress is None else lambda done, total: progress("quantize neighbours", done, total),
    )  # fmt: skip
    judge = SwapJudge(model, problem, choice, alternatives, loss)
    return search(
        problem, choice, judge, seed=seed,
        progress=None if progress is None else lambda done, total: progress("swaps", done, total),
    )  # fmt: skip


def _formats_to_make(
    problem: Problem, start: Choice, reachable: Sequence[Sequence[int]]
) -> Mapping[str, list[QuantFormat]]:
    wanted: dict[str, list[QuantFormat]] = {}
    for group, own, options in zip(problem.groups, start, reachable, strict=True):
        for option in options:
            if option != own:
                for site, fmt in zip(group.sites, group.options[option].formats, strict=True):
                    wanted.setdefault(site.name, []).append(fmt)
    return {name: list(dict.fromkeys(row)) for name, row in wanted.items()}


def plan_stage(run: Run, layout: ModelLayout, table: SensitivityTable | None) -> Plan:
    """sensitivity.json -> plan.json: the allocator's plan, with swaps where `--refine-swaps` asks for them.

    With swaps the allocator's own plan stands in plan-unrefined.json; the guard compares both on validation text. The
    search is kept in refinement.json.

    Raises:
        UserError: no table, a bare encoder, groups of mixed width, or too little calibration text. As `allocate_stage`.
    """
    if not run.settings.refine_swaps:
        for name in (UNREFINED, "refinement.json"):
            (run.folder / name).unlink(missing_ok=True)
        return allocate_stage(run, layout, table)
    if table is None:
        raise UserError(
            f"--refine-swaps orders formats by a sensitivity table, and --allocator {run.settings.allocator} makes a "
            "plan without one; use --allocator knapsack, or leave --refine-swaps out"
        )
    if run.calibration.sequence_count < _MINIMUM_SEQUENCES:
        raise UserError(
            f"--refine-swaps needs {_MINIMUM_SEQUENCES} calibration sequences or more, half of them to judge the last "
            f"swaps on, and there are {run.calibration.sequence_count}; raise --calibration-sequences"
        )
    settle_own_text(run)
    plan = allocate_stage(run, layout, table, UNREFINED)
    target = find_target(plan.target)
    problem = build_problem(layout, table, target, run.settings.formats_for(layout), plan.budget_scope)
    problem = problem.with_limit(plan.limit_bytes, plan.budget)
    refinement = _refinement(run, layout, problem, plan)
    formats = plan.model_copy(update={"formats": refinement.formats})
    given = _Given(tuple(chosen_option(group, formats) for group in problem.groups))
    made = solve_problem(problem, target, given, sources=source_digests(layout, table), seed=run.settings.seed)
    made = made.model_copy(update={"allocator": plan.allocator, "notes": (refinement.sentence, *made.notes)})
    return run.stage("plan.json", Plan, {**plan.inputs, "refinement": refinement.digest()}, lambda: made, edited=True)


@dataclass(frozen=True)
class _Given:
    """An allocator that has chosen already."""

    name: ClassVar[str] = "swaps"
    needs_table: ClassVar[bool] = True
    choice: tuple[int, ...]

    def __call__(self, problem: Problem, *, seed: int) -> Solution:
        return Solution(self.choice, SolverStatus.HEURISTIC)


def _refinement(run: Run, layout: ModelLayout, problem: Problem, plan: Plan) -> Refinement:
    """refinement.json."""
    settings = run.settings
    search = SwapSearch(rounds=settings.refine_swaps)
    quantizer, tokens = first_pass(find_quantizer(settings.quantizer_for(layout)), run.quantizer_text)
    if isinstance(quantizer, SignRound):
        quantizer = quantizer.first
    assert isinstance(quantizer, Gptq | Rtn)
    inputs = {
        "plan": plan.digest(),
        "tokens": tokens.digest,
        "quantizer": repr(quantizer),
        "search": repr(search),
        "seed": str(settings.seed),
    }

    def make() -> Refinement:
        shards = quantize_stage(run, layout, plan, "unrefined", work=Work(quantizer, tokens))
        start = QuantizedPlan(plan, shards, quantizer, tokens)
        refined = search_swaps(run.model, problem, start, search, seed=settings.seed, progress=run.progress)
        rounds, choice = list[SwapRound](), tuple(chosen_option(group, plan) for group in problem.groups)
        for found in refined.rounds:
            after = choice if found.move is None else found.move.apply(choice)
            changed = {} if found.move is None else _changed(problem, choice, after)
            rounds.append(
                SwapRound(
                    steps=found.step_count, moves=found.move_count, passes=found.passes,
                    before={name: formats[0].name for name, formats in changed.items()},
                    after={name: formats[1].name for name, formats in changed.items()},
                    expected=0.0 if found.move is None else found.move.expected,
                    difference=found.difference, stderr=found.stderr, sequences=found.sequence_count, taken=found.taken,
                )
            )  # fmt: skip
            choice = after if found.taken else choice
        return Refinement(
            search=repr(search),
            text=tokens.description,
            unit="nats/token" if layout.task != "sequence_classification" else "nats/example",
            rounds=tuple(rounds),
            formats={name: fmt.name for name, fmt in problem.formats(refined.choice).items()},
        )

    return run.stage("refinement.json", Refinement, inputs, make, damage=lambda found: _contradictions(found, plan))


def _contradictions(found: Refinement, plan: Plan) -> list[str]:
    formats = dict(plan.formats)
    for swaps in found.rounds:
        formats.update(swaps.after if swaps.taken else {})
    return [] if formats == found.formats else ["refinement.json holds another plan than its rounds lead to"]


def _changed(problem: Problem, before: Choice, after: Choice) -> dict[str, tuple[QuantFormat, QuantFormat]]:
    old, new = problem.formats(before), problem.formats(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}
