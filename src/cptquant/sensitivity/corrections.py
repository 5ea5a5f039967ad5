"""Formats with corrected columns, whatever method scores: the damage of their codes times what the correction leaves.

Methods round to nearest without a look at the inputs; the columns that a correction is for are chosen by them. So a
method scores the codes alone (`int3-g64` for `int3-g64-c2`), and the damage is scaled by the square root of what the
correction leaves of the output error of rounding (`ColumnSearch`), from the second moments of the site's inputs in the
original model.

The root because GPTQ and its descent make up for much of the same error: over 11 sites of two models, codes of 2, 3 and
4 bits and 1, 2 and 4 % of the columns (99 cells, benchmarks/columns_construction.py), it is 3 % too high in the mean,
and off by 10 % (standard deviation of the logarithm), at a small part of GPTQ's seconds.
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
from cptquant.sensitivity.perturbation import original_weight, scale_dtype
from cptquant.sensitivity.scores import Scores, SiteFormats

_SEQUENCES = 32
"""Calibration sequences, evenly spread, whose inputs say which columns are corrected; fewer if fewer are given."""
_ROWS = 128
"""Rows of a matrix, evenly spread, that are looked at; all rows of a matrix read the same inputs."""
RULE_TEXT = "damage of the codes alone x root of what correcting columns leaves of the output error of rounding"


def without_corrections(formats: SiteFormats) -> dict[str, tuple[QuantFormat, ...]]:
    """Site name -> its formats with the codes alone in the place of corrected columns, without repeats."""
    return {name: tuple(dict.fromkeys(fmt.base for fmt in row)) for name, row in formats.items()}


def corrected_formats(formats: SiteFormats) -> dict[str, tuple[QuantFormat, ...]]:
    """Site name -> its formats with corrected columns; sites without any are left out."""
    found = {name: tuple(fmt for fmt in row if fmt.storage == "columns") for name, row in formats.items()}
    return {name: row for name, row in found.items() if row}


def add_corrections(
    model: LoadedModel, tokens: TokenSet, formats: SiteFormats, scores: Scores, progress: Progress
) -> Scores:
    """The scores of `without_corrections(formats)`, with damages of corrected columns beside them.

    Costs a forward pass on `_SEQUENCES` sequences with the second moments of every such site's inputs, and five
    roundings of `_ROWS` rows a site and format.
    """
    corrected = corrected_formats(formats)
    ratios = correction_ratios(model, tokens, corrected, progress)
    damages = {name: dict(row) for name, row in scores.damages.items()}
    for name, row in ratios.items():
        codes = {fmt.name: damages[name][fmt.base.name] for fmt in corrected[name]}
        damages[name] |= {fmt: codes[fmt].scaled(ratio) for fmt, ratio in row.items()}
    used = min(_SEQUENCES, tokens.sequence_count)
    metadata = {**scores.metadata, "corrected_columns": RULE_TEXT, "corrected_columns_sequences": used}
    return replace(scores, damages=damages, metadata=metadata)


def correction_ratios(
    model: LoadedModel, tokens: TokenSet, formats: Mapping[str, Sequence[QuantFormat]], progress: Progress
) -> dict[str, dict[str, float]]:
    """What correcting columns should leave of each site's damage after GPTQ, 0 to 1: site name -> format name -> ratio.

    Args:
        model: never changed. tokens: calibration text. formats: site name -> formats with corrected columns.
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
            rows = torch.linspace(0, site.out_features - 1, min(_ROWS, site.out_features)).round().long()
            weight = original_weight(model, site)[rows].float()
            search = ColumnSearch(weight, moment, dtype)
            widest = sorted(formats[name], key=lambda fmt: -fmt.column_share)
            found[name] = {fmt.name: search.find(fmt).ratio ** 0.5 for fmt in widest}

    for index in range(layout.block_count):
        block = stream.load_block()
        modules = {name: module for name, module in site_modules(block, layout, index).items() if name in formats}
        if modules:
            look(collect_block_hessians(stream, block, modules, coarse=True), list(modules))
        with coarse_products(True):
            stream.advance(block)
        progress("corrected columns", index + 1, layout.block_count)
    outside: dict[str, nn.Module] = {n: m for n, m in stream.outer_modules().items() if n in formats}
    if outside:
        look(collect_outer_hessians(stream, outside, coarse=True), list(outside))
    return found
