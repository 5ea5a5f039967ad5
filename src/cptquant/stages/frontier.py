"""One measurement, the plan of every budget: sensitivity.json -> frontier.json, some points of it really quantized."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cptquant.allocation.allocate import allocate
from cptquant.allocation.choices import build_problem
from cptquant.allocation.frontier import trace_vertices
from cptquant.allocation.knapsack import Knapsack
from cptquant.allocation.problem import Problem
from cptquant.allocation.reach import check_budget
from cptquant.core.artifact import digest_json, output_error
from cptquant.core.budget import Budget
from cptquant.core.engine_memory import find_context
from cptquant.core.errors import ArtifactError, BudgetError, UserError
from cptquant.core.evaluation import DAMAGE_NAMES, EvaluationReport
from cptquant.core.frontier import BandPrior, BudgetPoint, DamageCalibration, Frontier, MeasuredLoss
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.settings import RunSettings
from cptquant.core.targets import find_target
from cptquant.evaluation.evaluate import evaluate
from cptquant.evaluation.scored_text import evaluation_settings
from cptquant.exporters.export import find_exporter
from cptquant.laws.frontier_band import calibrate
from cptquant.packing.shards import ShardFolder
from cptquant.reports.frontier import write_frontier_page
from cptquant.stages.calibration import choose_prior, prior_or_vague
from cptquant.stages.check import check_choices, check_target
from cptquant.stages.frontier_budgets import Scope, read_budgets, spread_budgets
from cptquant.stages.inspect import inspect_stage
from cptquant.stages.measure import measure_stage
from cptquant.stages.own_text import settle_own_text
from cptquant.stages.quantize import quantize_stage
from cptquant.stages.run import Run

FOLDER = "frontier"
DEFAULT_POINTS = 5
_EVALUATED_TOGETHER = 4
"""Models judged in one pass beside the original: bounds memory, shares the original's pass."""


@dataclass(frozen=True)
class FrontierRequest:
    """What `cptquant frontier` was asked for.

    Attributes:
        budgets: as written, all of one scope; empty for `points` budgets spread over the frontier.
        points: how many; None for the default. measure: how many are really quantized; None for the default.
        scope: what spread budgets count; None for the whole file, or what the budgets say.
    """

    budgets: tuple[str, ...] = ()
    points: int | None = None
    measure: int | None = None
    scope: Scope | None = None

    def check(self) -> tuple[Budget, ...]:
        """The budgets, parsed; empty where they are to be spread.

        Raises:
            UserError: flags that contradict each other, or numbers out of range. BudgetError: unreadable budgets.
        """
        if self.budgets and self.points is not None:
            raise UserError(
                f"--budgets and --points {self.points} were both given; name the budgets, or say how many to spread"
            )
        if self.points is not None and self.points < 2:
            raise UserError(f"--points {self.points} is too few for a frontier; give 2 or more")
        if self.scope not in (None, "file", "sites"):
            raise UserError(f"--scope {self.scope!r} is unknown; choose one of: file, sites")
        count = len(set(self.budgets)) or self.points or DEFAULT_POINTS
        if self.measure is not None and not 0 <= self.measure <= count:
            raise UserError(
                f"--measure {self.measure} must be 0 to {count}, the number of points; raise --points, or name more "
                "--budgets"
            )
        budgets = read_budgets(self.budgets)
        if budgets and self.scope not in (None, budgets[0].scope):
            raise UserError(
                f"--scope {self.scope} contradicts --budgets {budgets[0].text}, which counts "
                f"{'the whole file' if budgets[0].scope == 'file' else 'the sites'}; leave --scope out"
            )
        return budgets

    def measured_count(self, points: int) -> int:
        """How many of so many points are quantized."""
        return min(points, DEFAULT_POINTS if self.measure is None else self.measure)


def frontier_model(
    model: str,
    output: Path | None,
    request: FrontierRequest | None = None,
    progress: Progress = ignore_progress,
    **choices: object,
) -> Frontier:
    """Trace the whole frontier of a model from one sensitivity table, and measure some of its points.

    Args:
        model: local folder, hub id or `embedded:NAME`; or a run folder, whose table is used where it still fits.
        output: run folder; None where `model` is one. Finished stages in it are not run again.
        choices: fields of `RunSettings`.

    Returns:
        The content of frontier.json; frontier.html stands beside it, the plans of the points in frontier/.

    Raises:
        UserError: anything the caller can change, before compute is spent where that can be known.
    """
    request = request or FrontierRequest()
    budgets = request.check()
    run = _open(model, output, progress, choices)
    layout = inspect_stage(run)
    check_target(layout, run.settings.target)
    for budget in budgets:
        check_budget(layout, budget, find_target(run.settings.target), run.settings.formats_for(layout))
    run.settings.own_text_for(layout)
    _ = run.calibration, run.test  # text that is too short is refused before compute is spent
    if request.measured_count(len(budgets) or request.points or DEFAULT_POINTS):
        find_exporter(run.settings.target).check(run.model, find_context(layout, run.settings.context))
    run.keep_settings()
    settle_own_text(run)
    table = measure_stage(run, layout)
    frontier = _trace(run, layout, table, request, budgets)
    write_frontier_page(run.folder / "frontier.html", frontier)
    return frontier


