"""`cptquant measure`."""

from cptquant.cli import options


def measure(
    run_folder: options.RunFolder,
    sensitivity: options.Sensitivity = None,
    formats: options.Formats = None,
    target: options.TargetName = None,
    calibration: options.Calibration = None,
    calibration_sequences: options.CalibrationSequences = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how much each format hurts at each site; writes sensitivity.json."""
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.layout import ModelLayout
    from cptquant.reports.tables import sensitivity_table
    from cptquant.stages.measure import measure_stage
    from cptquant.stages.run import Run

    changes = options.given(
        sensitivity=sensitivity,
        formats=formats,
        target=target,
        calibration=calibration,
        calibration_sequences=calibration_sequences,
        sequence_length=sequence_length,
        seed=seed,
    )
    with watch(quiet=as_json) as progress:
        run = Run.resume(run_folder, progress, **changes)
        layout = run.load("layout.json", ModelLayout)
        table = measure_stage(run, layout)
    if as_json:
        print_json(table)
    else:
        print_text(sensitivity_table(table, layout))
