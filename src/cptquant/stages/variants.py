"""The plan and its baselines, quantized; how far learning has to go for a baseline to be judged fairly."""

from collections.abc import Mapping

from cptquant.core.evaluation import DAMAGE_NAMES
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.evaluation.evaluate import evaluate
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks
from cptquant.quantizers.methods import find_quantizer
from cptquant.stages.quantize import Variant, first_pass_stage, quantize_stage
from cptquant.stages.run import Run

HOPELESS = 1.5
"""A baseline whose start has more than this many times the distance of the plan's start is not learned: learning has
brought 0.5 to 0.75 times the start's distance to plans of all kinds, never so much more to one than to another."""


def quantize_variants(run: Run, layout: ModelLayout, plans: Mapping[str, Plan]) -> dict[str, Variant]:
    """Each plan quantized the same way, except baselines that are beaten before the costly part.

    Learning takes many times as long as GPTQ before it, so both are judged on validation text after GPTQ, and a
    baseline that is far behind stays as GPTQ left it; its variant and the report say so.
    """
    learns = isinstance(find_quantizer(run.settings.quantizer_for(layout)), LearnedBlocks | KlRounding)
    notes = _beaten(run, layout, plans) if learns else {}
    found: dict[str, Variant] = {}
    for name, plan in plans.items():
        stage = first_pass_stage if name in notes else quantize_stage
        found[name] = Variant(plan, stage(run, layout, plan, name), notes.get(name, ""))
    return found


def _beaten(run: Run, layout: ModelLayout, plans: Mapping[str, Plan]) -> dict[str, str]:
    """Baselines that are not worth learning, with a sentence each."""
    others = [name for name, plan in plans.items() if plan.formats != plans["quantized"].formats]
    if not others:
        return {}
    starts = {name: first_pass_stage(run, layout, plans[name], name) for name in ["quantized", *others]}
    few = run.validation.subset(
        slice(0, max(2, run.validation.sequence_count // 4))
    )  # half as far off again is soon seen
    measured = {
        found.subject: found.value
        for found in evaluate(run.model, starts, few, progress=run.progress)
        if found.name == DAMAGE_NAMES[layout.task]
    }
    return {
        name: f"{name} bits were not learned: after GPTQ their {DAMAGE_NAMES[layout.task]} on some validation text is "
        f"{measured[name] / measured['quantized']:.1f} x the plan's"
        for name in others
        if measured[name] > HOPELESS * measured["quantized"] > 0
    }
