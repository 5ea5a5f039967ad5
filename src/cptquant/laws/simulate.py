"""A made grid of continual pre-training runs, like that of arXiv 2406.01375: for the tutorial and for checks.

Losses come from planted laws plus noise; with `forgetting`, the general loss rises with D at small general shares in a
way that belongs to none of the laws fitted here: logistic in ln D and logistic in the domain's share.
"""

from dataclasses import dataclass

import numpy as np

from cptquant.core.errors import UserError
from cptquant.laws.dcpt import L3
from cptquant.laws.forms import BILLION, Array, Points
from cptquant.laws.observations import LARGEST_NLL, Observations

SIZES = (0.5e9, 1.8e9, 4e9)
RATIOS = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0)
EVALUATIONS = 20
LAST_TOKENS = 26e9

GENERAL = {"E": 1.9, "A": 0.45, "alpha": 0.32, "B": 0.1, "beta": 0.3, "eta": 0.6, "C": 0.12, "eps": 0.04, "gamma": 0.6}
DOMAIN = {"E": 1.1, "A": 0.25, "alpha": 0.35, "B": 0.5, "beta": 0.4, "eta": 0.2, "C": 0.25, "eps": 0.05, "gamma": 0.5}
"""Planted parameters, N and D in billions; they meet the requirements of arXiv 2406.01375 on the grid's range."""


@dataclass(frozen=True)
class Simulation:
    """What to make.

    Attributes:
        noise: standard deviation of each loss, in nats. run_noise: the same, shared by the rows of a run.
        forgetting: how many nats of general loss are lost at most when no general text is replayed.
    """

    noise: float = 0.003
    run_noise: float = 0.0
    forgetting: float = 0.0
    seed: int = 0


def simulate(simulation: Simulation) -> Observations:
    """3 sizes x 9 ratios x 20 evaluations with general and domain losses."""
    rng = np.random.default_rng(simulation.seed)
    tokens = np.linspace(LAST_TOKENS / EVALUATIONS, LAST_TOKENS, EVALUATIONS)
    axes = np.meshgrid(np.array(SIZES), np.array(RATIOS), tokens, indexing="ij")
    size, ratio, trained = (axis.ravel() for axis in axes)
    run = np.repeat(np.arange(len(SIZES) * len(RATIOS)), EVALUATIONS)

    def noisy(loss: Array) -> Array:
        shared = rng.normal(0, 1, len(SIZES) * len(RATIOS))[run] * simulation.run_noise
        return loss + shared + rng.normal(0, 1, len(loss)) * simulation.noise

    general, domain = planted_losses(size, trained, ratio, simulation.forgetting)
    return Observations(
        "simulated", size, trained, ratio, None, run.astype(np.int64), ("",) * len(size),
        {"general_nll": noisy(general), "domain_nll": noisy(domain)},
    )  # fmt: skip


def planted_losses(size: Array, tokens: Array, ratio: Array, forgetting: float = 0.0) -> tuple[Array, Array]:
    """General and domain loss without noise."""
    general_points = Points(size / BILLION, tokens / BILLION, 1 - ratio)
    domain_points = Points(size / BILLION, tokens / BILLION, ratio)
    general = L3.loss(L3.vector(GENERAL)[None], general_points)[0]
    domain = L3.loss(L3.vector(DOMAIN)[None], domain_points)[0]
    rise = 1 / (1 + np.exp(-1.5 * (np.log(tokens / BILLION) - np.log(4.0))))
    unprotected = 1 / (1 + np.exp(-(ratio - 0.85) / 0.06))
    return general + forgetting * unprotected * rise, domain


def check_losses(observations: Observations) -> None:
    """Refuse runs whose losses no law could be fitted to.

    Raises:
        UserError: the noise is too large.
    """
    for name, losses in observations.losses.items():
        if not np.all((losses > 0) & (losses <= LARGEST_NLL)):
            raise UserError(
                f"--noise, --run-noise or --forgetting is too large: {name} would lie between {losses.min():g} and "
                f"{losses.max():g} nats per token, expected above 0 and at most {LARGEST_NLL:g}; choose smaller ones, "
                "e.g. --noise 0.003"
            )


def to_csv(observations: Observations) -> str:
    """CSV text with raw parameters and tokens."""
    names = [*observations.losses]
    named = ["domain"] if any(observations.domain) else []
    lines = [
        "# simulated by `cptquant law simulate`: N parameters, D tokens, r domain share, losses in nats per token",
        ",".join([*named, "run", "N", "D", "r", *names]),
    ]
    ratio = observations.ratio if observations.ratio is not None else np.zeros(len(observations))
    for row in range(len(observations)):
        losses = [f"{observations.losses[name][row]:.6f}" for name in names]
        lines.append(
            ",".join(
                [
                    *(observations.domain[row] for _ in named),
                    str(observations.run[row]),
                    f"{observations.size[row]:.0f}",
                    f"{observations.tokens[row]:.0f}",
                    f"{ratio[row]:g}",
                    *losses,
                ]
            )
        )
    return "\n".join(lines) + "\n"
