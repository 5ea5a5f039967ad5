"""What turns a table's damage into a predicted loss here: measured points of this run, or a prior alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cptquant.core.evaluation import DAMAGE_NAMES, EvaluationReport
from cptquant.core.formats import QuantFormat
from cptquant.core.frontier import BandPrior, DamageCalibration, Frontier
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.laws.frontier_band import calibrate, observed_prior, vague_prior

def choose_prior(
    model: str, layout: ModelLayout, table: SensitivityTable, quantizer: str, plans: Iterable[Mapping[str, QuantFormat]]
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
    name = model if model.startswith("embedded:") else Path(model).name
    return observed_prior(quantizer, without=(name, name.split(":")[-1])) if alike else None


def prior_or_vague(prior: BandPrior | None, damages: Iterable[float]) -> BandPrior | None:
    """The prior, or one that says nothing, centred on the damages at hand; None where all of them are 0."""
    positive = sorted(damage for damage in damages if damage > 0)
    if prior is not None or not positive:
        return prior
    return vague_prior(positive[len(positive) // 2])


def run_calibration(
    folder: Path, model: str, layout: ModelLayout, table: SensitivityTable, plan: Plan, quantizer: str
) -> DamageCalibration | None:
    """The calibration of frontier.json where it was made from this table, else from the run's own evaluation.

    Returns:
        None where neither stands there and no other model was measured this way.
    """
    path = folder / "frontier.json"
    if path.exists():
        frontier = Frontier.load(path)
        if (frontier.inputs.get("table"), frontier.target) == (table.digest(), plan.target):
            return frontier.calibration
    prior = choose_prior(model, layout, table, quantizer, [plan.quant_formats])
    if prior is None:
        return None
    loss = measured_loss(folder, DAMAGE_NAMES[layout.task], plan)
    known = [] if loss is None or plan.predicted_damage is None else [(plan.predicted_damage, loss)]
    return calibrate([damage for damage, _ in known], [value for _, value in known], prior)


def measured_loss(folder: Path, measure: str, plan: Plan) -> float | None:
    """Held-out loss of the run's plan.json; None before it was evaluated, or where uniform bits were written instead."""
    path = folder / "evaluation.json"
    if not path.exists() or not (folder / "plan.json").exists():
        return None
    report = EvaluationReport.load(path)
    own = Plan.load(folder / "plan.json")
    if report.written != "quantized" or own.formats != plan.formats:
        return None
    found = report.find(measure, "quantized")
    return None if found is None else found.value
