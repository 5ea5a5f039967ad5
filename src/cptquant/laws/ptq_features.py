"""What the law of post-training quantization looks at: numbers measured on the original model, without quantizing it.

`ModelNoise` holds them per site and format, so that any plan, uniform or mixed, is a sum over its sites:

    E_site(f)   relative output error ||(Q(W)-W)X||^2 / ||WX||^2 of rounding to nearest, X the calibration inputs
    T_site(f)   second-order KL divergence 1/2 d'Fd of that change alone (TDMPQ's default)
    g_site(f)   output error GPTQ is expected to leave, over that of rounding: sum_j e_j D_j / tr(d H d')

e_j is the squared rounding error of column j and D the diagonal of H = R R' with R upper triangular: what is left of an
input's variance once the later inputs, which GPTQ uses to compensate, are known. With errors that do not depend on each
other this is GPTQ's loss exactly (arXiv 2210.17323, step 4 of its algorithm); clipping and coordinate descent are left
to the law's intercept.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

from pydantic import NonNegativeFloat

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.forecast import Method, PlanFeatures
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout


class SiteNoise(Frozen):
    """One site in one format, rounded to nearest.

    Attributes:
        weight_error: ||Q(W)-W||^2 / ||W||^2. output_error: the same of the output, on calibration inputs.
        gptq_ratio: expected output error of GPTQ over `output_error`; 1 where GPTQ does not apply (embeddings).
        taylor_kl_nats: second-order KL divergence per token of this change alone.
    """

    weight_error: NonNegativeFloat
    output_error: NonNegativeFloat
    gptq_ratio: NonNegativeFloat
    taylor_kl_nats: NonNegativeFloat


class Landscape(Frozen):
    """Loss along the direction in which rounding to nearest moves the weights; 1 is the rounded model itself.

    Attributes:
        half_kl_nats, full_kl_nats: KL(original ‖ moved) per token, half way and all the way.
        minus_half_rise_nats, half_rise_nats, full_rise_nats: rise of the text's NLL per token at -1/2, 1/2 and 1.
    """

    half_kl_nats: float
    full_kl_nats: float
    minus_half_rise_nats: float
    half_rise_nats: float
    full_rise_nats: float

    @property
    def slope(self) -> float:
        """Central difference of the NLL at the original, nats per token for the whole way."""
        return self.half_rise_nats - self.minus_half_rise_nats

    @property
    def curvature(self) -> float:
        """Second difference of the NLL at the original, nats per token for the whole way squared."""
        return 4 * (self.half_rise_nats + self.minus_half_rise_nats)


class ModelNoise(Artifact):
    """What `predict` measures on a model.

    Attributes:
        model: as the person named it. parameters: all of them, shared tensors once.
        tokens_seen: training tokens, where known.
        nll_nats_per_token: of the original on the text the features were measured on.
        sites: site name -> format name -> noise; every integer format that was asked for and is legal there.
        random_kl_nats: relative radius (noise over weights, both root mean square) -> KL per token along random
            directions of the blocks' linear weights, rows scaled alike.
        landscapes: plan name -> loss along its rounding direction; may be empty.
        text: description of the text.
    """

    SCHEMA: ClassVar[str] = "cptquant.model_noise"
    MADE_BY: ClassVar[str] = "cptquant predict MODEL"

    model: str
    architecture: str
    parameters: int
    tokens_seen: float | None
    nll_nats_per_token: float
    sites: dict[str, dict[str, SiteNoise]]
    random_kl_nats: dict[str, float]
    landscapes: dict[str, Landscape]
    text: str


def plan_features(
    noise: ModelNoise, layout: ModelLayout, formats: Mapping[str, QuantFormat], method: Method, plan_name: str
) -> PlanFeatures:
    """Add a plan up over its sites.

    Args:
        formats: format of every site; 16-bit ones add nothing.
        method: of the two kinds of GPTQ the features are the same; the law's intercept tells them apart.
        plan_name: key of `noise.landscapes`; without such an entry those features are None.

    Raises:
        KeyError: a site's format was not measured.
    """
    means = dict.fromkeys(("code_bits", "group_columns", "sqnr_db", "output_error"), 0.0)
    weights = sum(site.weight_count for site in layout.block_sites)
    taylor = rounded = 0.0
    for site in layout.sites:
        fmt = formats[site.name]
        found = None if fmt.is_float else noise.sites[site.name][fmt.name]
        ratio = 0.0 if found is None else 1.0 if method == "rtn" else found.gptq_ratio
        taylor += 0.0 if found is None else found.taylor_kl_nats * ratio
        rounded += 0.0 if found is None else found.taylor_kl_nats
        if site.block_index is None:
            continue
        share = site.weight_count / weights
        means["code_bits"] += share * fmt.code_bits
        means["group_columns"] += share * (
            fmt.granularity if isinstance(fmt.granularity, int) and not fmt.is_float else site.in_features
        )
        error = _FLOAT16_ERROR if found is None else max(found.weight_error, _FLOAT16_ERROR)
        means["sqnr_db"] -= share * 10 * math.log10(error)
        means["output_error"] += share * (0.0 if found is None else found.output_error * ratio)
    radii = sorted(noise.random_kl_nats, key=float)
    low, high = radii[0], radii[-1]
    landscape = noise.landscapes.get(plan_name)
    return PlanFeatures(
        method=method,
        parameters=float(noise.parameters),
        tokens_seen=noise.tokens_seen,
        nll_nats=noise.nll_nats_per_token,
        bits_per_weight=8 * layout.block_site_bytes(dict(formats)) / weights,
        **means,
        taylor_kl_nats=taylor,
        method_ratio=taylor / rounded if rounded > 0 else 1.0,
        random_curvature=noise.random_kl_nats[low] / float(low) ** 2,
        random_growth=math.log(noise.random_kl_nats[high] / noise.random_kl_nats[low])
        / math.log((float(high) / float(low)) ** 2),
        half_kl_nats=None if landscape is None else landscape.half_kl_nats,
        slope=None if landscape is None else landscape.slope,
        curvature=None if landscape is None else landscape.curvature,
        rtn_kl_nats=None if landscape is None else landscape.full_kl_nats,
        rtn_rise_nats=None if landscape is None else landscape.full_rise_nats,
    )


_FLOAT16_ERROR = 2.0**-22 / 12
"""Relative squared error of float16: its SQNR bounds what a kept site contributes."""
