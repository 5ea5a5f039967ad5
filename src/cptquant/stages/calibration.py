"""What turns a table's damage into a predicted loss here: measured points of this run, or a prior alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cptquant.core.artifact import digest_json
from cptquant.core.evaluation import DAMAGE_NAMES, EvaluationReport
from cptquant.core.formats import QuantFormat
from cptquant.core.frontier import BandPrior, DamageCalibration, Frontier, MeasuredLoss
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import Manifest
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.laws.frontier_band import calibrate, observed_prior, vague_prior


def choose_prior(
    layout: ModelLayout, table: SensitivityTable, quantizer: str, plans: Iterable[Mapping[str, QuantFormat]]
) -> BandPrior | None:
    """What other models showed, where they were measured the same way; never from the model at hand.

    Returns:
        None where nothing like it was seen: other tasks, other scores than TDMPQ's second order, block formats.
    """
    alike = (
        layout.task == "causal_lm"
        and table.unit in ("loss_nats_per_token", "kl_nats_per_token")
        and table.metadata.get("order") == "second"
        and table.metadata.get("variant") == "weight"
        and all(fmt.block is None for formats in plans for fmt in formats.values())
    )
    name = Path(layout.source.split(":")[-1]).name  # families of the table are named so
    return observed_prior(quantizer, without=(name,)) if alike else None


def prior_or_vague(prior: BandPrior | None, damages: Iterable[float]) -> BandPrior | None:
    """The prior, or one that says nothing, centred on the damages at hand; None where all of them are 0."""
    positive = sorted(damage for damage in damages if damage > 0)
    if prior is not None or not positive:
        return prior
    return vague_prior(positive[len(positive) // 2])


def run_calibration(
    folder: Path, layout: ModelLayout, table: SensitivityTable, plan: Plan, quantizer: str
) -> DamageCalibration | None:
    """The calibration of frontier.json where it was made from this table, else from the run's own evaluation.

    Args:
        quantizer: spelling of `--quantizer`, what the plan will be carried out with.

    Returns:
        None where neither stands there and no other model was measured this way.
    """
    path = folder / "frontier.json"
    if path.exists():
        frontier = Frontier.load(path)
        if (frontier.inputs.get("table"), frontier.target, frontier.quantizer) == (
            table.digest(), plan.target, quantizer,
        ):  # fmt: skip
            return frontier.calibration
    prior = choose_prior(layout, table, quantizer, [plan.quant_formats])
    if prior is None:
        return None
    own = folder / "plan.json"
    judged = Plan.load(own) if own.exists() else plan
    loss = find_measured(folder, DAMAGE_NAMES[layout.task], judged, quantizer)
    if loss is None or judged.predicted_damage is None or judged.inputs.get("table") != table.digest():
        return calibrate([], [], prior)
    return calibrate([judged.predicted_damage], [loss.value], prior)


def find_measured(folder: Path, measure: str, plan: Plan, quantizer: str) -> MeasuredLoss | None:
    """Held-out loss of a plan carried out with a quantizer: the run's evaluation, or a point of frontier.json."""
    own = _evaluated(folder, measure, plan, quantizer)
    path = folder / "frontier.json"
    if own is not None or not path.exists():
        return own
    frontier, digest = Frontier.load(path), digest_json(plan.formats)
    if (frontier.quantizer, frontier.target) != (quantizer, plan.target):
        return None
    return next((point.measured for point in frontier.points if point.plan_digest == digest and point.measured), None)


def _evaluated(folder: Path, measure: str, plan: Plan, quantizer: str) -> MeasuredLoss | None:
    path, manifest = folder / "evaluation.json", folder / "manifest.json"
    if not path.exists() or not manifest.exists() or Manifest.load(manifest).quantizer != quantizer:
        return None
    report = EvaluationReport.load(path)
    # `plan quantized` is what was evaluated; plan.json may have been made anew since
    if report.inputs.get("plan quantized") != digest_json(plan.formats):
        return None
    found = report.find(measure, "quantized")
    return None if found is None else MeasuredLoss(value=found.value, stderr=found.stderr, n=found.n)
