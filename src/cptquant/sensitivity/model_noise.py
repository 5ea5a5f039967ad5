"""Everything the PTQ law reads, measured on the original: noise of every site, and the loss around the weights."""

from collections.abc import Mapping

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.laws.ptq_features import Landscape, ModelNoise
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.sensitivity.landscape import LandscapeProbe
from cptquant.sensitivity.loss import pick_sequences
from cptquant.sensitivity.quantization_noise import measure_noise

MOMENT_SEQUENCES, TAYLOR_SEQUENCES, LANDSCAPE_SEQUENCES = 32, 16, 8


def measure_model_noise(
    model: LoadedModel,
    tokens: TokenSet,
    plans: Mapping[str, Mapping[str, QuantFormat]],
    *,
    tokens_seen: float | None = None,
    landscapes: bool = True,
    known_taylor: Mapping[str, Mapping[str, float]] | None = None,
    progress: Progress = ignore_progress,
) -> ModelNoise:
    """Measure the formats of all plans, and the landscape along each plan's rounding.

    Args:
        model: a causal language model, never changed. tokens: calibration text.
        plans: name -> format of every site. tokens_seen: training tokens, where known.
        landscapes: whether to measure along each plan's rounding (three passes a plan).
        known_taylor: second-order KL of every site and format, where TDMPQ has measured it already.

    Raises:
        ModelError: another kind of model; the law's observations are causal language models.
    """
    if model.layout.task != "causal_lm":
        raise ModelError(
            f"{model.layout.source} is a {model.layout.task.replace('_', ' ')} model; the PTQ law is fitted on causal "
            "language models only: quantize it and look at its evaluation instead (cptquant quantize)"
        )
    watch = Stopwatch()
    formats = {
        site.name: tuple(dict.fromkeys(plan[site.name] for plan in plans.values())) for site in model.layout.sites
    }
    sites = measure_noise(
        model, pick_sequences(tokens, MOMENT_SEQUENCES), formats, sequences=TAYLOR_SEQUENCES,
        known_taylor=known_taylor, progress=progress,
    )  # fmt: skip
    probe = LandscapeProbe(model, pick_sequences(tokens, LANDSCAPE_SEQUENCES))
    random = probe.along_random(progress=progress)
    found = _along_plans(probe, plans, progress) if landscapes else {}
    return ModelNoise(
        inputs={"layout": model.layout.digest(), "tokens": tokens.digest},
        provenance=watch.provenance(),
        model=model.layout.source,
        architecture=model.layout.architecture,
        parameters=model.layout.parameters,
        tokens_seen=tokens_seen,
        nll_nats_per_token=probe.nll_nats_per_token,
        sites=sites,
        random_kl_nats={f"{radius:g}": moved.kl_nats for radius, moved in random.items()},
        landscapes=found,
        text=tokens.description,
    )


def measure_landscapes(
    model: LoadedModel,
    tokens: TokenSet,
    plans: Mapping[str, Mapping[str, QuantFormat]],
    *,
    progress: Progress = ignore_progress,
) -> dict[str, Landscape]:
    """The loss along the rounding directions of further plans, on the text `measure_model_noise` takes."""
    return _along_plans(LandscapeProbe(model, pick_sequences(tokens, LANDSCAPE_SEQUENCES)), plans, progress)


def _along_plans(
    probe: LandscapeProbe, plans: Mapping[str, Mapping[str, QuantFormat]], progress: Progress
) -> dict[str, Landscape]:
    found: dict[str, Landscape] = {}
    for number, (name, plan) in enumerate(plans.items()):
        found[name] = probe.along_rounding(plan)
        progress("rounding directions", number + 1, len(plans))
    return found
