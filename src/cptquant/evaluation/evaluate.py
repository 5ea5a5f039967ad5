"""Judge changed models beside the original: the same tokens, the same float32 arithmetic, one pass."""

from collections.abc import Mapping

from cptquant.core.errors import ModelError
from cptquant.core.evaluation import Measurement
from cptquant.core.progress import Progress, ignore_progress
from cptquant.evaluation.classification import classification_measurements
from cptquant.evaluation.divergence import divergence_measurements
from cptquant.evaluation.embeddings import embedding_measurements
from cptquant.evaluation.lockstep import LANGUAGE_TASKS, run_blocks
from cptquant.evaluation.perplexity import perplexity_measurements
from cptquant.evaluation.scored_text import ScoredText, check_tokens, prepare_text
from cptquant.evaluation.scores import ORIGINAL, collect_distances, collect_scores
from cptquant.evaluation.sizes import folder_weight_bytes, measure_sizes
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource
from cptquant.models.text import TokenSet


def evaluate(
    model: LoadedModel,
    subjects: Mapping[str, WeightSource],
    tokens: TokenSet,
    *,
    batch_size: int = 8,
    progress: Progress = ignore_progress,
) -> list[Measurement]:
    """Measure the original and changed versions of it.

    What is measured depends on the task. Causal language model: `nll_nats_per_token`, `perplexity`, `bits_per_byte`
    (byte-level tokenizers), the paired `nll_increase_nats_per_token`, `kl_nats_per_token`, `top1_agreement`; windows
    are disjoint and the first token of each is unscored. Masked: the same on a fixed choice of hidden tokens.
    Classifier: `accuracy`, `nll_nats_per_example`, an exact paired test, `kl_nats_per_example`, `top1_agreement`; only
    the last two without labels. Bare encoder: `embedding_cosine` and its low end.

    Args:
        model: the original; measured too, as subject "original", and compared with.
        subjects: e.g. "quantized", "uniform", "random" -> weights that replace the original's.
        tokens: held-out text, at least two sequences of it (one gives no standard error).
        batch_size: sequences run at a time.
        progress: told about stage "evaluate" in blocks, all models together.

    Returns:
        In reading order. Standard errors are clustered by document (`estimates.estimate_ratio`).

    Raises:
        DataError: text too long for the model's positions, labels that are no class of it, nothing to score.
        ModelError: a subject's outputs are not finite; a masked model without a mask token.
    """
    if ORIGINAL in subjects:
        raise ValueError(f"{ORIGINAL!r} is measured by itself and cannot be a subject")
    check_tokens(model.layout, tokens)
    text = prepare_text(model, tokens)
    streams = {ORIGINAL: ModelStream(model, text.tokens, batch_size=batch_size)}
    for subject, weights in subjects.items():
        streams[subject] = ModelStream(model, text.tokens, weights=weights, batch_size=batch_size)
    return _measure(streams, text, progress)


def evaluate_models(
    original: LoadedModel | None,
    candidate: LoadedModel,
    tokens: TokenSet,
    *,
    subject: str = "quantized",
    batch_size: int = 8,
    progress: Progress = ignore_progress,
) -> list[Measurement]:
    """Judge any loaded model, e.g. another tool's output, by the ruler of `evaluate`; sizes included.

    Args:
        original: what the candidate was made from; None leaves out everything that compares.
        candidate: as `load_any` gives it. Its size is that of the safetensors files in its folder.
        tokens: in the candidate's vocabulary.
        subject: name of the candidate in the measurements.
        batch_size, progress: as for `evaluate`.

    Raises:
        ModelError: another task or vocabulary than the original's; a bare encoder without an original.
        DataError: as for `evaluate`.
    """
    if original is not None:
        _check_comparable(original, candidate)
        check_tokens(original.layout, tokens)
    elif candidate.layout.task == "encoder":
        raise ModelError(
            f"{candidate.path} is a bare encoder: it has no loss of its own and is measured by the distance of its "
            "embeddings to the original's; give the original model too"
        )
    check_tokens(candidate.layout, tokens)
    text = prepare_text(original or candidate, tokens)
    models = {subject: candidate} if original is None else {ORIGINAL: original, subject: candidate}
    streams = {name: ModelStream(model, text.tokens, batch_size=batch_size) for name, model in models.items()}
    weight_bytes = {subject: folder_weight_bytes(candidate.path)}
    if original is not None:
        weight_bytes = {ORIGINAL: original.layout.source_bytes, **weight_bytes}
    sizes = measure_sizes((original or candidate).layout, weight_bytes)
    return _measure(streams, text, progress) + sizes


def _measure(streams: Mapping[str, ModelStream], text: ScoredText, progress: Progress) -> list[Measurement]:
    run_blocks(streams, progress)
    task = next(iter(streams.values())).layout.task
    if task == "encoder":
        return embedding_measurements(collect_distances(streams, text))
    scores = collect_scores(streams, text)
    nll_nats = {subject: found.nll_nats for subject, found in scores.items() if found.nll_nats is not None}
    own: list[Measurement] = []
    if task in LANGUAGE_TASKS:
        own = perplexity_measurements(
            nll_nats, text.counts, text.clusters, note=text.note, scored_bytes=text.scored_bytes
        )
    elif nll_nats:
        right = {subject: found.correct.bool() for subject, found in scores.items() if found.correct is not None}
        own = classification_measurements(right, nll_nats, text.clusters)
    return own + divergence_measurements(
        {subject: found.kl_nats for subject, found in scores.items() if found.kl_nats is not None},
        {subject: found.agreements for subject, found in scores.items() if found.agreements is not None},
        text.counts,
        text.clusters,
        per="token" if task in LANGUAGE_TASKS else "example",
        note=text.note,
    )


def _check_comparable(original: LoadedModel, candidate: LoadedModel) -> None:
    first, second = original.layout, candidate.layout
    if first.task != second.task:
        raise ModelError(
            f"{second.source} is for {second.task}, {first.source} for {first.task}; only models for the same task "
            "compare"
        )
    if first.vocabulary_size != second.vocabulary_size:
        raise ModelError(
            f"{second.source} has {second.vocabulary_size} tokens, {first.source} has {first.vocabulary_size}; KL "
            "needs one vocabulary: give the original that the candidate was made from, or none"
        )
    if original.tokenizer is None or candidate.tokenizer is None:
        return
    if original.tokenizer.get_vocab() != candidate.tokenizer.get_vocab():
        raise ModelError(
            f"{second.source} and {first.source} number their tokens differently; KL needs one vocabulary: give the "
            "original that the candidate was made from, or none"
        )
