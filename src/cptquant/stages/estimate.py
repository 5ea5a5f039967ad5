"""`quantize --dry-run`: sizes exactly, time and memory roughly, before either is spent.

Time is counted in matrix products (multiply-adds, two operations each) divided by the speed of such products measured
now, in float32 and in the arithmetic of the calibration passes, plus what costs time by the weight or by the column.
Constants were fitted to the stages of `benchmarks/rehearsal.py` and `benchmarks/end_to_end.py`; expect half to twice
the time.
"""

import math
import time
from dataclasses import dataclass

import torch

from cptquant.allocation.reach import check_budget, find_reach
from cptquant.allocation.swaps import SwapSearch
from cptquant.core.estimate import RunEstimate
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import RunSettings
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import read_layout
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks
from cptquant.quantizers.methods import Quantizer, find_quantizer
from cptquant.quantizers.signround import SignRound
from cptquant.sensitivity.path_integral import PathIntegral
from cptquant.sensitivity.sketch import OUTPUT_ENTRIES, Sketch
from cptquant.sensitivity.taylor import Tdmpq
from cptquant.stages.allocate import needs_table
from cptquant.stages.check import check_choices, check_target

_STACK_BYTES = 300_000_000
"""A stack of rows on its way through GPTQ and descent, at most."""
_BASE_BYTES = 550_000_000
"""Resident set of Python with torch and transformers imported."""
_EFFICIENCY = 0.75
"""Share of the measured matrix-product speed that whole passes reach; attention, norms and copies take the rest."""
_COARSE_EFFICIENCY = 0.5
"""The same in the calibration passes, where products are faster and the rest weighs more."""
_ROUNDING_SECONDS_PER_WEIGHT = 2.5e-8
"""Grid search of one weight in one format on two cores of a current server processor."""
_SECONDS_PER_COLUMN = 4e-4
"""Rounding one column of one input's matrices in GPTQ and in the rounds of descent: calls, not arithmetic."""
_SECONDS_PER_BLOCK_AND_SEQUENCE = 0.01
"""Running a block for one sequence, forth and back, in TDMPQ: the same."""
_DESCENT_PRODUCTS = 11
"""Products of the Hessian with the weight: GPTQ's own, and two and a half in each of four rounds of descent."""
_SECONDS_PER_LOGIT = 2.5e-9
"""Softmax, logarithms and sums of the divergence."""
_LEARNED_BYTES_PER_WEIGHT, _ACTIVATIONS_PER_WIDTH = 18, 40
"""Of `kl_rounding`: weights twice, offsets, momentum and codes; numbers a block keeps for each number of a token."""
_SECONDS_PER_LEARNED_WEIGHT = 5e-8
"""One step of a code and its scale in learned rounding: some fifteen passes over memory."""
_WRITING_PASSES = 3
"""Time of a token the model writes, one after the other, in passes over tokens that are all there."""
_ABLATION_SEQUENCES = 16


def estimate_run(settings: RunSettings) -> RunEstimate:
    """Expected sizes, time and memory of `quantize` with these settings.

    Raises:
        UserError: as `quantize` would, for everything that can be known without the weights.
    """
    check_choices(settings)
    layout = read_layout(settings.model, trust_remote_code=settings.trust_remote_code)
    settings = settings.model_copy(update={"quantizer": settings.quantizer_for(layout)})
    budget, target = settings.budget_for(layout), find_target(settings.target)
    check_target(layout, settings.target)
    check_budget(layout, budget, target, settings.formats_for(layout))
    reach = find_reach(layout, budget, target, settings.formats_for(layout))
    limit = budget.limit_bytes(layout)
    speed = _measure_flops_per_second()
    with coarse_products():
        coarse_speed = _measure_flops_per_second()
    seconds = _stage_seconds(layout, settings, speed * _EFFICIENCY, coarse_speed * _COARSE_EFFICIENCY)
    variants = 1 + len(settings.baselines_for(layout))
    return RunEstimate(
        model=settings.model,
        parameters=layout.parameters,
        source_bytes=layout.source_bytes,
        budget=budget.text,
        limit_bytes=limit,
        smallest_bytes=reach.smallest_bytes,
        largest_bytes=reach.bytes_at_16_bit,
        uniform_bytes={fmt.name: _uniform_bytes(layout, settings, fmt) for fmt in settings.formats_for(layout)},
        stage_seconds=seconds,
        wall_seconds=sum(seconds.values()),
        peak_memory_bytes=_peak_bytes(layout, settings, variants),
        disk_bytes=(1 + variants) * min(limit, layout.bytes_at_16_bit),
        flops_per_second=speed,
    )


