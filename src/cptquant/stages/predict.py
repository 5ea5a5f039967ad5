"""What plans will cost, before anything is quantized: features of the original, then the PTQ law."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.allocation.reach import check_budget
from cptquant.core.artifact import check_writable, digest_json
from cptquant.core.budget import Budget
from cptquant.core.errors import FormatError, OutputError, UserError
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.forecast import FITTED_OWN_TEXT, METHODS, ForecastRow, Method, PtqForecast
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.sensitivity import Damage, SensitivityTable
from cptquant.core.settings import RunSettings
from cptquant.core.targets import candidate_formats, find_target
from cptquant.laws.ptq import PtqLawFit, load_ptq_law
from cptquant.laws.ptq_features import ModelNoise, plan_features
from cptquant.laws.ptq_table import SHIPPED_LAW, PtqObservation, append_observations, read_observations
from cptquant.models.load import load_model, read_layout
from cptquant.models.text import load_tokens
from cptquant.sensitivity.model_noise import MOMENT_SEQUENCES, measure_landscapes, measure_model_noise
from cptquant.stages.check import check_seed
from cptquant.stages.run import Run

QUANTIZERS = ("rtn", "gptq", "block-ap")
_LEARNED: Method = "block-ap + own text"
Formats = Mapping[str, QuantFormat]
"""Site name -> format: a plan."""


@dataclass(frozen=True)
class ForecastRequest:
    """What `cptquant predict` was asked for.

    Attributes:
        formats: widths such as `int3`, taken with every one of `groups`, or whole names such as `int4-channel`.
        groups: columns that share a scale, or `channel`. budget: of a mixed plan, None for none.
        quantizers: `rtn`, `gptq`, `block-ap`; None for the first two and what `quantize` does by default with this
            model. own_text: as of `quantize`: sequences the model writes, 0 for none; None for what it does by default.
        law: file of a fitted law, None for the one that comes with the package.
        form: of the law, None for its own. calibration: text, None for the embedded one.
        tokens_seen: training tokens of the model, where known.
    """

    model: str
    formats: tuple[str, ...] = ("int2", "int3", "int4")
    groups: tuple[str, ...] = ("64",)
    budget: str | None = None
    quantizers: tuple[str, ...] | None = None
    own_text: int | None = None
    law: Path | None = None
    form: str | None = None
    calibration: str | None = None
    sequence_length: int = 256
    tokens_seen: float | None = None
    target: str = "transformers"
    seed: int = 0
    trust_remote_code: bool = False

    def quant_formats(self) -> tuple[QuantFormat, ...]:
        """Every width with every group.

        Raises:
            FormatError: unreadable.
        """
        names = [
            name if "-" in name else f"{name}-{group if group == 'channel' else f'g{group}'}"
            for name in self.formats
            for group in (self.groups if "-" not in name else ("",))
        ]
        if not names:
            raise FormatError("--formats names no format; give a comma-separated list such as int2,int3,int4")
        return tuple(dict.fromkeys(QuantFormat.parse(name) for name in names))


def predict_model(request: ForecastRequest, progress: Progress = ignore_progress) -> PtqForecast:
    """Measure the features of a model and predict every plan asked for. No quantized model is built or written.

    Raises:
        UserError: anything the caller can change: unreadable formats or budget, a model that is no causal language
            model, unusable text, a law that lacks a feature.
    """
    watch = Stopwatch()
    formats = request.quant_formats()
    budget = None if request.budget is None else Budget.parse(request.budget)
    _check_quantizers(request)
    find_target(request.target)
    check_seed(request.seed)
    law = load_ptq_law(request.law)
    methods = _methods(request, read_layout(request.model, trust_remote_code=request.trust_remote_code), law)
    _check_law(law, request, methods)
    model = load_model(request.model, trust_remote_code=request.trust_remote_code)
    if budget is not None:
        check_budget(model.layout, budget, find_target(request.target), formats)
    tokens = load_tokens(
        model,
        request.calibration,
        "calibration",
        sequences=MOMENT_SEQUENCES,
        length=request.sequence_length,
        seed=request.seed,
    )
    plans = {fmt.name: uniform_plan(model.layout, fmt, request.target) for fmt in formats}
    noise = measure_model_noise(model, tokens, plans, tokens_seen=request.tokens_seen, progress=progress)
    if budget is not None:
        mixed = _mixed_plan(model.layout, noise, formats, budget, request)
        plans |= mixed
        noise = noise.model_copy(
            update={"landscapes": {**noise.landscapes, **measure_landscapes(model, tokens, mixed, progress=progress)}}
        )
    rows = forecast_rows(law, noise, model.layout, plans, methods, form=request.form)
    return PtqForecast(
        inputs={"layout": model.layout.digest(), "tokens": tokens.digest, "law": law.digest()},
        provenance=watch.provenance(seed=request.seed),
        model=request.model,
        architecture=model.layout.architecture,
        parameters=model.layout.parameters,
        original_nll_nats=noise.nll_nats_per_token,
        law=f"{law.source}, form {request.form or law.form}",
        text=noise.text,
        rows=rows,
    )


def _check_law(law: PtqLawFit, request: ForecastRequest, methods: Sequence[Method]) -> None:
    """Refuse, before anything is measured, what the law cannot answer."""
    form = law.form if request.form is None else request.form
    if form not in law.laws:
        raise UserError(f"--form {form!r} is none of this law's; choose one of: {', '.join(law.laws)}")
    if form == "error" and request.tokens_seen is None:
        raise UserError("--form error needs --tokens-seen; give the training tokens of MODEL, or choose another --form")
    unknown = [method for method in methods if method not in law.laws[form].intercepts]
    if unknown:
        fitted = sorted(law.laws[form].intercepts)
        name, own = unknown[0].removesuffix(" + own text"), unknown[0].endswith("own text")
        raise UserError(
            f"--quantizer {name}{' with own text' if own else ''}: this law was fitted on {', '.join(fitted)} alone; "
            f"{'give --own-text 0' if own and name in fitted else 'choose that'}"
        )


def _check_quantizers(request: ForecastRequest) -> None:
    names = QUANTIZERS if request.quantizers is None else request.quantizers
    if not names or any(name not in QUANTIZERS for name in names):
        raise UserError(f"--quantizer {','.join(names)!r} is unknown; choose among: {', '.join(QUANTIZERS)}")
    if request.own_text and not {"gptq", "block-ap"}.intersection(names):
        raise UserError(f"--own-text {request.own_text}: --quantizer rtn reads no text; leave the flag out")
    if request.own_text is not None and request.own_text != 0 and request.own_text < FITTED_OWN_TEXT:
        raise UserError(
            f"--own-text {request.own_text}: the law was fitted on {FITTED_OWN_TEXT} sequences; give 0, or "
            f"{FITTED_OWN_TEXT} or more"
        )


def _methods(request: ForecastRequest, layout: ModelLayout, law: PtqLawFit) -> tuple[Method, ...]:
    """What `quantize` would do with each quantizer, in the law's words."""
    found: list[Method] = []
    names = request.quantizers or ("rtn", "gptq", RunSettings(model=request.model).quantizer_for(layout))
    for name in QUANTIZERS:
        if name in names:
            own_text = None if name == "rtn" else request.own_text
            method = _method_of(RunSettings(model=request.model, quantizer=name, own_text=own_text), layout)
            if request.quantizers is None and method == _LEARNED and not law.knows(_LEARNED):
                continue  # a law of one's own may hold fewer methods than quantize has
            if method is not None:
                found.append(method)
            elif request.quantizers is not None:
                raise UserError(
                    f"--quantizer {name}: the law knows it with text that the model writes itself; give --own-text "
                    f"{FITTED_OWN_TEXT}, or choose gptq"
                )
    return tuple(found)


