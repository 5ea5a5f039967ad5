"""The main path: a model and a budget in, a smaller model that runs and a report out.

    inspect -> measure -> allocate -> predict -> quantize (plan and baselines) -> guard -> checkpoint -> evaluate
    -> report

Each step is a function in `stages/` that leaves a file in the run folder; this file is their order.
"""

from dataclasses import dataclass
from pathlib import Path

from cptquant.allocation.reach import check_budget
from cptquant.core.engine_export import ExportRecord
from cptquant.core.engine_memory import find_context
from cptquant.core.errors import ArtifactError
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import PtqForecast
from cptquant.core.joint import FLOAT_BITS, JointPlan, JointPoint
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.recovery import RecoveryRequest
from cptquant.core.settings import RunSettings
from cptquant.core.targets import find_target
from cptquant.exporters.export import find_exporter
from cptquant.models.processes import is_first
from cptquant.reports.html import render_report
from cptquant.stages.allocate import baseline_plans, check_plan, needs_table, unrefined_plan
from cptquant.stages.check import check_choices, check_target
from cptquant.stages.evaluate import evaluate_any, evaluate_stage, guard_stage
from cptquant.stages.export import ENGINE_TARGETS, export_stage, retarget
from cptquant.stages.inspect import inspect_stage
from cptquant.stages.joint_plan import PlanRequest, save_plan
from cptquant.stages.joint_run import adapt_point, judge_point, validation_text
from cptquant.stages.measure import measure_stage
from cptquant.stages.own_text import settle_own_text
from cptquant.stages.predict import forecast_stage
from cptquant.stages.quantize import Variant, quantize_stage, write_stage
from cptquant.stages.recover import check_request, follow_training, guard_measure, recover_stage
from cptquant.stages.recovery_pieces import adopt_parent, is_recovered, open_parent, recovered_variants, run_parent
from cptquant.stages.refine import plan_stage
from cptquant.stages.run import Run
from cptquant.stages.variants import quantize_variants
from cptquant.stages.written import check_run, drop_other_exports, written_plan