def _open(model: str, output: Path | None, progress: Progress, choices: Mapping[str, object]) -> Run:
    """The run folder: given as the model, or an earlier run of the same model, whose settings stay, or a new one."""
    if (Path(model) / "settings.json").is_file():
        if output is not None:
            raise UserError(f"--output {output}: {model} is a run folder and gets the frontier; leave it out")
        settings, folder = RunSettings.load(Path(model) / "settings.json"), Path(model)
    elif output is None:
        raise UserError("no output folder was given; add --output, e.g. --output runs/frontier")
    else:
        folder, path = output, output / "settings.json"
        settings = RunSettings.load(path) if path.is_file() else RunSettings.model_validate({"model": model})
        settings = settings.model_copy(update={"model": model})
    settings = RunSettings.model_validate({**settings.model_dump(exclude={"inputs", "provenance"}), **choices})
    check_choices(settings)
    return Run.start(folder, settings, progress, keep=False)


def _trace(
    run: Run, layout: ModelLayout, table: SensitivityTable, request: FrontierRequest, budgets: Sequence[Budget]
) -> Frontier:
    target, formats = find_target(run.settings.target), run.settings.formats_for(layout)
    scope: Scope = budgets[0].scope if budgets else request.scope or "file"
    problem = build_problem(layout, table, target, formats, scope)
    if not problem.groups:
        raise BudgetError(f"--scope {scope}: {layout.source} has no site in the scope of this frontier")
    chosen = budgets or spread_budgets(problem, request.points or DEFAULT_POINTS)
    plans = {budget.text: _plan(run, layout, table, budget) for budget in chosen}
    plans = dict(sorted(plans.items(), key=lambda item: item[1].size_bytes))
    places = _spread(len(plans), request.measured_count(len(plans)))
    measured = {name: plan for place, (name, plan) in enumerate(plans.items()) if place in places}
    losses = _measure(run, layout, measured)
    quantizer, used = run.settings.carried_out_with(layout), [plan.quant_formats for plan in plans.values()]
    prior = choose_prior(layout, table, quantizer, used)
    prior = prior_or_vague(prior, [_damage(plan) for plan in plans.values()])
    inputs = {
        "layout": layout.digest(),
        "table": table.digest(),
        "plans": digest_json({name: digest_json(plan.formats) for name, plan in plans.items()}),
        "losses": digest_json({name: loss.model_dump(mode="json") for name, loss in losses.items()}),
        "prior": "" if prior is None else digest_json(prior.model_dump(mode="json")),
        "scope": scope,
        "target": target.name,
        "formats": ",".join(map(str, formats)),
        "tokens": run.test.digest,
        "quantizer": quantizer,
        "own_text": str(run.settings.own_text_for(layout)),
    }
    return run.stage(
        "frontier.json",
        Frontier,
        inputs,
        lambda: _assemble(run, problem, table, plans, losses, prior),
    )