def _method_of(settings: RunSettings, layout: ModelLayout) -> Method | None:
    """The law's word for how a run quantizes; None for what it has not seen."""
    count, label = settings.own_text_for(layout), settings.carried_out_with(layout)
    if 0 < count < FITTED_OWN_TEXT:
        return None
    return next((method for method in METHODS if method == label), None)


def uniform_plan(layout: ModelLayout, fmt: QuantFormat, target: str) -> dict[str, QuantFormat]:
    """One format wherever the target can hold it, 16 bits elsewhere: what `--allocator uniform` writes."""
    return {site.name: candidate_formats(site, layout, find_target(target), [fmt])[0] for site in layout.sites}


def forecast_rows(
    law: PtqLawFit,
    noise: ModelNoise,
    layout: ModelLayout,
    plans: Mapping[str, Formats],
    methods: Sequence[Method],
    *,
    form: str | None = None,
) -> tuple[ForecastRow, ...]:
    """One row for each plan and method."""
    rows: list[ForecastRow] = []
    for name, plan in plans.items():
        for method in methods:
            features = plan_features(noise, layout, plan, method, name)
            size_bytes = layout.plan_bytes(dict(plan))
            rows.append(
                ForecastRow(
                    plan=name,
                    method=method,
                    size_bytes=size_bytes,
                    bits_per_weight=8 * size_bytes / layout.parameters,
                    prediction=law.predict(features, form),
                    features=features,
                )
            )
    return tuple(rows)


def _mixed_plan(
    layout: ModelLayout, noise: ModelNoise, formats: Sequence[QuantFormat], budget: Budget, request: ForecastRequest
) -> dict[str, dict[str, QuantFormat]]:
    """The knapsack's plan for the second-order damages that were measured, GPTQ's where it is among the methods."""
    compensated = request.quantizers is None or request.quantizers != ("rtn",)
    damages = {
        name: {
            fmt: Damage(value=found.taylor_kl_nats * (found.gptq_ratio if compensated else 1.0))
            for fmt, found in row.items()
        }
        for name, row in noise.sites.items()
    }
    keep = layout.keep_format.name
    table = SensitivityTable(
        inputs={"layout": layout.digest()},
        method="tdmpq",
        unit="kl_nats_per_token",
        damages={site.name: {**damages.get(site.name, {}), keep: Damage(value=0.0)} for site in layout.sites},
    )
    target = find_target(request.target)
    plan = allocate(layout, table, budget, target, find_allocator("knapsack"), formats=formats, seed=request.seed)
    return {f"budget {budget.text}": plan.quant_formats}


