"""Observations drawn from a law that is known."""

import math

import numpy as np

from cptquant.core.forecast import PlanFeatures
from cptquant.laws.ptq_table import PtqObservation

PLANTED = {"rtn": 0.1, "gptq": -0.2, "gptq + own text": -0.35, "block-ap + own text": -0.6}
POWER, BEND, CORRECTION = 1.05, 0.8, 0.9
PER_KL, PER_SLOPE = 1.02, 0.7


def made_features(
    *, method: str = "rtn", taylor: float = 0.02, full_over_taylor: float = 1.1, parameters: float = 1e6, **changes
) -> PlanFeatures:
    ratio = 1.0 if method == "rtn" else 0.4
    values = {
        "method": method, "parameters": parameters, "tokens_seen": 20 * parameters, "nll_nats": 3.0,
        "bits_per_weight": 3.25, "code_bits": 3.0, "group_columns": 64.0, "sqnr_db": 15.0,
        "output_error": taylor, "taylor_kl_nats": taylor * ratio, "method_ratio": ratio, "random_curvature": 1.5,
        "random_growth": 1.0, "half_kl_nats": taylor / 4, "slope": 0.1 * taylor, "curvature": 2 * taylor,
        "rtn_kl_nats": taylor * full_over_taylor, "rtn_rise_nats": taylor,
    }  # fmt: skip
    return PlanFeatures.model_validate({**values, **changes})


def planted_kl(features: PlanFeatures) -> float:
    assert features.rtn_kl_nats is not None
    rounded = features.taylor_kl_nats / features.method_ratio
    return math.exp(
        PLANTED[features.method]
        + POWER * math.log(features.taylor_kl_nats)
        + BEND * features.taylor_kl_nats
        + CORRECTION * math.log(features.rtn_kl_nats / rounded)
    )


def planted_table(
    *, families: int = 8, plans: int = 8, noise: float = 0.0, seed: int = 0, rise_stderr: float = 1e-5
) -> list[PtqObservation]:
    """`families` x `plans` x 3 methods; `noise` is the standard deviation of ln KL."""
    draw = np.random.default_rng(seed)
    rows: list[PtqObservation] = []
    for family in range(families):
        for plan in range(plans):
            taylor = 10 ** draw.uniform(-3.5, -0.5)
            over = math.exp(draw.uniform(-0.1, 0.4))
            for method in PLANTED:
                features = made_features(
                    method=method, taylor=taylor, full_over_taylor=over, parameters=10 ** draw.uniform(5, 8),
                    slope=float(draw.normal()) * 0.05 * math.sqrt(taylor),
                )  # fmt: skip
                kl = planted_kl(features) * math.exp(noise * draw.normal())
                assert features.slope is not None
                rise = PER_KL * kl + PER_SLOPE * features.slope * math.sqrt(features.method_ratio)
                rows.append(
                    PtqObservation(
                        model=f"m{family}",
                        family=f"f{family}",
                        plan=f"p{plan}",
                        features=features,
                        kl_nats=kl,
                        kl_stderr_nats=0.01 * kl,
                        rise_nats=rise,
                        rise_stderr_nats=rise_stderr,
                        original_nll_nats=3.0,
                        tokens=8000,
                    )
                )
    return rows
