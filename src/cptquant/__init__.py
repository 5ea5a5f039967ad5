"""cptquant: measure which layers break, spend the bits where they matter, hand over a checkpoint that runs.

The public door: verbs and types. Names are resolved when first used, so `import cptquant` loads no framework.

    result = cptquant.quantize_model("embedded:opt-mini", "4bpw", Path("runs/first"))
    result.evaluation.find("kl_nats_per_token", "quantized")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cptquant.allocation.allocate import allocate as allocate
    from cptquant.core.budget import Budget as Budget
    from cptquant.core.errors import CptquantError as CptquantError
    from cptquant.core.errors import UserError as UserError
    from cptquant.core.evaluation import EvaluationReport as EvaluationReport
    from cptquant.core.evaluation import Measurement as Measurement
    from cptquant.core.formats import QuantFormat as QuantFormat
    from cptquant.core.frontier import Frontier as Frontier
    from cptquant.core.laws import LawFit as LawFit
    from cptquant.core.layout import ModelLayout as ModelLayout
    from cptquant.core.layout import Site as Site
    from cptquant.core.plan import Plan as Plan
    from cptquant.core.recovery import RecoveryRequest as RecoveryRequest
    from cptquant.core.sensitivity import SensitivityTable as SensitivityTable
    from cptquant.core.targets import Target as Target
    from cptquant.core.targets import find_target as find_target
    from cptquant.evaluation.evaluate import evaluate as evaluate
    from cptquant.laws.fit_law import fit_law as fit_law
    from cptquant.laws.observations import read_observations as read_observations
    from cptquant.laws.predict import predict_law as predict_law
    from cptquant.models.load import load_model as load_model
    from cptquant.models.load import read_layout as read_layout
    from cptquant.models.segmented import load_segmented as load_segmented
    from cptquant.models.text import load_tokens as load_tokens
    from cptquant.pipeline import evaluate_folder as evaluate_folder
    from cptquant.pipeline import evaluate_run as evaluate_run
    from cptquant.pipeline import quantize_model as quantize_model
    from cptquant.pipeline import quantize_run as quantize_run
    from cptquant.pipeline import recover_run as recover_run
    from cptquant.quantizers.gptq import Gptq as Gptq
    from cptquant.quantizers.quantize import quantize_sites as quantize_sites
    from cptquant.quantizers.rtn import Rtn as Rtn
    from cptquant.quantizers.slim import Slim as Slim
    from cptquant.reports.html import render_report as render_report
    from cptquant.sensitivity.measure import measure_sensitivity as measure_sensitivity
    from cptquant.sensitivity.salience import measure_group_salience as measure_group_salience
    from cptquant.stages.compare import diff_plans as diff_plans
    from cptquant.stages.explain import explain as explain
    from cptquant.stages.frontier import FrontierRequest as FrontierRequest
    from cptquant.stages.frontier import frontier_model as frontier_model
    from cptquant.stages.what_if import what_if as what_if

_HOME = {
    "Budget": "core.budget",
    "CptquantError": "core.errors",
    "EvaluationReport": "core.evaluation",
    "Frontier": "core.frontier",
    "FrontierRequest": "stages.frontier",
    "Gptq": "quantizers.gptq",
    "LawFit": "core.laws",
    "Measurement": "core.evaluation",
    "ModelLayout": "core.layout",
    "Plan": "core.plan",
    "QuantFormat": "core.formats",
    "RecoveryRequest": "core.recovery",
    "Rtn": "quantizers.rtn",
    "SensitivityTable": "core.sensitivity",
    "Site": "core.layout",
    "Slim": "quantizers.slim",
    "Target": "core.targets",
    "UserError": "core.errors",
    "allocate": "allocation.allocate",
    "diff_plans": "stages.compare",
    "evaluate": "evaluation.evaluate",
    "evaluate_folder": "pipeline",
    "evaluate_run": "pipeline",
    "explain": "stages.explain",
    "find_target": "core.targets",
    "fit_law": "laws.fit_law",
    "frontier_model": "stages.frontier",
    "load_model": "models.load",
    "load_segmented": "models.segmented",
    "load_tokens": "models.text",
    "predict_law": "laws.predict",
    "read_observations": "laws.observations",
    "measure_group_salience": "sensitivity.salience",
    "measure_sensitivity": "sensitivity.measure",
    "quantize_model": "pipeline",
    "quantize_run": "pipeline",
    "recover_run": "pipeline",
    "quantize_sites": "quantizers.quantize",
    "read_layout": "models.load",
    "render_report": "reports.html",
    "what_if": "stages.what_if",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cptquant' has no attribute {name!r}")
    return getattr(import_module(f"cptquant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
