"""`cptquant law`: fit, predict, optimum, transfer, compare, simulate."""

from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

app = typer.Typer(
    no_args_is_help=True,
    help="Scaling laws for continual pre-training: fit them to runs, predict losses, choose ratio, tokens and size.",
)

Runs = Annotated[
    Path,
    typer.Argument(
        metavar="RUNS.csv",
        help="Columns N (parameters), D (tokens), r (domain share), general_nll, domain_nll (nats per token).",
        show_default=False,
    ),
]
Law = Annotated[Path, typer.Argument(metavar="LAW", help="Folder made by `law fit`.", show_default=False)]
SizeUnit = Annotated[
    str | None,
    typer.Option("--N-unit", help="Unit of column N: parameters, millions or billions.  [default: parameters]"),
]
TokenUnit = Annotated[
    str | None, typer.Option("--D-unit", help="Unit of column D: tokens, millions or billions.  [default: tokens]")
]
UniqueUnit = Annotated[
    str | None, typer.Option("--U-unit", help="Unit of column U: tokens, millions or billions.  [default: tokens]")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Name of a column in the file, e.g. --column domain_nll=math_loss; may be repeated."),
]
Starts = Annotated[int, typer.Option("--starts", min=1, help="Random starts of the fit.")]
Draws = Annotated[int, typer.Option("--draws", min=20, help="Bootstrap refits over runs, for the 90% intervals.")]
Penalty = Annotated[
    float,
    typer.Option(
        "--penalty", min=0.0, max=1e9, help="Strength of the penalty on losses that rise with N, D or share; e.g. 1000."
    ),
]
Fixed = Annotated[
    list[str] | None,
    typer.Option("--fix", help="Hold a parameter, N and D in billions, e.g. --fix alpha=0.35; may be repeated."),
]
DropHighest = Annotated[int, typer.Option("--drop-highest", min=0, help="Leave out that many rows of highest loss.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Size = Annotated[float | None, typer.Option("--N", help="Model size in parameters, e.g. 1.8e9.", show_default=False)]
Tokens = Annotated[float | None, typer.Option("--D", help="Tokens of the whole run, e.g. 10e9.", show_default=False)]
Ratio = Annotated[float | None, typer.Option("--r", help="Domain share of the tokens, 0 to 1.", show_default=False)]
Unique = Annotated[
    float | None, typer.Option("--U", help="Distinct tokens, for laws with repetition.", show_default=False)
]


@app.command()
def fit(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="dcpt, l1, l2, l4, l5, dcpt-inflection, dcpt-forgetting, chinchilla, repetition, cmr, cross-domain "
            "or ptq (a table of `quantize --record`).",
            show_default=False,
        ),
    ],
    runs: Runs,
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for law.json and report.html (ptq: law.json alone).  [default: laws/KIND]",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features", help="Early features by domain (cross-domain): domain, initial_nll, early_nll.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="Domain coefficient (cross-domain): k1 to k4.")] = "k3",
    size_unit: SizeUnit = None,
    token_unit: TokenUnit = None,
    unique_unit: UniqueUnit = None,
    columns: Columns = None,
    starts: Starts = 40,
    draws: Draws = 200,
    penalty: Penalty = 0.0,
    fixed: Fixed = None,
    drop_highest: DropHighest = 0,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Fit a law to runs; writes law.json and report.html."""
    from cptquant.cli.law_flags import given_flags, parse_fixed, parse_reading, refuse_unused
    from cptquant.cli.terminal import print_json, print_text, warn
    from cptquant.laws.fit_law import FitOptions
    from cptquant.laws.ptq_forms import absent_forms
    from cptquant.reports.law_tables import law_table, ptq_law_table
    from cptquant.stages.law import LAW_FILE, REPORT_FILE, FitRequest, check_kind, fit_ptq_stage, fit_stage

    if kind != "ptq":
        check_kind(kind)
    refuse_unused(kind, given_flags(ctx))
    output = Path("laws") / kind if output is None else output
    if kind == "ptq":
        ptq = fit_ptq_stage(runs, output)
        for sentence in absent_forms(ptq.laws):
            warn(sentence)
        if as_json:
            print_json(ptq)
        else:
            scores = {form: found.model_dump() for form, found in ptq.held_out.items()}
            print_text(ptq_law_table(ptq.form, ptq.rows, ptq.families, scores) + f"\n{output / LAW_FILE}")
        return
    request = FitRequest(
        kind=kind,
        data=runs,
        output=output,
        reading=parse_reading(size_unit, token_unit, unique_unit, columns),
        options=FitOptions(
            starts=starts, draws=draws, penalty=penalty, fixed=parse_fixed(fixed), drop_highest=drop_highest, seed=seed
        ),
        features=features,
        variant=variant,
    )
    law = fit_stage(request)
    if as_json:
        print_json(law)
    else:
        print_text(law_table(law) + f"\n{output / REPORT_FILE}")


@app.command()
def predict(
    law: Law,
    size: Size = None,
    tokens: Tokens = None,
    ratio: Ratio = None,
    unique: Unique = None,
    as_json: options.AsJson = False,
) -> None:
    """Losses of a run that was not made, with the 90% interval in which it will come out."""
    from cptquant.cli.terminal import print_text, print_values, warn
    from cptquant.laws.predict import outside_range, predict_law
    from cptquant.reports.law_tables import prediction_table
    from cptquant.stages.law import load_law

    fitted = load_law(law)
    losses = predict_law(fitted, size, tokens, ratio, unique)
    for sentence in [*outside_range(fitted, size, tokens, ratio), *doubts(fitted)]:
        warn(sentence)
    if as_json:
        print_values(losses)
    else:
        print_text(prediction_table(losses))


def doubts(law: object) -> list[str]:
    """A sentence for every status of a fit that makes predictions doubtful."""
    from cptquant.core.laws import FitStatus, LawFit

    assert isinstance(law, LawFit)
    harmless = (FitStatus.CONVERGED, FitStatus.REQUIREMENTS_VIOLATED)
    return [
        f"{name}: {status.sentence}"
        for name, fitted in law.fits.items()
        for status in fitted.statuses
        if status not in harmless
    ]


@app.command()
def optimum(
    law: Law,
    size: Size = None,
    tokens: Tokens = None,
    ratio: Ratio = None,
    max_general_increase: Annotated[
        str | None,
        typer.Option(
            "--max-general-increase", help="Use 1: how much the general loss may rise, e.g. 3%.", show_default=False
        ),
    ] = None,
    general_base: Annotated[
        float | None,
        typer.Option(
            "--general-base",
            help="General loss before training, nats per token.  [default: rows with D = 0, else a run with r = 0]",
            show_default=False,
        ),
    ] = None,
    domain_tokens: Annotated[
        float | None,
        typer.Option("--domain-tokens", help="Use 2: tokens of domain text there are, e.g. 5e9.", show_default=False),
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="Use 3: training compute, 6 N D, e.g. 1e21.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Page with the plot.  [default: LAW/optimum.html]", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Best ratio under a limit on the general loss or for scarce domain text; best size for a compute budget."""
    from cptquant.cli.law_flags import parse_increase
    from cptquant.cli.terminal import print_text, print_values, warn
    from cptquant.reports.law_tables import optimum_table
    from cptquant.stages.law import load_law
    from cptquant.stages.law_optimum import OptimumRequest, optimum_stage

    fitted = load_law(law)
    request = OptimumRequest(
        size=size,
        tokens=tokens,
        ratio=ratio,
        max_increase=None if max_general_increase is None else parse_increase(max_general_increase),
        general_base=general_base,
        domain_tokens=domain_tokens,
        flops=flops,
    )
    page = plot or (law.parent if law.is_file() else law) / "optimum.html"
    answer, sentences = optimum_stage(fitted, request, page)
    for sentence in [*sentences, *doubts(fitted)]:
        warn(sentence)
    if as_json:
        print_values(answer.model_dump(mode="json"))
    else:
        print_text(optimum_table(answer) + f"\n{page}")


@app.command()
def transfer(
    law: Law,
    features: Annotated[
        Path,
        typer.Option("--features", help="Early features of new domains: domain, initial_nll, early_nll.",
                     show_default=False),
    ],
    size: Size = None,
    tokens: Tokens = None,
    ratio: Ratio = None,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Predict a domain that was only begun, by a cross-domain law."""
    from cptquant.cli.law_flags import parse_run
    from cptquant.cli.terminal import print_text, print_values, warn
    from cptquant.laws.transfer import read_features
    from cptquant.laws.transfer import transfer as transfer_law
    from cptquant.reports.law_tables import transfer_table
    from cptquant.stages.law import load_law

    fitted = load_law(law)
    answers = transfer_law(fitted, read_features(features), parse_run(size, tokens, ratio))
    for answer in answers:
        if not answer.inside:
            warn(
                f"{answer.domain}: K = {answer.coefficient.value:.4g} lies outside the fitted domains' "
                f"({answer.known[0]:.4g} to {answer.known[1]:.4g}): an extrapolation"
            )
    for note in fitted.notes:
        warn(note)
    rows = {
        answer.domain: {
            "K": answer.coefficient.model_dump(),
            "domain_nll": None if answer.domain_nll is None else answer.domain_nll.model_dump(),
            "inside": answer.inside,
        }
        for answer in answers
    }
    if as_json:
        print_values(rows)
    else:
        print_text(transfer_table([(a.domain, a.coefficient, a.domain_nll) for a in answers]))


@app.command()
def compare(
    runs: Runs,
    forms: Annotated[str, typer.Option("--forms", help="Forms to compare, comma-separated; see `law fit`.")] = (
        "dcpt,l1,l2,l4,l5,chinchilla,dcpt-inflection"
    ),
    holdout: Annotated[
        str, typer.Option("--holdout", help="What is left out in turn: by=N, by=r, by=D (second half) or by=run.")
    ] = "by=N",
    size_unit: SizeUnit = None,
    token_unit: TokenUnit = None,
    unique_unit: UniqueUnit = None,
    columns: Columns = None,
    starts: Starts = 20,
    penalty: Penalty = 0.0,
    fixed: Fixed = None,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Compare forms by their errors on runs that were left out."""
    from dataclasses import asdict

    from cptquant.cli.law_flags import parse_fixed, parse_forms, parse_holdout, parse_reading
    from cptquant.cli.terminal import null_if_undefined, print_text, print_values
    from cptquant.laws.compare import compare_forms
    from cptquant.laws.fit_law import FitOptions
    from cptquant.laws.observations import read_observations
    from cptquant.reports.law_tables import comparison_table

    data = read_observations(runs, parse_reading(size_unit, token_unit, unique_unit, columns))
    chosen = FitOptions(starts=starts, penalty=penalty, fixed=parse_fixed(fixed), seed=seed)
    errors = compare_forms(data, parse_forms(forms), parse_holdout(holdout), chosen)
    rows = [asdict(error) for error in errors]
    if as_json:
        print_values([{name: null_if_undefined(value) for name, value in row.items()} for row in rows])
    else:
        print_text(comparison_table(rows))


@app.command()
def simulate(
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write.", show_default=False)],
    domains: Annotated[
        int | None,
        typer.Option(
            "--domains", min=4, show_default=False,
            help="Instead, that many domains of 75 rows with domain losses, for `law fit cross-domain`.",
        ),
    ] = None,
    features_output: Annotated[
        Path | None,
        typer.Option(
            "--features-output", show_default=False,
            help="Early features of the --domains and of one that was only begun.  [default: OUTPUT-features.csv]",
        ),
    ] = None,
    noise: Annotated[float, typer.Option("--noise", min=0.0, help="Standard deviation of each loss, nats.")] = 0.003,
    run_noise: Annotated[float, typer.Option("--run-noise", min=0.0, help="The same, shared by a run's rows.")] = 0.0,
    forgetting: Annotated[
        float, typer.Option("--forgetting", min=0.0, help="General loss that rises with tokens at large r, nats.")
    ] = 0.0,
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:  # fmt: skip
    """Make a grid of runs with known laws, 3 sizes x 9 ratios x 20 evaluations, to try the other commands on."""
    from cptquant.cli.terminal import print_text, print_values
    from cptquant.core.artifact import write_whole
    from cptquant.core.errors import UserError
    from cptquant.laws.simulate import Simulation, check_losses, to_csv
    from cptquant.laws.simulate import simulate as make_runs
    from cptquant.laws.simulate_domains import features_csv, simulate_domains

    if domains is None:
        if features_output is not None:
            raise UserError(
                f"--features-output {features_output} goes with --domains; add --domains 6, or leave it out"
            )
        runs, features, features_path = make_runs(Simulation(noise, run_noise, forgetting, seed)), {}, None
    else:
        if run_noise or forgetting:
            raise UserError("--domains takes --noise and --seed, not --run-noise or --forgetting; leave them out")
        runs, features = simulate_domains(domains, noise=noise, seed=seed)
        features_path = features_output or output.with_name(f"{output.stem}-features.csv")
        if features_path.resolve() == output.resolve():
            raise UserError(f"--features-output {features_path} is --output too; give the features a file of their own")
    check_losses(runs)
    if features_path is not None:
        write_whole(features_path, features_csv(features).encode())
    write_whole(output, to_csv(runs).encode())
    count = len(set(runs.run.tolist()))
    if as_json:
        found = {} if features_path is None else {"features": str(features_path)}
        print_values({"runs": str(output), "rows": len(runs), **found})
    else:
        print_text(f"{output}: {len(runs)} rows, {count} runs" + (f"\n{features_path}" if features_path else ""))
