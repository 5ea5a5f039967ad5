"""MODEL -> layout.json."""

from cptquant.core.layout import ModelLayout
from cptquant.models.load import read_layout
from cptquant.stages.run import Run


def inspect_stage(run: Run) -> ModelLayout:
    """MODEL -> layout.json; reads the configuration and the headers of the weight files only."""
    layout = read_layout(run.settings.model, trust_remote_code=run.settings.trust_remote_code)
    return run.stage("layout.json", ModelLayout, {"model": layout.source_digest}, lambda: layout)