def _plan(run: Run, layout: ModelLayout, table: SensitivityTable, budget: Budget) -> Plan:
    """frontier/plan-BUDGET.json: the exact knapsack's."""
    target, formats = find_target(run.settings.target), run.settings.formats_for(layout)
    inputs = {
        "layout": layout.digest(),
        "table": table.digest(),
        "budget": budget.text,
        "allocator": Knapsack.name,
        "target": target.name,
        "formats": ",".join(map(str, formats)),
        "seed": str(run.settings.seed),
    }
    try:
        (run.folder / FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise output_error(run.folder / FOLDER, error) from None
    return run.stage(
        plan_file(budget.text),
        Plan,
        inputs,
        lambda: allocate(layout, table, budget, target, Knapsack(), formats=formats, seed=run.settings.seed),
    )


def plan_file(budget: str) -> str:
    """Where the plan of a budget stands in the run folder."""
    return f"{FOLDER}/plan-{_label(budget)}.json"


def _label(budget: str) -> str:
    return re.sub(r"[^0-9A-Za-z.@]+", "-", budget.replace("%", "percent"))


def _spread(count: int, wanted: int) -> frozenset[int]:
    """`wanted` of `count` places, evenly, both ends among them; the middle if one is wanted."""
    if wanted < 2:
        return frozenset([count // 2] if wanted and count else [])
    return frozenset(round(index * (count - 1) / (wanted - 1)) for index in range(wanted))


def _measure(run: Run, layout: ModelLayout, plans: Mapping[str, Plan]) -> dict[str, MeasuredLoss]:
    """Quantize each plan as `quantize` would and judge it on held-out text; finished points are kept."""
    sources: dict[str, ShardFolder] = {}
    for done, (name, plan) in enumerate(plans.items()):
        run.progress("frontier: quantized", done, len(plans))
        manifest = f"{FOLDER}/manifest-{_label(name)}.json"
        sources[name] = quantize_stage(run, layout, plan, name, manifest=manifest)
    if plans:
        run.progress("frontier: quantized", len(plans), len(plans))
    found = {name: report for name, shards in sources.items() if (report := _evaluated(run, name, shards)) is not None}
    missing = [name for name in plans if name not in found]
    for start in range(0, len(missing), _EVALUATED_TOGETHER):
        batch = missing[start : start + _EVALUATED_TOGETHER]
        run.progress("frontier: measured", len(plans) - len(missing) + start, len(plans))
        measured = evaluate(run.model, {name: sources[name] for name in batch}, run.test, progress=run.progress)
        for name in batch:
            report = EvaluationReport(
                measurements=tuple(m for m in measured if m.subject in (name, "original")),
                settings=evaluation_settings(layout.task, run.test),
            )
            inputs = _evaluation_inputs(run, sources[name])
            found[name] = run.stage(_evaluation_file(name), EvaluationReport, inputs, lambda made=report: made)
    if plans:
        run.progress("frontier: measured", len(plans), len(plans))
    return {name: _loss(found[name], name, layout) for name in plans}


def _evaluation_file(name: str) -> str:
    return f"{FOLDER}/evaluation-{_label(name)}.json"


def _evaluation_inputs(run: Run, shards: ShardFolder) -> dict[str, str]:
    return {"tokens": run.test.digest, "pieces": shards.folder.name}


def _evaluated(run: Run, name: str, shards: ShardFolder) -> EvaluationReport | None:
    path = run.folder / _evaluation_file(name)
    try:
        report = EvaluationReport.load(path) if path.exists() else None
    except ArtifactError:
        return None  # measured again
    return report if report is not None and report.inputs == _evaluation_inputs(run, shards) else None


def _loss(report: EvaluationReport, name: str, layout: ModelLayout) -> MeasuredLoss:
    measurement = report.find(DAMAGE_NAMES[layout.task], name)
    assert measurement is not None  # every task measures its distance
    return MeasuredLoss(value=measurement.value, stderr=measurement.stderr, n=measurement.n)


def _damage(plan: Plan) -> float:
    assert plan.predicted_damage is not None  # the knapsack has a table
    return plan.predicted_damage


def _assemble(
    run: Run,
    problem: Problem,
    table: SensitivityTable,
    plans: Mapping[str, Plan],
    losses: Mapping[str, MeasuredLoss],
    prior: BandPrior | None,
) -> Frontier:
    layout = problem.layout
    calibration = _calibrated(plans, losses, prior)
    points: list[BudgetPoint] = []
    for name, plan in plans.items():
        others = {other: loss for other, loss in losses.items() if plans[other].formats != plan.formats}
        check = _calibrated(plans, others, prior) if name in losses and _damage(plan) > 0 else None
        points.append(
            BudgetPoint(
                budget=name,
                plan_file=plan_file(name),
                plan_digest=digest_json(plan.formats),
                size_bytes=plan.size_bytes,
                site_bytes=plan.site_bytes,
                bits_per_weight=plan.bits_per_weight,
                bits_per_weight_sites=plan.bits_per_weight_sites,
                damage=_damage(plan),
                predicted=None if calibration is None else calibration.predict(_damage(plan)),
                measured=losses.get(name),
                check=None if check is None else check.predict(_damage(plan)),
            )
        )
    return Frontier(
        model=run.settings.model,
        target=run.settings.target,
        scope=problem.scope,
        sensitivity_method=table.method,
        damage_unit=table.unit,
        measure=DAMAGE_NAMES[layout.task],
        quantizer=run.settings.carried_out_with(layout),
        text=run.test.description,
        formats=tuple(fmt.name for fmt in problem.requested),
        parameters=layout.parameters,
        block_weights=sum(site.weight_count for site in layout.block_sites),
        vertices=trace_vertices(problem, find_target(run.settings.target), calibration),
        points=tuple(points),
        calibration=calibration,
    )


def _calibrated(
    plans: Mapping[str, Plan], losses: Mapping[str, MeasuredLoss], prior: BandPrior | None
) -> DamageCalibration | None:
    if prior is None:
        return None
    once = {digest_json(plans[name].formats): name for name in losses}  # budgets of one plan are one measurement
    losses = {name: losses[name] for name in once.values()}
    return calibrate([_damage(plans[name]) for name in losses], [loss.value for loss in losses.values()], prior)
