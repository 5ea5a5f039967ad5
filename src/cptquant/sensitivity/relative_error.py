"""How wrong a site's own output becomes in a format: what turns one score per block into a damage per site and format.

output:  ||(Q(W) - W) X||^2 / ||W X||^2 over the calibration inputs X, through their second moments H = X X'
weight:  ||Q(W) - W||^2 / ||W||^2, the same with H = I: needs no text
bare:    4^(-bits), the same for all sites: the block's score alone decides
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.hessian import InputHessians, collect_block_hessians, collect_outer_hessians
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import original_weight, perturb

ErrorRule = Literal["output", "weight", "bare"]

RULE_TEXT = {
    "output": "relative error = ||(Q(W)-W)X||^2 / ||WX||^2 on calibration inputs, Q = round to nearest",
    "weight": "relative error = ||Q(W)-W||^2 / ||W||^2, Q = round to nearest",
    "bare": "relative error = 4^(-code bits): the score alone tells sites apart",
}

_ROWS_AT_ONCE = 1 << 22  # entries of an embedding table compared at a time


def relative_errors(
    model: LoadedModel,
    tokens: TokenSet,
    formats: Mapping[str, tuple[QuantFormat, ...]],
    rule: ErrorRule,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Relative error of each site in each of its integer formats, by the rule.

    Args:
        model: never changed. tokens: calibration text ("output" only).
        formats: site name -> integer formats. progress: told of blocks done.

    Returns:
        Site name -> format name -> error; 0 is exact, 1 as wrong as an output of zero.
    """
    if rule == "bare":
        return {name: {fmt.name: 4.0**-fmt.code_bits for fmt in row} for name, row in formats.items()}
    if rule == "weight":
        return {name: _errors(model, model.layout.site_by_name[name], row, None) for name, row in formats.items()}
    return _output_errors(model, tokens, formats, progress)


def _output_errors(
    model: LoadedModel, tokens: TokenSet, formats: Mapping[str, tuple[QuantFormat, ...]], progress: Progress
) -> dict[str, dict[str, float]]:
    layout = model.layout
    stream = ModelStream(model, tokens)
    errors: dict[str, dict[str, float]] = {}

    def measure(hessians: InputHessians, names: list[str]) -> None:
        for name in names:
            moment = hessians.hessian(name) if hessians.has(name) else None  # None: the text never reached this site
            errors[name] = _errors(model, layout.site_by_name[name], formats[name], moment)

    for index in range(layout.block_count):
        block = stream.load_block()
        modules = {name: module for name, module in site_modules(block, layout, index).items() if name in formats}
        if modules:
            measure(collect_block_hessians(stream, block, modules), list(modules))
        stream.advance(block)
        progress("relative output errors", index + 1, layout.block_count)
    outside = {name: module for name, module in stream.outer_modules().items() if name in formats}
    counts = torch.bincount(tokens.input_ids[tokens.attention_mask.bool()], minlength=layout.vocabulary_size)
    for name in outside:
        site = layout.site_by_name[name]
        if site.kind == "embedding":
            errors[name] = embedding_errors(model, site, formats[name], counts)
    # The text passes sites before the blocks again whenever the model is finished, so one pass serves both ends.
    linear = [name for name in outside if name not in errors]
    if linear:
        measure(collect_outer_hessians(stream, {name: outside[name] for name in linear}), linear)
    return {name: errors[name] for name in formats}


def _errors(
    model: LoadedModel,
    site: Site,
    formats: tuple[QuantFormat, ...],
    moment: Tensor | None,  # (in_features, in_features); None stands for the identity
) -> dict[str, float]:
    weight = original_weight(model, site).float()
    norm = _quadratic(weight, moment)
    return {
        fmt.name: _quadratic(perturb(weight, fmt, model.layout, Rtn()), moment) / norm if norm else 0.0
        for fmt in formats
    }


def _quadratic(
    matrix: Tensor,  # (out_features, in_features)
    moment: Tensor | None,  # (in_features, in_features)
) -> float:
    """trace(M H M')."""
    mapped = matrix if moment is None else matrix @ moment
    return max(0.0, float((mapped * matrix).sum(dtype=torch.float64)))


def embedding_errors(
    model: LoadedModel,
    site: Site,
    formats: tuple[QuantFormat, ...],
    counts: Tensor,  # (vocabulary,) how often each token occurs
) -> dict[str, float]:
    """An embedding's input is one-hot, so its second moments are the token counts: rows count as often as they occur.

    Rows are taken some at a time (formats of embeddings are row by row, so this changes nothing but the memory).
    """
    weight = original_weight(model, site)
    used = counts[: len(weight)].nonzero().flatten()
    step = max(1, _ROWS_AT_ONCE // weight.shape[1])
    norm, sums = 0.0, dict.fromkeys((fmt.name for fmt in formats), 0.0)
    for rows in used.split(step):
        part, often = weight[rows].float(), counts[rows].double().unsqueeze(1)
        norm += float((part.double().square() * often).sum())
        for fmt in formats:
            delta = perturb(part, fmt, model.layout, Rtn())
            sums[fmt.name] += float((delta.double().square() * often).sum())
    return {name: total / norm if norm else 0.0 for name, total in sums.items()}
