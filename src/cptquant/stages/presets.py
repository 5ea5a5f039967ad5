"""plan-preset.json: llama.cpp's largest preset that takes no more bytes than the plan. Loads no framework."""

import math
from dataclasses import dataclass

from cptquant.allocation.damages import find_damage
from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import find_target
from cptquant.core.targets.gguf_presets import PRESETS, preset_formats

TARGET = "gguf"
CLEARLY_WORSE = 2.0
"""A preset whose predicted damage is this many times the plan's is not quantized. On three models, twelve cells,
presets' types cost 1.2 to 2.0 times the KL of a mixed plan of their bytes (docs/engines.md)."""


@dataclass(frozen=True)
class PresetBaseline:
    """The preset to compare a plan with.

    Attributes:
        preset: its name; None where even the smallest takes more bytes.
        plan: its types as a plan; None where it is not quantized. reason: why there is none, for people.
    """

    preset: str | None
    plan: Plan | None
    reason: str = ""


def find_preset(layout: ModelLayout, plan: Plan, table: SensitivityTable | None) -> PresetBaseline:
    """The largest preset at no more bytes, in the scope of the plan's budget, unless predicted to be clearly worse.

    Args:
        table: damages that predict; without one, where it lacks a type, or where its damages are scores of blocks times
            relative errors, the preset is quantized and compared.
    """
    fitting = {
        preset: made
        for preset in PRESETS
        if (made := _plan_of(layout, plan, preset)).counted_bytes <= plan.counted_bytes
    }
    if not fitting:
        return PresetBaseline(None, None, "no preset of llama.cpp takes as few bytes")
    preset, made = max(fitting.items(), key=lambda item: item[1].counted_bytes)
    times = _times_worse(layout, plan, made, table)
    if times is not None and times >= CLEARLY_WORSE:
        reason = f"llama.cpp's {preset} was not quantized: its predicted damage is {times:.2g} times the plan's"
        return PresetBaseline(preset, None, reason)
    return PresetBaseline(preset, made)


def preset_label(plan: Plan) -> str:
    """`llama.cpp's Q3_K_M`, of a plan that `find_preset` made."""
    return plan.allocator


def _plan_of(layout: ModelLayout, plan: Plan, preset: str) -> Plan:
    target, wanted = find_target(TARGET), preset_formats(layout, preset)
    if plan.budget_scope == "sites":
        wanted = {site.name: wanted[site.name] for site in layout.block_sites}
    chosen = {site.name: wanted.get(site.name, layout.keep_format) for site in layout.sites}
    size_bytes, site_bytes = target.plan_bytes(layout, chosen), target.block_site_bytes(layout, chosen)
    limit_bytes = plan.counted_bytes
    block_weights = sum(site.weight_count for site in layout.block_sites)
    return Plan(
        inputs={"plan": plan.digest(), "preset": preset},
        target=TARGET,
        allocator=f"llama.cpp's {preset}",
        budget=f"{limit_bytes} bytes ({plan.budget_scope}), as the plan",
        budget_scope=plan.budget_scope,
        limit_bytes=limit_bytes,
        formats={name: fmt.name for name, fmt in chosen.items()},
        size_bytes=size_bytes,
        site_bytes=site_bytes,
        bits_per_weight=8 * size_bytes / layout.parameters,
        bits_per_weight_sites=8 * site_bytes / block_weights,
        status=SolverStatus.HEURISTIC,
        notes=(f"every tensor has the type that llama.cpp's {preset} gives it; the codes are ours",),
    )


def _times_worse(layout: ModelLayout, plan: Plan, preset: Plan, table: SensitivityTable | None) -> float | None:
    """Predicted damage of the preset over the plan's, over the sites the budget counts; None where it is not known."""
    if table is None or "relative" in table.unit:  # CMPQ's and PMPQ's: they order sites, no loss is in proportion
        return None
    sites = layout.sites if plan.budget_scope == "file" else layout.block_sites
    try:
        own, other = (
            math.fsum(find_damage(table, site, QuantFormat.parse(made.formats[site.name])) for site in sites)
            for made in (plan, preset)
        )
    except ArtifactError:  # the table has no damage of a type that only the preset uses
        return None
    return other / own if own > 0 else None
