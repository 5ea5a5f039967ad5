"""Where a matrix is sensitive inside: the salience of its groups of input columns (SliM-LLM, arXiv 2405.14917).

Definition and departures: `quantizers/salience.py`. Here inputs are those of the original model, so that the map can be
looked at before anything is quantized; SliM-LLM itself takes the inputs that the quantized blocks before produce.
"""

from torch import Tensor

from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.hessian import collect_block_hessians
from cptquant.quantizers.hessian_factor import factor_hessian
from cptquant.quantizers.salience import group_salience
from cptquant.sensitivity.perturbation import original_weight


def measure_group_salience(
    model: LoadedModel, tokens: TokenSet, group_columns: int, *, damping: float = 0.01
) -> dict[str, Tensor]:
    """Mean salience of every group of columns, site by site, for the linear sites of the blocks.

    Args:
        model: never changed. tokens: calibration text.
        group_columns: columns per group; the last group of a row may be shorter.
        damping: fraction of the mean diagonal added to the Hessian.

    Returns:
        Site name -> float32 (groups,), squared output per token; sites that the text never reached are left out.
    """
    stream = ModelStream(model, tokens)
    found: dict[str, Tensor] = {}
    for index in range(model.layout.block_count):
        block = stream.load_block()
        hessians = collect_block_hessians(stream, block, site_modules(block, model.layout, index))
        for name in hessians.modules:
            if hessians.has(name):
                pivots = factor_hessian(hessians.hessian(name), damping, by_activation=False).pivots
                weight = original_weight(model, model.layout.site_by_name[name])
                found[name] = group_salience(weight, pivots, group_columns)
        stream.advance(block)
    return found
