"""A finished sweep and limits -> joint_plan.json: which size, share, tokens and bits; and carrying such a point out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cptquant.adaptation.sources import SourceDocument, read_documents
from cptquant.adaptation.token_files import TokenSource, tokenise_once
from cptquant.core.artifact import output_error
from cptquant.core.errors import ArtifactError, OutputError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.joint import FLOAT_BITS, DamageLaw, JointPlan
from cptquant.core.laws import LawFit
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.sweep import GENERAL
from cptquant.core.sweep_record import SweepRecord
from cptquant.core.targets import candidate_formats, find_target
from cptquant.laws.damage import damage_scatter, fit_damage, predict_damage, read_damages
from cptquant.laws.joint import Array, Damages, Limits, Rise, Size, plan_jointly
from cptquant.laws.ptq import load_ptq_law
from cptquant.laws.ptq_table import SHIPPED_LAW
from cptquant.models.load import load_model, read_layout
from cptquant.reports.joint import write_joint_report
from cptquant.sensitivity.model_noise import measure_model_noise
from cptquant.stages.law import FitRequest, fit_stage, load_law
from cptquant.stages.predict import forecast_rows
from cptquant.stages.sweep import RECORD, read_data
from cptquant.stages.sweep_point import SweepFolder
from cptquant.stages.sweep_quantize import smallest_uniform
from cptquant.stages.sweep_setup import read_corpus
from cptquant.stages.sweep_task import load_windows

PLAN_FILE, PAGE = "joint_plan.json", "joint_plan.html"
DEFAULT_BITS = (2, 3, 4, 8)
_LEAST_TOKENS = 10_000


@dataclass(frozen=True)
class PlanRequest:
    """What `cptquant plan` was asked for.

    Attributes:
        domain: name in the sweep, None where it has one. size_bytes: of the file. seconds, flops: of the training.
        bits: widths to choose among, None for those the sweep quantized to (else `DEFAULT_BITS`); 16 is always one.
        law: folder of a fitted law, None fits `form` to the sweep's runs.
        domain_text, general_text: what the planned run reads, empty for the sweep's own.
    """

    sweep: Path
    output: Path
    size_bytes: float
    seconds: float | None
    flops: float | None
    general_increase: float | None = None
    domain: str | None = None
    bits: tuple[int, ...] | None = None
    law: Path | None = None
    form: str = "dcpt"
    target: str = "transformers"
    domain_text: tuple[str, ...] = ()
    general_text: tuple[str, ...] = ()
    max_epochs: float | None = None
    seed: int = 0


def open_finished(folder: Path, domain: str | None) -> tuple[SweepFolder, str]:
    """A sweep, and the domain that is meant.

    Raises:
        ArtifactError: no sweep there, or no finished run in it. UserError: which domain is not said, or unknown.
    """
    sweep = SweepFolder(folder, SweepRecord.load(folder / RECORD))
    names = list(sweep.record.plan.domains)
    if domain is None and len(names) > 1:
        raise UserError(f"{folder} has several domains; say which: --law-domain {' or --law-domain '.join(names)}")
    chosen = names[0] if domain is None else domain
    if chosen not in names:
        raise UserError(f"--law-domain {chosen!r} is no domain of {folder}; choose one of: {', '.join(names)}")
    if not sweep.runs_csv(chosen).is_file():
        raise ArtifactError(f"{folder} holds no finished run; make them with: {SweepRecord.MADE_BY}")
    unfinished = [task for task in sweep.record.tasks if task.status != "finished"]
    if unfinished:
        sweep.notes.append(f"{len(unfinished)} of {len(sweep.record.tasks)} tasks of the sweep are not finished")
    return sweep, chosen


def plan_stage(request: PlanRequest, progress: Progress = ignore_progress) -> JointPlan:
    """joint_plan.json and joint_plan.html in the output folder.

    Raises:
        UserError: a flag's value. BudgetError: nothing fits. ArtifactError: no sweep.
    """
    watch = Stopwatch()
    sweep, domain = open_finished(request.sweep, request.domain)
    _check_output(request.output)
    target, bits = find_target(request.target), _bits(request, sweep)
    law, spelled = _law(request, sweep, domain)
    texts = planned_texts(request, sweep, domain)
    layouts = {rung.name: read_layout(sweep.base(rung.name)) for rung in sweep.record.rungs}
    sizes = _sizes(request, sweep, layouts, bits)
    damages, fitted, how = _damages(request, sweep, domain, layouts, progress)
    limits = Limits(
        size_bytes=request.size_bytes,
        seconds=request.seconds,
        flops=request.flops,
        general_increase=request.general_increase,
        domain_tokens=float(len(texts[domain].tokens)),
        general_tokens=float(len(texts[GENERAL].tokens)),
        max_epochs=request.max_epochs or sweep.record.plan.max_epochs,
    )
    _check_compute(limits, sizes)
    answer = plan_jointly(law, sizes, damages, limits)
    plan = JointPlan(
        inputs={"sweep": sweep.record.inputs["plan"], "law": law.digest()},
        provenance=watch.provenance(seed=request.seed),
        sweep=str(request.sweep),
        domain=domain,
        target=target.name,
        limits=_spell_limits(request, limits),
        best=answer.best,
        neighbours=answer.neighbours,
        candidates=answer.candidates,
        statuses=answer.statuses,
        share_range=answer.share_range,
        tokens_range=answer.tokens_range,
        agreement=answer.agreement,
        law=spelled,
        damage=how,
        damages=fitted,
        notes=tuple(sweep.notes),
    )
    save_plan(plan, request.output)
    return plan


def save_plan(plan: JointPlan, output: Path) -> None:
    """Write the file and its page."""
    plan.save(output / PLAN_FILE)
    write_joint_report(output / PAGE, plan)


def _check_output(output: Path) -> None:
    begun = {"law", "work"}  # a call that was refused later on
    if output.is_dir() and {path.name for path in output.iterdir()} - begun and not (output / PLAN_FILE).is_file():
        raise OutputError(f"--output {output} is not empty and holds no joint plan; choose an empty folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(output, error) from None


def _law(request: PlanRequest, sweep: SweepFolder, domain: str) -> tuple[LawFit, str]:
    if request.law is not None:
        law = load_law(request.law)
        return law, f"{law.kind}, from {request.law}"
    data = sweep.runs_csv(domain)
    law = fit_stage(FitRequest(request.form, data, request.output / "law"))
    for name, fit in law.fits.items():
        bad = [status.value.replace("_", " ") for status in fit.statuses if status.value != "converged"]
        if bad:
            sweep.notes.append(f"the law of {name} is not sound everywhere: {', '.join(bad)} (law/report.html)")
    return law, f"{law.kind}, fitted to {data.name} ({next(iter(law.fits.values())).rows} rows)"


def planned_texts(request: PlanRequest, sweep: SweepFolder, domain: str) -> dict[str, TokenSource]:
    """What the planned run would read."""
    given = {domain: (request.domain_text, "--domain"), GENERAL: (request.general_text, "--general")}
    tokenizer = load_model(sweep.base(sweep.record.plan.sizes[0].name)).require_tokenizer()
    found: dict[str, TokenSource] = {}
    for name, (files, flag) in given.items():
        found[name] = tokenise_once(
            name, partial(_planned_documents, sweep, name, files, flag), tokenizer, request.output / "work/text",
            flag=flag,
        )  # fmt: skip
    return found


def _planned_documents(sweep: SweepFolder, corpus: str, files: Sequence[str], flag: str) -> Iterator[SourceDocument]:
    return read_documents(files, flag) if files else read_corpus(sweep.record.plan.corpora[corpus], flag)


def _bits(request: PlanRequest, sweep: SweepFolder) -> tuple[int, ...]:
    recorded = sweep.record.plan.quantize
    wanted = request.bits if request.bits is not None else (recorded or DEFAULT_BITS)
    if recorded and (missing := [bits for bits in wanted if bits not in recorded and bits != FLOAT_BITS]):
        raise UserError(
            f"--bits {missing[0]}: the sweep quantized to {', '.join(map(str, recorded))} bits, and what others cost "
            "is not known; give some of those, or add it under quantize: in its plan and run the sweep again"
        )
    return tuple(sorted({*wanted, FLOAT_BITS}))


def _sizes(
    request: PlanRequest, sweep: SweepFolder, layouts: dict[str, ModelLayout], bits: Sequence[int]
) -> list[Size]:  # fmt: skip
    data = read_data(sweep.record, sweep.folder)
    sizes: list[Size] = []
    for rung in sweep.record.rungs:
        layout = layouts[rung.name]
        base = data.bases.get((rung.name, sweep.record.plan.seeds[0]))
        if base is None:
            sweep.notes.append(f"size {rung.name} has no base model yet and is left out")
            continue
        formats: dict[int, tuple[str, int]] = {}
        for width in bits:
            fmt = (
                layout.keep_format
                if width == FLOAT_BITS
                else QuantFormat.parse(f"int{width}-g{sweep.record.plan.group}")
            )
            if width != FLOAT_BITS and not _holds(layout, fmt, request.target):
                raise UserError(
                    f"--target {request.target} cannot hold {fmt.name} in any matrix of size {rung.name}; choose other "
                    "--bits, or another --target (cptquant targets)"
                )
            plan = {} if width == FLOAT_BITS else smallest_uniform(layout, fmt, request.target)
            formats[width] = (fmt.name, layout.plan_bytes(plan))
        sizes.append(
            Size(rung.name, float(rung.parameters), base.losses[GENERAL].value,
                 rung.step_seconds / sweep.record.plan.step_tokens, formats)
        )  # fmt: skip
    if not sizes:
        raise ArtifactError(f"{sweep.folder} holds no base model; make them with: {SweepRecord.MADE_BY}")
    return sizes


def _holds(layout: ModelLayout, fmt: QuantFormat, target: str) -> bool:
    return any(
        not candidate_formats(site, layout, find_target(target), [fmt])[0].is_float for site in layout.block_sites
    )


def _damages(
    request: PlanRequest, sweep: SweepFolder, domain: str, layouts: dict[str, ModelLayout], progress: Progress
) -> tuple[Damages, tuple[DamageLaw, ...], str]:
    """From the sweep's own quantized models, else from the shipped PTQ law on its base models."""
    base_tokens = float(sweep.record.plan.pretrain.tokens) if sweep.record.plan.pretrain is not None else 0.0
    table = sweep.folder / "ptq_runs.csv"
    if table.is_file() and sweep.record.plan.quantize:
        rows = read_damages(table, domain, base_tokens)
        own = fit_damage(rows["domain"], domain, seed=request.seed)
        general = fit_damage(rows["general"], GENERAL, seed=request.seed)
        damages = Damages(
            _from_law(own, base_tokens), _from_law(general, base_tokens), damage_scatter(own), damage_scatter(general)
        )
        return damages, (own, general), f"fitted to {own.rows} quantized models of {own.runs} runs of the sweep"
    if not SHIPPED_LAW.exists():
        raise UserError("no PTQ law is at hand: name bits under quantize: in the sweep's plan and run it again")
    sweep.notes.append(
        "what bits cost was predicted from the base models by the shipped PTQ law, so it does not depend on share and "
        "tokens; name bits under quantize: in the sweep's plan to measure it"
    )
    rises = _forecast(request, sweep, domain, layouts, progress)
    damages = Damages(_from_forecast(rises[domain]), _from_forecast(rises[GENERAL]), 0.0, 0.0)
    return damages, (), "the shipped PTQ law, on the base models"


