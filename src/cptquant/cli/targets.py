"""`cptquant targets`."""

import json

from cptquant.cli import options


def targets(as_json: options.AsJson = False) -> None:
    """List what each engine can hold: formats, row lengths, what shares a format, architectures."""
    from cptquant.cli.terminal import print_text
    from cptquant.core.targets import TARGETS
    from cptquant.reports.target_table import describe_target, target_table

    if as_json:
        print(json.dumps([describe_target(target) for target in TARGETS.values()], indent=1))
    else:
        print_text(target_table(TARGETS.values()))