@dataclass(frozen=True)
class Result:
    """What `quantize` hands back; everything in it also stands as files in `folder`.

    Attributes:
        plan: of the weights that were written: the allocator's, or uniform bits where the guard preferred them.
        forecast: what was expected before quantizing; None if that was not asked for, or not a causal language model.
        exported: how the files compared in their engine; None for targets that stock transformers loads.
    """

    folder: Path
    layout: ModelLayout
    plan: Plan
    evaluation: EvaluationReport
    forecast: PtqForecast | None = None
    exported: ExportRecord | None = None

    @property
    def checkpoint(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "checkpoint"


def quantize_model(
    model: str, budget: str | None, output: Path, progress: Progress = ignore_progress, **choices: object
) -> Result:
    """Quantize a model under a budget: the whole chain.

    Args:
        model: local folder, hub id or `embedded:NAME`. budget: e.g. `4bpw`, `25%`, `3.25bpw@sites`; None with `memory`.
        output: run folder; stages that already stand there for the same inputs are not run again.
        choices: fields of `RunSettings`.

    Raises:
        UserError: anything the caller can change, before compute is spent where that can be known.
    """
    settings = RunSettings.model_validate({"model": model, "budget": budget, **choices})
    check_choices(settings)
    run = Run.start(output, settings, progress, keep=False)
    layout = inspect_stage(run)
    check_target(layout, settings.target)
    context = find_context(layout, settings.context)
    check_budget(layout, settings.budget_for(layout), find_target(settings.target), settings.formats_for(layout))
    run.read_all_text()
    find_exporter(settings.target).check(run.model, context)
    run.keep_settings()
    settle_own_text(run)
    table = measure_stage(run, layout) if needs_table(settings.allocator) else None
    plan_stage(run, layout, table)
    return _from_plan(run, layout)


def quantize_run(folder: Path, progress: Progress = ignore_progress, **changes: object) -> Result:
    """Go on from the plan.json of a run folder; the plan may have been edited.

    Raises:
        ArtifactError: no plan, or one that does not fit the model.
    """
    if is_recovered(folder):
        raise ArtifactError(
            f"{folder} was trained by cptquant recover, which quantizing again would undo; finish it with the command "
            f"that began it, or quantize its parent: cptquant quantize {run_parent(folder)}"
        )
    run = Run.resume(folder, progress, **changes)
    check_choices(run.settings)
    return _from_plan(run, run.load("layout.json", ModelLayout))


def recover_run(
    parent: Path, request: RecoveryRequest, output: Path, progress: Progress = ignore_progress, **changes: object
) -> Result | None:
    """Train the weights of a finished run further, and write them as a run of its own where that helped.

    Args:
        parent: run folder, not changed. request: how. output: new run folder; finished stages there are not run again.
        changes: fields of `RunSettings` for the evaluation.

    Returns:
        None in every process but the first, where several train together.

    Raises:
        UserError: anything the caller can change, before compute is spent where that can be known.
    """
    check_run(parent)
    check_request(request, parent, output)
    before = Run.look(parent, progress, **changes)
    origin = open_parent(before)
    if not is_first():
        follow_training(Run(output, before.settings), origin, request)
        return None
    run = Run.start(output, before.settings, progress)
    run.read_all_text()
    variants = {"quantized": recover_stage(run, origin, request), **adopt_parent(run, origin)}
    return _finish(run, origin.layout, variants, judged_by=guard_measure(request, origin.layout.task))


def _from_plan(run: Run, layout: ModelLayout) -> Result:
    plans = _plans(run, layout)
    settle_own_text(run)
    forecast = forecast_stage(run, layout, plans)
    return _finish(run, layout, quantize_variants(run, layout, plans), forecast)


def _finish(
    run: Run,
    layout: ModelLayout,
    variants: dict[str, Variant],
    forecast: PtqForecast | None = None,
    judged_by: str | None = None,
) -> Result:
    """Guard, checkpoint, evaluation, report, and the engine's files."""
    written, guard = guard_stage(run, variants, by=judged_by)
    write_stage(run, variants[written])
    drop_other_exports(run, variants[written].shards.folder.name)
    evaluation = evaluate_stage(run, layout, variants, written, guard)
    render_report(run.folder)
    target, exported = variants[written].plan.target, None
    if target in ENGINE_TARGETS:  # after the evaluation, which a refusal of the engine must not cost
        exported = export_stage(run, layout, variants[written], target)
        render_report(run.folder)
    return Result(run.folder, layout, variants[written].plan, evaluation, forecast, exported)


def _plans(run: Run, layout: ModelLayout) -> dict[str, Plan]:
    """The plan and its baselines at no more bytes."""
    plan = run.load("plan.json", Plan)
    check_plan(plan, layout)
    run.read_all_text()
    return {"quantized": plan, **unrefined_plan(run, plan), **baseline_plans(run, layout, plan)}


def export_run(
    folder: Path, target: str | None, progress: Progress = ignore_progress, **changes: object
) -> ExportRecord:
    """Write a quantized run for an engine and compare it there with our own model.

    Args:
        target: spelling of `--target`; None is the one the plan was made for.
        changes: fields of `RunSettings`; kept only if the target's files can be written with them.

    Raises:
        ArtifactError: nothing was quantized yet, or the plan is illegal under the target. EngineError: the engine
        refuses the file or computes something else.
    """
    check_run(folder)
    name, plan = written_plan(folder)
    layout = ModelLayout.load(folder / "layout.json")
    check_plan(plan, layout)
    retarget(plan, layout, target or plan.target)
    run = Run.look(folder, progress, **changes)
    find_exporter(target or plan.target).check(run.model, find_context(layout, run.settings.context))
    run.keep_settings()
    variant = (
        recovered_variants(run, layout)[name]
        if is_recovered(folder)
        else Variant(plan, quantize_stage(run, layout, plan, name))
    )
    record = export_stage(run, layout, variant, target or plan.target)
    render_report(run.folder)
    return record


def evaluate_run(folder: Path, progress: Progress = ignore_progress, **changes: object) -> EvaluationReport:
    """Evaluate a run again, on other text or more of it; what was written stays written.

    Raises:
        ArtifactError: the run has no evaluation yet, or what it wrote is no longer among its plans.
    """
    run = Run.resume(folder, progress, **changes)
    layout = run.load("layout.json", ModelLayout)
    before = run.load("evaluation.json", EvaluationReport)
    if is_recovered(folder):
        variants = recovered_variants(run, layout)
        evaluation = evaluate_stage(run, layout, variants, before.written or "quantized", before.guard)
        render_report(run.folder)
        return evaluation
    plans, written = _plans(run, layout), before.written or "quantized"
    if written not in plans:
        raise ArtifactError(
            f"{folder}/checkpoint holds the weights of plan-{written}.json, with which plan.json or --baselines no "
            f"longer compare; choose and write anew with: cptquant quantize {folder}"
        )
    evaluation = evaluate_stage(run, layout, quantize_variants(run, layout, plans), written, before.guard)
    render_report(run.folder)
    return evaluation


def evaluate_folder(
    folder: str, original: str | None, progress: Progress = ignore_progress, **choices: object
) -> EvaluationReport:
    """Judge any Hugging Face folder, another tool's output too, by the ruler used for our own.

    Args:
        original: the model it was made from; None leaves out everything that compares (KL, agreement).
        choices: fields of `RunSettings` that say which text.

    Raises:
        UserError: a folder that cannot be loaded, another vocabulary than the original's, unusable text.
    """
    settings = RunSettings.model_validate({"model": folder, **choices})
    return evaluate_any(settings, original, progress)


def run_plan(
    request: PlanRequest, plan: JointPlan, neighbours: int, progress: Progress = ignore_progress
) -> JointPlan:  # fmt: skip
    """Carry out the recommended point of a joint plan and some of its neighbours: adapt, quantize, measure.

    Each gets a folder in the plan's, with the adapted model and a run of `quantize_model`; joint_plan.json and its page
    then hold what was measured beside what was predicted. Finished points are not made again.

    Raises:
        UserError: as `quantize_model`; a text that would be repeated too often.
    """
    allowed = [point for point in plan.neighbours if point.tokens >= 1]
    for point in (plan.best, *allowed[:neighbours]):
        adapted = adapt_point(request, plan, point)
        progress(f"{point.label}: adapted", 1, 1)
        checkpoint, size_bytes = adapted.model, point.size_bytes
        if point.bits < FLOAT_BITS:
            result = quantize_model(
                str(adapted.model), _point_budget(point), adapted.folder / "quantized", progress, allocator="uniform",
                formats=(point.format,), quantizer="gptq", target=plan.target, calibration=str(adapted.calibration),
                eval_text=validation_text(request, plan), baselines=(), predict=False, seed=request.seed,
            )  # fmt: skip
            checkpoint, size_bytes = result.checkpoint, result.plan.size_bytes
        measured = judge_point(request, plan, point, adapted, checkpoint, size_bytes)
        others = tuple(found for found in plan.measured if found.label != point.label)
        plan = plan.model_copy(update={"measured": (*others, measured)})
        save_plan(plan, request.output)
    return plan


def _point_budget(point: JointPoint) -> str:
    return f"{point.size_bytes}B"
