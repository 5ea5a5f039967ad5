"""`cptquant report`."""

from cptquant.cli import options


def report(run_folder: options.RunFolder, as_json: options.AsJson = False) -> None:
    """Render report.html from what stands in a run folder; loads no model."""
    import json

    from cptquant.reports.html import render_report

    path = render_report(run_folder)
    print(json.dumps({"report": str(path)}) if as_json else str(path))
