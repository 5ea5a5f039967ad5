"""`cptquant inspect`."""

from cptquant.cli import options


def inspect(
    model: options.Model,
    output: options.Output = None,
    trust_remote_code: options.TrustRemoteCode = None,
    as_json: options.AsJson = False,
) -> None:
    """List a model's sites: what can be quantized, where it stands, how large it is."""
    from cptquant.cli.terminal import print_json, print_text
    from cptquant.core.settings import RunSettings
    from cptquant.models.load import read_layout
    from cptquant.reports.tables import layout_table
    from cptquant.stages.inspect import inspect_stage
    from cptquant.stages.run import Run

    settings = RunSettings(model=model, **options.given(trust_remote_code=trust_remote_code))
    if output is None:
        layout = read_layout(model, trust_remote_code=settings.trust_remote_code)
    else:
        layout = inspect_stage(Run.start(output, settings))
    if as_json:
        print_json(layout)
    else:
        print_text(layout_table(layout))
