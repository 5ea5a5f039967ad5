"""layout.json -> sensitivity.json."""

import hashlib

from cptquant.core.layout import ModelLayout
from cptquant.core.sensitivity import SensitivityTable
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import find_method
from cptquant.stages.allocate import site_formats
from cptquant.stages.run import Run


def measure_stage(run: Run, layout: ModelLayout, method_name: str | None = None) -> SensitivityTable:
    """layout.json -> sensitivity.json (and sensitivity-METHOD.json, so that several can be compared)."""
    method = find_method(method_name or run.settings.sensitivity)
    candidates = site_formats(run, layout)
    spelled = repr(sorted((site, [fmt.name for fmt in row]) for site, row in candidates.items()))
    inputs = {
        "layout": layout.digest(),
        "tokens": run.calibration.digest,
        "method": repr(method),
        "formats": hashlib.sha256(spelled.encode()).hexdigest(),
    }
    name = method_name or run.settings.sensitivity
    table = run.stage(
        f"sensitivity-{name}.json",
        SensitivityTable,
        inputs,
        lambda: measure_sensitivity(run.model, run.calibration, candidates, method, progress=run.progress),
    )
    table.save(run.folder / "sensitivity.json")
    return table