def _measure_flops_per_second(size: int = 1024, repeats: int = 12) -> float:
    """The best of a few matrix products of float32 tensors."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True)
class _Counts:
    """What a model costs: operations for one token in the blocks and outside them, Hessians, GPTQ."""

    block_pass: float
    outer_pass: float
    hessian: float
    factor: float
    update: float
    columns: int
    block_weights: int
    outer_weights: int


def _count(layout: ModelLayout, length: int) -> _Counts:
    outer = [site for site in layout.sites if site.block_index is None]
    # Sites that are tied (q/k/v, gate/up) read one input: one Hessian, one pass over its columns.
    first_of_tie = {site for tie in layout.ties for site in tie.sites[1:]}
    inputs = [site for site in layout.block_sites if site.name not in first_of_tie]
    block_weights = sum(site.weight_count for site in layout.block_sites)
    return _Counts(
        block_pass=2.0 * (block_weights + 2 * layout.block_count * layout.hidden_size * length),
        outer_pass=2.0 * sum(site.weight_count for site in outer if site.kind == "linear"),
        hessian=sum(1.25 * site.in_features**2 for site in inputs),
        factor=sum(1.0 * site.in_features**3 for site in inputs),
        update=sum(2.0 * site.in_features * site.weight_count for site in layout.block_sites),
        columns=sum(site.in_features for site in inputs),
        block_weights=block_weights,
        outer_weights=sum(site.weight_count for site in outer),
    )


def _stage_seconds(layout: ModelLayout, settings: RunSettings, speed: float, coarse_speed: float) -> dict[str, float]:
    """Args: speed, coarse_speed: operations a second that passes reach in float32 and in calibration."""
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    validation, test = max(2, settings.eval_sequences // 2) * length, settings.eval_sequences * length
    refined = settings.refine_swaps > 0
    cost, variants = _count(layout, length), 1 + len(settings.baselines_for(layout)) + refined
    read, written = _sequences(layout, settings), settings.own_text_for(layout) * length
    per_token = (cost.block_pass + cost.outer_pass) / speed + _SECONDS_PER_LOGIT * layout.vocabulary_size
    return {
        "measure": _measure_seconds(layout, settings, cost, speed, coarse_speed)
        if needs_table(settings.allocator)
        else 0.0,
        "quantize": variants * _quantize_seconds(settings, cost, read, length, speed, coarse_speed)
        + written * _WRITING_PASSES * (cost.block_pass + cost.outer_pass) / speed,
        "guard": (1 + variants - ("random" in settings.baselines_for(layout))) * validation * per_token,
        "evaluate": (1 + variants) * test * per_token,
    } | ({"swaps": _swap_seconds(layout, settings, cost, speed, coarse_speed)} if refined else {})


def _swap_seconds(
    layout: ModelLayout, settings: RunSettings, cost: _Counts, speed: float, coarse_speed: float
) -> float:
    """Two neighbouring formats of every site, and the search: half a pass for each plan and sequence it judges."""
    search = SwapSearch(rounds=settings.refine_swaps)
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    rungs = 1 + math.log2(search.moves) / 2
    judged = (2 * len(layout.block_sites) + rungs * search.moves) * search.first_sequences
    judged += 1.5 * settings.calibration_sequences  # the last two and what they are compared with, on half the text
    passes = (cost.block_pass / 2 + cost.outer_pass) / speed + _SECONDS_PER_LOGIT * layout.vocabulary_size / 2
    as_gptq = settings.model_copy(update={"quantizer": "gptq"})
    neighbours = 2 * _quantize_seconds(as_gptq, cost, _sequences(layout, settings), length, speed, coarse_speed)
    return neighbours + search.rounds * judged * length * passes


def _quantize_seconds(
    settings: RunSettings, cost: _Counts, sequences: int, length: int, speed: float, coarse_speed: float
) -> float:
    seconds = _ROUNDING_SECONDS_PER_WEIGHT * (cost.block_weights + cost.outer_weights)
    if settings.quantizer != "rtn":
        seconds += sequences * length * (2 * cost.block_pass + cost.hessian) / coarse_speed
        seconds += (cost.factor + _DESCENT_PRODUCTS * cost.update) / speed + _SECONDS_PER_COLUMN * cost.columns
    return seconds + _learning_seconds(settings, cost, sequences, length, coarse_speed)


def _sequences(layout: ModelLayout, settings: RunSettings) -> int:
    """What the quantizer reads: the person's text, and what the model writes itself."""
    return settings.calibration_sequences + settings.own_text_for(layout)


