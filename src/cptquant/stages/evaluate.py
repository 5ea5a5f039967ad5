"""The guard on validation text, then evaluation.json on test text."""

import torch

from cptquant.core.artifact import digest_json
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import Manifest
from cptquant.core.progress import Progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.settings import RunSettings
from cptquant.evaluation.evaluate import evaluate, evaluate_models
from cptquant.evaluation.guard import choose
from cptquant.evaluation.scored_text import evaluation_settings
from cptquant.evaluation.sizes import measure_sizes
from cptquant.models.checkpoint_weights import CheckpointWeights
from cptquant.models.load import load_any, load_model
from cptquant.models.stream import WeightSource
from cptquant.models.text import load_tokens
from cptquant.stages.allocate import preset_baseline
from cptquant.stages.export import ENGINE_TARGETS
from cptquant.stages.presets import TARGET, preset_label
from cptquant.stages.quantize import Variant
from cptquant.stages.run import Run


def guard_stage(run: Run, variants: dict[str, Variant], *, by: str | None = None) -> tuple[str, str]:
    """Compare the plan with uniform bits, and with what else there is at no more bytes, on validation text.

    Others are llama.cpp's preset (`presets.py`) and the plan before swaps (`refine.py`), or what training started from
    (`recover.py`). The best is written.

    Args:
        by: the measurement to choose by; None is the distance to the original.

    Returns:
        The name of the variant to write, and one sentence for the report.
    """
    rivals = _rivals(variants)
    missing = _missing(run, variants)
    written, sentence = "quantized", "" if missing else "the plan is uniform itself"
    if rivals:
        sources = {name: variants[name].shards for name in ("quantized", *rivals)}
        measured = evaluate(run.model, sources, run.validation, progress=run.progress)
        written, sentence = choose(measured, run.model.layout.task, rivals, by=by)
    notes = [variant.note for variant in variants.values()]
    sentence = "; ".join(part for part in (sentence, *missing, *notes) if part)
    _note_in_manifest(run, written, sentence)
    return written, sentence


def _note_in_manifest(run: Run, written: str, guard: str) -> None:
    """manifest.json tells of the plan's own weights; whether they were written is known only now."""
    path = run.folder / "manifest.json"
    manifest = Manifest.load(path)
    settings = {**manifest.settings, "written": written, "guard": guard}
    if settings != manifest.settings:
        manifest.model_copy(update={"settings": settings}).save(path)


def _rivals(variants: dict[str, Variant]) -> dict[str, str]:
    """Variants that differ from the plan and may be written instead, and what each is."""
    if "parent" in variants:
        return {"parent": "the parent"}
    labels = {"uniform": "uniform bits", "unrefined": "the plan before swaps"}
    if "preset" in variants:
        labels["preset"] = preset_label(variants["preset"].plan)
    plan = variants["quantized"].plan
    return {
        name: labels[name]
        for name in ("uniform", "preset", "unrefined")
        if name in variants and variants[name].plan.formats != plan.formats
    }


def _missing(run: Run, variants: dict[str, Variant]) -> list[str]:
    """What the plan is not compared with, and why."""
    wanted, layout = run.settings.baselines_for(run.model.layout), run.model.layout
    reasons: list[str] = []
    if "parent" in variants:
        return reasons
    if "uniform" not in variants:
        why = "no uniform plan takes as few bytes" if "uniform" in wanted else "--baselines leaves out uniform"
        reasons.append(f"not run: {why}" if not _rivals(variants) else f"not compared with uniform bits: {why}")
    plan = variants["quantized"].plan
    if plan.target == TARGET and "preset" not in variants:
        reasons.append(
            preset_baseline(run, layout, plan).reason if "preset" in wanted else "--baselines leaves out preset"
        )
    return reasons


def evaluate_stage(
    run: Run, layout: ModelLayout, variants: dict[str, Variant], written: str, guard: str
) -> EvaluationReport:
    """evaluation.json: original, what is in checkpoint/ (read back from disk) and the baselines, on test text."""
    plans = {name: variant.plan for name, variant in variants.items()}
    plans["quantized"] = plans[written]
    inputs = {
        "tokens": run.test.digest,
        "written": written,
        "guard": guard,
        **{f"plan {name}": digest_json(plan.formats) for name, plan in plans.items()},
        **{f"pieces {name}": variant.shards.folder.name for name, variant in variants.items()},
    }

    def make() -> EvaluationReport:
        sources: dict[str, WeightSource] = {name: variant.shards for name, variant in variants.items()}
        sources["quantized"] = variants[written].shards
        # A quantized GPT-2's checkpoint is another architecture (decision 0003); the files of other engines are
        # compared with the pieces after the evaluation.
        if layout.model_type != "gpt2" and plans["quantized"].target not in ENGINE_TARGETS:
            formats = plans["quantized"].quant_formats
            sources["quantized"] = CheckpointWeights(run.folder / "checkpoint", layout, formats)
        measured = evaluate(run.model, sources, run.test, progress=run.progress)
        weight_bytes = {"original": layout.source_bytes, **{name: plan.size_bytes for name, plan in plans.items()}}
        return EvaluationReport(
            measurements=(*measured, *measure_sizes(layout, weight_bytes)),
            settings=evaluation_settings(layout.task, run.test),
            written=written,
            guard=guard,
            unlearned=tuple(name for name, variant in variants.items() if variant.note),
        )

    return run.stage("evaluation.json", EvaluationReport, inputs, make)


def evaluate_any(settings: RunSettings, original: str | None, progress: Progress) -> EvaluationReport:
    """Any model folder on the test text of the settings, next to its original if that is given."""
    watch = Stopwatch()
    trust = settings.trust_remote_code
    candidate = load_any(settings.model, trust_remote_code=trust)
    reference = None if original is None else load_model(original, trust_remote_code=trust)
    tokens = load_tokens(
        candidate, settings.eval_text, "test", sequences=settings.eval_sequences, length=settings.sequence_length,
        seed=settings.seed,
    )  # fmt: skip
    return EvaluationReport(
        measurements=tuple(evaluate_models(reference, candidate, tokens, progress=progress)),
        settings=evaluation_settings(candidate.layout.task, tokens),
        inputs={"candidate": candidate.layout.source_digest, "tokens": tokens.digest},
        provenance=watch.provenance(seed=settings.seed, threads=torch.get_num_threads()),
    )