def forecast_stage(run: Run, layout: ModelLayout, plans: Mapping[str, Plan]) -> PtqForecast | None:
    """forecast.json: what the plan and its baselines are expected to cost, before they are quantized.

    None (and no file) where `RunSettings.forecasts` says no, for block formats of GGUF, learned rounding and less own
    text than the law was fitted on, which it has not seen, and in an installation that was built without a law
    (runs/ptq_grid.sh makes it). The second-order KL is taken from the sensitivity table where TDMPQ made it.
    """
    path = run.folder / "forecast.json"
    method = _method_of(run.settings, layout)
    unseen = any(fmt.block is not None for plan in plans.values() for fmt in plan.quant_formats.values())
    law = load_ptq_law() if run.settings.forecasts(layout) and SHIPPED_LAW.exists() else None
    if law is None or unseen or method is None or method not in law.laws[law.form].intercepts:
        path.unlink(missing_ok=True)
        return None
    formats = {name: plan.quant_formats for name, plan in plans.items()}
    known = _known_taylor(run, formats)
    inputs = {
        "layout": layout.digest(),
        "tokens": run.calibration.digest,
        "law": law.digest(),
        "method": method,
        "taylor": "" if known is None else digest_json(known),
        **{f"plan {name}": digest_json(plan.formats) for name, plan in plans.items()},
    }

    def make() -> PtqForecast:
        noise = measure_model_noise(run.model, run.calibration, formats, known_taylor=known, progress=run.progress)
        return PtqForecast(
            model=run.settings.model,
            architecture=layout.architecture,
            parameters=layout.parameters,
            original_nll_nats=noise.nll_nats_per_token,
            law=f"{law.source}, form {law.form}",
            text=noise.text,
            rows=forecast_rows(law, noise, layout, formats, (method,)),
        )

    return run.stage(path.name, PtqForecast, inputs, make)


def _known_taylor(run: Run, plans: Mapping[str, Formats]) -> dict[str, dict[str, float]] | None:
    """Second-order damages of the table at hand; None if it was made otherwise or lacks a format of a plan."""
    path = run.folder / "sensitivity-tdmpq.json"
    if not path.exists():
        return None
    table = SensitivityTable.load(path)
    if table.metadata.get("order") != "second" or table.metadata.get("variant") != "weight":
        return None
    wanted = {(site, fmt.name) for plan in plans.values() for site, fmt in plan.items() if not fmt.is_float}
    if any(fmt not in table.damages.get(site, {}) for site, fmt in wanted):
        return None
    return {name: {fmt: damage.value for fmt, damage in row.items()} for name, row in table.damages.items()}


def check_record(table: Path, output: Path | None) -> None:
    """Refuse a table that a run could not be added to, before the run is made.

    Args:
        output: folder that the run will make, in which the table may lie.

    Raises:
        DataError: the file is another table, or damaged. UserError: it could not be written.
    """
    if table.is_file():
        read_observations(table)
    if output is not None and table.parent.resolve() == output.resolve():
        return
    try:
        check_writable(table)
    except OutputError as error:
        raise UserError(str(error).replace("--output", "--record")) from None


def record_run(folder: Path, table: Path, *, tokens_seen: float | None = None) -> int:
    """Append what a run predicted from and measured to a table of observations, from which a law can be fitted.

    Args:
        tokens_seen: training tokens of the original; without them the law's form `error` cannot be fitted.

    The family of every row is the model's folder name: edit that column where models of several names come from one
    training, or one name stands for several.

    Returns:
        Rows appended; rows that the table holds already are not added again.

    Raises:
        UserError: the run has no forecast. DataError: the file is another table. OutputError: not writable.
    """
    if not (folder / "forecast.json").exists():
        raise UserError(
            f"{folder} holds no forecast.json, so --record has nothing to write: leave out --no-predict, and give a "
            "causal language model"
        )
    forecast = PtqForecast.load(folder / "forecast.json")
    evaluation = EvaluationReport.load(folder / "evaluation.json")
    name = forecast.model if forecast.model.startswith("embedded:") else Path(forecast.model).name
    observations: list[PtqObservation] = []
    for row in forecast.rows:
        subject = "quantized" if row.plan == evaluation.written else row.plan
        if not evaluation.carried_out(row.plan):
            continue
        kl, rise = (evaluation.find(m, subject) for m in ("kl_nats_per_token", "nll_increase_nats_per_token"))
        original = evaluation.find("nll_nats_per_token", "original")
        if kl is None or rise is None or original is None:
            continue
        observations.append(
            PtqObservation(
                model=name,
                family=name,
                plan=row.plan,
                features=row.features.model_copy(update={"tokens_seen": tokens_seen}),
                kl_nats=kl.value,
                kl_stderr_nats=kl.stderr or 0.0,
                rise_nats=rise.value,
                rise_stderr_nats=rise.stderr or 0.0,
                original_nll_nats=original.value,
                tokens=kl.n,
            )
        )
    return append_observations(table, observations)