def _learning_seconds(settings: RunSettings, cost: _Counts, sequences: int, length: int, coarse_speed: float) -> float:
    """Gradient steps of learned rounding: a pass forth and back (three passes' products), one of the original where the
    whole model is learned, and the step itself."""
    method = _quantizer(settings)
    if isinstance(method, KlRounding) and isinstance(method.start, LearnedBlocks):
        seconds = _training_seconds(method.start, sequences, cost, length, coarse_speed)
    elif isinstance(method, LearnedBlocks):
        return _training_seconds(method, sequences, cost, length, coarse_speed)
    elif not isinstance(method, SignRound | KlRounding):
        return 0.0
    else:
        seconds = 0.0
    per_token = 3 * cost.block_pass
    batch = 8
    if isinstance(method, KlRounding):
        per_token, batch = per_token + cost.block_pass + 4 * cost.outer_pass, method.batch_sequences
    per_step = batch * length * per_token / coarse_speed + _SECONDS_PER_LEARNED_WEIGHT * cost.block_weights
    return seconds + method.steps * per_step


def _training_seconds(method: LearnedBlocks, sequences: int, cost: _Counts, length: int, coarse_speed: float) -> float:
    """Block-AP: gradient steps as above, and one pass of the original and of the quantized block over its text."""
    passes = method.passes(sequences)
    products = sequences * length * (3 * passes + 2) * cost.block_pass / coarse_speed
    steps = passes * sequences / method.method.pace.batch_sequences
    return products + steps * _SECONDS_PER_LEARNED_WEIGHT * cost.block_weights


def _quantizer(settings: RunSettings) -> Quantizer:
    assert settings.quantizer is not None  # `estimate_run` has settled it
    return find_quantizer(settings.quantizer)


