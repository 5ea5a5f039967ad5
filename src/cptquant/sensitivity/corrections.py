"""Formats with a correction, whatever method scores: the damage of their codes times what the correction leaves.

Methods round to nearest without a look at the inputs; what is corrected is chosen by them. So a method scores the codes
alone (`int3-g64` for `int3-g64-c2` and `int3-g64-r4`), and the damage is scaled by a power of what the correction
leaves of the output error of rounding (`ColumnSearch`, `LowRankSearch`), from the second moments of the site's inputs
in the original model.

A power because GPTQ and its descent make up for much of the same error. Columns: the root, over 11 sites of two models,
codes of 2, 3 and 4 bits and 1, 2 and 4 % of the columns (99 cells, benchmarks/columns_construction.py) 3 % too high in
the mean and off by 10 % (standard deviation of the logarithm). Low rank: powers by width, chosen on the same sites with
ranks 1, 2, 4 and 8 (132 cells), on which they are right in the mean to 1 % and off by 8 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import Progress
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.corrected import ColumnSearch
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import InputHessians, collect_block_hessians, collect_outer_hessians
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.low_rank import LowRankSearch
from cptquant.sensitivity.perturbation import original_weight, scale_dtype
from cptquant.sensitivity.scores import Scores, SiteFormats

_SEQUENCES = 32
"""Calibration sequences, evenly spread, whose inputs say what is corrected; fewer if fewer are given."""
_ROWS = 128
"""Rows of a matrix, evenly spread, that are rounded; all rows of a matrix read the same inputs."""
_LOW_RANK_ROWS = 1024
"""Rows whose leading directions are looked for: those of few rows hold more of them than those of all."""
_COLUMNS_POWER = 0.5
_LOW_RANK_POWER = {2: 0.89, 3: 0.72, 4: 0.56}
"""By code bits; of wider codes as of the widest here."""
RULE_TEXT = (
    "damage of the codes alone x what the correction leaves of the output error of rounding, to the power of "
    f"{_COLUMNS_POWER:g} (columns) or {', '.join(f'{p:g} at {b} bits' for b, p in _LOW_RANK_POWER.items())} (low rank)"
)


def without_corrections(formats: SiteFormats) -> dict[str, tuple[QuantFormat, ...]]:
    """Site name -> its formats with the codes alone in the place of corrected ones, without repeats."""
    return {name: tuple(dict.fromkeys(fmt.base for fmt in row)) for name, row in formats.items()}


def corrected_formats(formats: SiteFormats) -> dict[str, tuple[QuantFormat, ...]]:
    """Site name -> its formats with a correction; sites without any are left out."""
    found = {name: tuple(fmt for fmt in row if fmt.is_corrected) for name, row in formats.items()}
    return {name: row for name, row in found.items() if row}


def add_corrections(
    model: LoadedModel, tokens: TokenSet, formats: SiteFormats, scores: Scores, progress: Progress
) -> Scores:
    """The scores of `without_corrections(formats)`, with damages of corrected formats beside them.

    Costs a forward pass on `_SEQUENCES` sequences with the second moments of every such site's inputs, and a site and
    column format five roundings of `_ROWS` rows, a site and rank one, and a site with ranks a randomised SVD.
    """
    corrected = corrected_formats(formats)
    ratios = correction_ratios(model, tokens, corrected, progress)
    damages = {name: dict(row) for name, row in scores.damages.items()}
    for name, row in ratios.items():
        codes = {fmt.name: damages[name][fmt.base.name] for fmt in corrected[name]}
        damages[name] |= {fmt: codes[fmt].scaled(ratio) for fmt, ratio in row.items()}
    used = min(_SEQUENCES, tokens.sequence_count)
    metadata = {**scores.metadata, "corrections": RULE_TEXT, "corrections_sequences": used}
    return replace(scores, damages=damages, metadata=metadata)


def correction_ratios(
    model: LoadedModel, tokens: TokenSet, formats: Mapping[str, Sequence[QuantFormat]], progress: Progress
) -> dict[str, dict[str, float]]:
    """What a correction should leave of each site's damage after GPTQ, 0 to 1: site name -> format name -> ratio.

    Args:
        model: never changed. tokens: calibration text. formats: site name -> formats with a correction.
    """
    count = min(_SEQUENCES, tokens.sequence_count)
    spread = torch.linspace(0, tokens.sequence_count - 1, count).round().long()
    stream = ModelStream(model, tokens.subset(spread))
    layout, dtype = model.layout, scale_dtype(model.layout)
    found: dict[str, dict[str, float]] = {}

    def look(hessians: InputHessians, names: Sequence[str]) -> None:
        damped: dict[str, Tensor] = {}
        for name in names:
            site = layout.site_by_name[name]
            if not hessians.has(name):  # the text never reached this site: its weights alone decide
                moment = torch.eye(site.in_features)
            else:
                leader = hessians.leader[name]
                if leader not in damped:
                    damped[leader] = factor_hessian(
                        hessians.hessian(leader), Gptq().damping, by_activation=False
                    ).damped  # fmt: skip
                moment = damped[leader]
            weight = original_weight(model, site)
            found[name] = _ratios(weight, moment, formats[name], dtype)

    for index in range(layout.block_count):
        block = stream.load_block()
        modules = {name: module for name, module in site_modules(block, layout, index).items() if name in formats}
        if modules:
            look(collect_block_hessians(stream, block, modules, coarse=True), list(modules))
        with coarse_products(True):
            stream.advance(block)
        progress("corrections", index + 1, layout.block_count)
    outside: dict[str, nn.Module] = {n: m for n, m in stream.outer_modules().items() if n in formats}
    if outside:
        look(collect_outer_hessians(stream, outside, coarse=True), list(outside))
    return found


def _ratios(
    weight: Tensor,  # (out_features, in_features), any float dtype
    moment: Tensor,  # (in_features, in_features) float32, positive definite
    formats: Sequence[QuantFormat],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Format name -> ratio, of one site."""
    search = ColumnSearch(_some_rows(weight, _ROWS), moment, dtype)
    widest = sorted((fmt for fmt in formats if fmt.storage == "columns"), key=lambda fmt: -fmt.column_share)
    found = {fmt.name: search.find(fmt).ratio ** _COLUMNS_POWER for fmt in widest}
    ranked = [fmt for fmt in formats if fmt.storage == "low-rank"]
    if ranked:
        rows = _some_rows(weight, _LOW_RANK_ROWS)
        products = LowRankSearch(rows, moment, dtype, _spread(len(rows), _ROWS))
        ratios = {rank: products.ratio(rank) for rank in sorted({fmt.rank for fmt in ranked}, reverse=True)}
        found |= {fmt.name: ratios[fmt.rank] ** low_rank_power(fmt) for fmt in ranked}
    return found


def low_rank_power(fmt: QuantFormat) -> float:
    """What turns the ratio of rounding into that of GPTQ."""
    return _LOW_RANK_POWER[min(fmt.code_bits, max(_LOW_RANK_POWER))]


def _spread(rows: int, count: int) -> Tensor:
    """Numbers of at most so many rows, evenly spread."""
    return torch.linspace(0, rows - 1, min(count, rows)).round().long()


def _some_rows(weight: Tensor, count: int) -> Tensor:
    """At most so many, evenly spread, float32."""
    return weight[_spread(len(weight), count)].float()
