"""plan.json -> a better plan.json of no more bytes: swaps between sites, judged on the KL of the whole quantized model.

The knapsack's plan is quantized first (and kept, as plan-unrefined.json, for the guard); every site's neighbouring formats
are quantized beside it; `allocation.swaps` then searches. All of it reads calibration text only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cptquant.allocation.price import chosen_option
from cptquant.allocation.problem import Choice, Problem
from cptquant.allocation.swaps import Refined, SwapSearch
from cptquant.core.plan import Plan
from cptquant.models.load import LoadedModel
from cptquant.models.stream import WeightSource
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.alternatives import Alternatives, quantize_alternatives
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import original_weight
from cptquant.sensitivity.plan_loss import PlanLoss


@dataclass(frozen=True)
class QuantizedPlan:
    """A plan that was carried out, and how: what a search starts from.

    Attributes:
        weights: of the plan, by `quantizer` on `tokens`.
    """

    plan: Plan
    weights: WeightSource
    quantizer: Gptq | Rtn
    tokens: TokenSet


class SwapJudge:
    """The `Judge` of a search: KL per sequence of the start with other formats at some sites.

    Args:
        start: one option index a group. alternatives: weights of every option that the search may choose.
    """

    def __init__(
        self, model: LoadedModel, problem: Problem, start: Choice, alternatives: Alternatives, loss: PlanLoss
    ) -> None:
        self._model, self._problem, self._start = model, problem, tuple(start)
        self._alternatives, self._loss = alternatives, loss

    @property
    def sequence_count(self) -> int:
        """Calibration sequences."""
        return self._loss.sequence_count

    def __call__(self, choices: Sequence[Choice], sequences: Sequence[int]) -> NDArray[np.float64]:
        """KL in nats per scored token, (choices, sequences)."""
        dequantized: dict[tuple[str, str], Tensor] = {}
        return self._loss.losses([self._change(choice, dequantized) for choice in choices], sequences)

    def _change(self, choice: Choice, dequantized: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        changes: dict[str, Tensor] = {}
        for group, before, after in zip(self._problem.groups, self._start, choice, strict=True):
            if before == after:
                continue
            for site, fmt in zip(group.sites, group.options[after].formats, strict=True):
                key = (site.name, fmt.name)
                if key not in dequantized:
                    stored: StoredWeight | None = self._alternatives.get(site.name, {}).get(fmt.name)
                    kept = original_weight(self._model, site)
                    dequantized[key] = kept.float() if stored is None else stored.dequantize()
                changes[site.name] = dequantized[key]
        return changes


def search_swaps(
    model: LoadedModel,
    problem: Problem,
    start: QuantizedPlan,
    search: SwapSearch,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Refined:
    """Quantize what the search may choose, and search.

    Args:
        problem: of the plan, with its limit. progress: told (stage, done, in all).

    Raises:
        UserError: a bare encoder, groups of mixed width, too little calibration text.
    """
    choice = [chosen_option(group, start.plan) for group in problem.groups]
    wanted = _formats_to_make(problem, choice, search.reachable(problem, choice))
    loss = PlanLoss(model, start.weights, start.tokens)
    alternatives = quantize_alternatives(
        model, start.weights, wanted, start.quantizer, start.tokens,
        progress=None if progress is None else lambda done, total: progress("quantize neighbours", done, total),
    )  # fmt: skip
    judge = SwapJudge(model, problem, choice, alternatives, loss)
    return search(
        problem, choice, judge, seed=seed,
        progress=None if progress is None else lambda done, total: progress("swaps", done, total),
    )  # fmt: skip


def _formats_to_make(problem: Problem, start: Choice, reachable: Sequence[Sequence[int]]) -> Mapping[str, list]:
    wanted: dict[str, list] = {}
    for group, own, options in zip(problem.groups, start, reachable, strict=True):
        for option in options:
            if option != own:
                for site, fmt in zip(group.sites, group.options[option].formats, strict=True):
                    wanted.setdefault(site.name, []).append(fmt)
    return {name: list(dict.fromkeys(row)) for name, row in wanted.items()}