def _measure_seconds(
    layout: ModelLayout, settings: RunSettings, cost: _Counts, speed: float, coarse_speed: float
) -> float:
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    calibration, formats = settings.calibration_sequences * length, len(settings.formats_for(layout))
    rounding = formats * _ROUNDING_SECONDS_PER_WEIGHT * (cost.block_weights + cost.outer_weights)
    method, both = Tdmpq(), cost.block_pass + cost.outer_pass
    if settings.sensitivity == "tdmpq":
        sequences = min(method.sequences, settings.calibration_sequences)
        tokens = sequences * length
        passes = tokens * (4 * cost.block_pass + 2 * cost.outer_pass) / coarse_speed
        outside = 4 * min(method.outside_sequences, sequences) * length * cost.block_pass / speed
        calls = _SECONDS_PER_BLOCK_AND_SEQUENCE * layout.block_count * sequences
        return passes + outside + calls + rounding + 2 * _SECONDS_PER_LOGIT * tokens * layout.vocabulary_size
    if settings.sensitivity == "cmpq":
        return calibration * (cost.block_pass + cost.hessian) / speed + rounding
    if settings.sensitivity == "pmpq":
        return 3 * calibration * layout.block_count * (cost.block_pass / 2 + cost.outer_pass) / speed + rounding
    if settings.sensitivity == "path":
        path = PathIntegral()
        tokens = min(path.sequences, settings.calibration_sequences) * length
        passes = formats * path.points * tokens * (4 * cost.block_pass + 4 * cost.outer_pass) / speed
        outside = 4 * min(path.outside_sequences, settings.calibration_sequences) * length * cost.block_pass / speed
        logits = 2 * _SECONDS_PER_LOGIT * formats * path.points * tokens * layout.vocabulary_size
        calls = _SECONDS_PER_BLOCK_AND_SEQUENCE * layout.block_count * path.sequences * formats * path.points
        return passes + outside + logits + calls + 2 * rounding
    changes = formats * len(layout.sites)
    each = both - cost.block_pass / 2
    if settings.sensitivity == "sketch":
        sketch = Sketch()
        tokens = min(sketch.sequences, settings.calibration_sequences) * length
        logits = 3 * _SECONDS_PER_LOGIT * min(tokens * layout.vocabulary_size, OUTPUT_ENTRIES)
        return changes * (tokens * each / speed + logits) + rounding
    return _ABLATION_SEQUENCES * length * changes * each / speed + rounding


def _uniform_bytes(layout: ModelLayout, settings: RunSettings, fmt: QuantFormat) -> int:
    target = find_target(settings.target)
    return target.plan_bytes(layout, {s.name: candidate_formats(s, layout, target, [fmt])[0] for s in layout.sites})


def _peak_bytes(layout: ModelLayout, settings: RunSettings, variants: int) -> int:
    """Python, the model, and the most that a stage holds beside it: measuring, quantizing or evaluating."""
    length = min(settings.sequence_length, layout.max_positions or settings.sequence_length)
    per_block: dict[int | None, int] = {}
    for site in layout.block_sites:
        per_block[site.block_index] = per_block.get(site.block_index, 0) + 4 * site.weight_count
    block = max(per_block.values(), default=0)
    widest = max((4 * site.in_features**2 for site in layout.block_sites), default=0)
    outer_codes = max((site.weight_count for site in layout.sites if site.block_index is None), default=0)
    width = 4 * layout.hidden_size * length
    logits = 0 if layout.task == "encoder" else min(4 * length * layout.vocabulary_size, 80 << 20)
    changes = min(len(settings.formats_for(layout)) * block, 224 << 20)
    inputs = min(32 * layout.block_count * width // 2, 256 << 20)
    measure = 4 * block + changes + inputs + 2 * outer_codes + 3 * logits
    quantize = 3 * block + 8 * widest + 2 * _sequences(layout, settings) * width + _STACK_BYTES
    method = _quantizer(settings)
    if isinstance(method, LearnedBlocks):
        activations = _ACTIVATIONS_PER_WIDTH * method.method.pace.batch_sequences * width
        quantize = max(quantize, 8 * block + 2 * _sequences(layout, settings) * width + activations)
    if isinstance(method, KlRounding):
        activations = _ACTIVATIONS_PER_WIDTH * layout.block_count * method.batch_sequences * width
        weights = _LEARNED_BYTES_PER_WEIGHT * sum(site.weight_count for site in layout.block_sites)
        quantize = max(quantize, weights + 2 * _sequences(layout, settings) * width + min(activations, 1 << 30))
    evaluate = 2 * block + (1 + variants) * settings.eval_sequences * width + 5 * logits
    return (
        _BASE_BYTES + layout.source_bytes + max(measure if needs_table(settings.allocator) else 0, quantize, evaluate)
    )
