"""`quantize --dry-run`: sizes exactly, time and memory roughly, before either is spent.

Time is counted in float32 products (multiply-adds, two operations each) and divided by the speed of a matrix product
measured now. The counts leave out what is small; `benchmarks/rehearsal.py` compares them with real runs.
"""

import time

import torch

from cptquant.allocation.reach import check_budget, find_reach
from cptquant.core.estimate import RunEstimate
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import RunSettings
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.load import read_layout
from cptquant.stages.allocate import needs_table
from cptquant.stages.check import check_choices, check_target

_BASE_BYTES = 500_000_000
"""Resident set of Python with torch and transformers imported."""
_EFFICIENCY = 0.5
"""Share of the measured matrix-product speed that whole stages reach on two cores; attention, norms and copies take
the rest."""
_ROUNDING_SECONDS_PER_WEIGHT = 6e-8
"""Grid search of one weight in one format on one core of a current server processor."""
_ABLATION_SEQUENCES = 16


def estimate_run(settings: RunSettings) -> RunEstimate:
    """Expected sizes, time and memory of `quantize` with these settings.

    Raises:
        UserError: as `quantize` would, for everything that can be known without the weights.
    """
    check_choices(settings)
    layout = read_layout(settings.model, trust_remote_code=settings.trust_remote_code)
    budget, target = settings.budget_for(layout), find_target(settings.target)
    check_target(layout, settings.target)
    check_budget(layout, budget, target, settings.quant_formats)
    reach = find_reach(layout, budget, target, settings.quant_formats)
    limit = budget.limit_bytes(layout)
    speed = _measure_flops_per_second()
    seconds = _stage_seconds(layout, settings, speed * _EFFICIENCY)
    variants = 1 + len(settings.baselines_for(layout))
    return RunEstimate(
        model=settings.model,
        parameters=layout.parameters,
        source_bytes=layout.source_bytes,
        budget=budget.text,
        limit_bytes=limit,
        smallest_bytes=reach.smallest_bytes,
        largest_bytes=reach.bytes_at_16_bit,
        uniform_bytes={fmt.name: _uniform_bytes(layout, settings, fmt) for fmt in settings.quant_formats},
        stage_seconds=seconds,
        wall_seconds=sum(seconds.values()),
        peak_memory_bytes=_peak_bytes(layout, settings, variants),
        disk_bytes=(1 + variants) * min(limit, layout.bytes_at_16_bit),
        flops_per_second=speed,
    )


def _measure_flops_per_second(size: int = 1024, repeats: int = 5) -> float:
    """The best of a few float32 matrix products."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _stage_seconds(layout: ModelLayout, settings: RunSettings, speed: float) -> dict[str, float]:
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    calibration = settings.calibration_sequences * length
    validation, test = max(2, settings.eval_sequences // 2) * length, settings.eval_sequences * length
    block_weights = sum(site.weight_count for site in layout.block_sites)
    outer_weights = sum(s.weight_count for s in layout.sites if s.block_index is None and s.kind == "linear")
    attention = 2 * layout.block_count * layout.hidden_size * length
    block_pass, outer_pass = 2.0 * (block_weights + attention), 2.0 * outer_weights
    variants = 1 + len(settings.baselines_for(layout))
    formats = len(settings.quant_formats)
    hessian = sum(2.0 * site.in_features**2 for site in layout.block_sites)
    inputs = sum(site.in_features**3 for site in layout.block_sites)
    updates = sum(2.0 * site.in_features * site.weight_count for site in layout.block_sites)
    rounding = _ROUNDING_SECONDS_PER_WEIGHT * block_weights
    measure = {
        "cmpq": calibration * (block_pass + hessian) / speed + formats * rounding,
        "tdmpq": calibration * ((4 + formats) * block_pass + 3 * outer_pass) / speed + formats * rounding,
        "pmpq": calibration * ((layout.block_count / 2) * block_pass + layout.block_count * outer_pass) / speed,
        "ablation": _ABLATION_SEQUENCES * length * formats * len(layout.sites) * (block_pass / 2 + outer_pass) / speed,
    }[settings.sensitivity]
    quantize = rounding * variants
    if settings.quantizer == "gptq":
        quantize += variants * (calibration * (2 * block_pass + hessian) + inputs + updates) / speed
    both = block_pass + outer_pass
    return {
        "measure": measure if needs_table(settings.allocator) else 0.0,
        "quantize": quantize,
        "guard": 3 * validation * both / speed,
        "evaluate": (1 + variants) * test * both / speed,
    }


def _uniform_bytes(layout: ModelLayout, settings: RunSettings, fmt: QuantFormat) -> int:
    target = find_target(settings.target)
    return target.plan_bytes(layout, {s.name: candidate_formats(s, layout, target, [fmt])[0] for s in layout.sites})


def _peak_bytes(layout: ModelLayout, settings: RunSettings, variants: int) -> int:
    """Python, the model, one block in float32 with its Hessians, and hidden states of all variants."""
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    per_block: dict[int | None, int] = {}
    hessians: dict[int | None, int] = {}
    for site in layout.block_sites:
        per_block[site.block_index] = per_block.get(site.block_index, 0) + 4 * site.weight_count
        hessians[site.block_index] = hessians.get(site.block_index, 0) + 4 * site.in_features**2
    block = 3 * max(per_block.values(), default=0) + max(hessians.values(), default=0)
    width = 4 * layout.hidden_size * length
    hidden = max(2 * settings.calibration_sequences * width, (1 + variants) * settings.eval_sequences * width)
    logits = 0 if layout.task == "encoder" else 3 * 4 * length * layout.vocabulary_size
    return _BASE_BYTES + layout.source_bytes + block + hidden + logits
