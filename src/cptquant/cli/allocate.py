"""`cptquant allocate`."""

from cptquant.cli import options


def allocate(
    run_folder: options.RunFolder,
    budget: options.BudgetText = None,
    memory: options.Memory = None,
    context: options.Context = None,
    allocator: options.Allocator = None,
    refine_swaps: options.RefineSwaps = None,
    target: options.TargetName = None,
    formats: options.Formats = None,
    seed: options.Seed = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose a format for each site under a budget in real bytes; writes plan.json. Loads no model, but for swaps."""
    from cptquant.cli.terminal import print_json, print_text
    from cptquant.core.layout import ModelLayout
    from cptquant.core.sensitivity import SensitivityTable
    from cptquant.reports.tables import plan_table
    from cptquant.stages.allocate import allocate_stage, needs_table
    from cptquant.stages.run import Run

    changes = options.given(
        budget=budget, memory=memory, context=context, allocator=allocator, refine_swaps=refine_swaps, target=target,
        formats=formats, seed=seed,
    )  # fmt: skip
    run = Run.resume(run_folder, **changes)
    layout = run.load("layout.json", ModelLayout)
    table = run.load("sensitivity.json", SensitivityTable) if needs_table(run.settings.allocator) else None
    if run.settings.refine_swaps:
        from cptquant.cli.terminal import watch
        from cptquant.stages.refine import plan_stage  # loads the model

        with watch(quiet=as_json) as run.progress:
            plan = plan_stage(run, layout, table)
    else:
        plan = allocate_stage(run, layout, table)
    if as_json:
        print_json(plan)
    else:
        print_text(plan_table(plan, layout))