def _from_law(law: DamageLaw, base_tokens: float) -> Rise:
    def rise(bits: int, size: Size, tokens: Array, ratio: Array) -> Array:
        if bits == FLOAT_BITS:
            return np.zeros((2, len(tokens)))
        return predict_damage(law, bits, size.parameters, base_tokens + tokens, ratio)

    return rise


_Rises = dict[tuple[str, int], NDArray[np.float64]]
_DRAWS = 200


def _forecast(
    request: PlanRequest, sweep: SweepFolder, domain: str, layouts: dict[str, ModelLayout], progress: Progress
) -> dict[str, _Rises]:
    """text -> (size, bits) -> rise, (1 + draws,): the PTQ law's value and normal draws with its interval."""
    law = load_ptq_law(None)
    rng = np.random.default_rng(request.seed)
    found: dict[str, _Rises] = {domain: {}, GENERAL: {}}
    for size, layout in layouts.items():
        model = load_model(sweep.base(size))
        widths = [bits for bits in _bits(request, sweep) if bits != FLOAT_BITS]
        plans = {
            f"{bits}": smallest_uniform(
                layout, QuantFormat.parse(f"int{bits}-g{sweep.record.plan.group}"), request.target
            )
            for bits in widths
        }
        for text, rises in found.items():
            tokens = load_windows(sweep.held(text))
            noise = measure_model_noise(model, tokens, plans, progress=progress)
            for row in forecast_rows(law, noise, layout, plans, ("gptq",)):
                rise = row.prediction.rise_nats
                spread = (rise.high - rise.low) / (2 * 1.645)
                drawn = rise.value + spread * rng.standard_normal(_DRAWS)
                rises[size, int(row.plan)] = np.concatenate([[rise.value], drawn])
    return found


