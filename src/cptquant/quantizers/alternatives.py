"""Other formats for single sites of a model that is quantized already: what a swap would put in their place.

Each is quantized as `quantize_sites` would have: on the inputs that the quantized blocks before it produce. What it
would change in the inputs of later sites, and hence in their codes, is left out, so that swaps can be judged without
quantizing anything anew.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource, read_weight, site_modules
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import InputHessians, collect_block_hessians
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.slim import Slim

Alternatives = dict[str, dict[str, StoredWeight]]
"""Site name -> format name -> weight."""


def quantize_alternatives(
    model: LoadedModel,
    quantized: WeightSource,
    formats: Mapping[str, Sequence[QuantFormat]],
    quantizer: Gptq | Rtn,
    tokens: TokenSet,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Alternatives:
    """Quantize sites inside the blocks to further formats, each by itself.

    Memory: about a byte a weight for each format, beside what `quantize_sites` takes.

    Args:
        model: never changed. quantized: the weights of the plan that the swaps start from.
        formats: site name -> formats to make; 16-bit ones are passed over, they need no making.
        tokens: calibration text, as the plan was quantized on.
        progress: called with (blocks done, blocks in all).

    Raises:
        UserError: groups of mixed width other than halves, which are not made here. DataError, ModelError: as
        `quantize_sites`.
    """
    wanted = {name: [fmt for fmt in row if not fmt.is_float] for name, row in formats.items()}
    for name, row in wanted.items():
        if any(fmt.storage == "segments" and not fmt.halves for fmt in row):
            raise UserError(
                f"--refine-swaps cannot judge groups of mixed width (at {name}), but for halves; leave slim formats out"
            )
    layout = model.layout
    dtype = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    coarse = isinstance(quantizer, Gptq) and quantizer.coarse_products
    stream = ModelStream(model, tokens, weights=quantized)
    plain = ModelStream(model, tokens.subset(torch.arange(1)))
    found: Alternatives = {}
    for index in range(layout.block_count):
        sites = [site for site in layout.sites if site.block_index == index and wanted.get(site.name)]
        if sites and isinstance(quantizer, Rtn):
            found |= {
                site.name: {fmt.name: quantizer(_weight(model, site), fmt, dtype) for fmt in wanted[site.name]}
                for site in sites
            }
        elif sites:
            plain.block_index = index
            block = plain.load_block()  # original weights, as GPTQ sees them
            modules = site_modules(block, layout, index)
            chosen = {site.name: modules[site.name] for site in sites}
            hessians = collect_block_hessians(stream, block, chosen, coarse=coarse)
            found |= _apply_gptq(model, sites, hessians, wanted, (quantizer, dtype))
        with coarse_products(coarse):
            stream.advance(stream.load_block())
        if progress is not None:
            progress(index + 1, layout.block_count)
    return found


def _apply_gptq(
    model: LoadedModel,
    sites: Sequence[Site],
    hessians: InputHessians,
    wanted: Mapping[str, Sequence[QuantFormat]],
    how: tuple[Gptq | Rtn, torch.dtype],
) -> Alternatives:
    """Sites that read the same input in the same format go together, as in `quantize_sites`."""
    quantizer, dtype = how
    found: Alternatives = {site.name: {} for site in sites}
    together: dict[tuple[str, QuantFormat], list[Site]] = {}
    for site in sites:
        for fmt in wanted[site.name]:
            if hessians.has(site.name):
                together.setdefault((hessians.leader[site.name], fmt), []).append(site)
            else:
                found[site.name][fmt.name] = Rtn()(_weight(model, site), fmt, dtype)
    for (leader, fmt), group in together.items():
        assert isinstance(quantizer, Gptq)
        weights = [_weight(model, site) for site in group]
        together_by = Slim.like(quantizer) if fmt.halves else quantizer
        results = together_by.quantize_together(weights, hessians.hessian(leader), fmt, dtype)
        for site, result in zip(group, results, strict=True):
            found[site.name][fmt.name] = result.weight
    return found


def _weight(model: LoadedModel, site: Site) -> torch.Tensor:
    return read_weight(model.module.get_submodule(site.name), site).detach()