def _from_forecast(rises: _Rises) -> Rise:
    def rise(bits: int, size: Size, tokens: Array, ratio: Array) -> Array:
        if bits == FLOAT_BITS:
            return np.zeros((2, len(tokens)))
        return np.repeat(rises[size.name, bits][:, None], len(tokens), axis=1)

    return rise


def _check_compute(limits: Limits, sizes: Sequence[Size]) -> None:
    least = min(sizes, key=lambda size: size.seconds_per_token)
    most = math.inf
    if limits.seconds is not None:
        most = limits.seconds / least.seconds_per_token
    if limits.flops is not None:
        most = min(most, limits.flops / (6 * min(size.parameters for size in sizes)))
    if most < _LEAST_TOKENS:
        raise UserError(
            f"--compute allows {most:,.0f} tokens even of the fastest size ({least.name}); the least a law speaks of "
            f"is {_LEAST_TOKENS:,}: allow more"
        )


def _spell_limits(request: PlanRequest, limits: Limits) -> dict[str, str]:
    found = {"bytes": f"{limits.size_bytes:,.0f}"}
    if limits.seconds is not None:
        found["training seconds"] = f"{limits.seconds:,.0f}, at the speed of the sweep's machine"
    if limits.flops is not None:
        found["training FLOPs"] = f"{limits.flops:.3g}"
    if limits.general_increase is not None:
        found["general loss over the base model's"] = f"{100 * limits.general_increase:g} % at most"
    found["epochs"] = f"{limits.max_epochs:g} at most of {limits.domain_tokens:,.0f} domain and " \
                      f"{limits.general_tokens:,.0f} general tokens"  # fmt: skip
    return found
