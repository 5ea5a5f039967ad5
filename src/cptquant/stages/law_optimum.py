"""Law -> optimum, with the page that shows where it lies."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cptquant.core.errors import UserError
from cptquant.core.laws import LawFit, Optimum
from cptquant.laws.curves import optimum_curves, spell_count
from cptquant.laws.methods import find_form
from cptquant.laws.observations import LARGEST_NLL
from cptquant.laws.optimum import (
    FLOPS_PER_PARAMETER_TOKEN,
    best_ratio_for_domain_tokens,
    best_ratio_under_limit,
    best_size_for_flops,
)
from cptquant.laws.predict import check_quantities, outside_range
from cptquant.reports.law import OptimumPicture, write_optimum_report


@dataclass(frozen=True)
class OptimumRequest:
    """What is given; exactly one of max_increase, domain_tokens and flops says which use is meant."""

    size: float | None = None
    tokens: float | None = None
    ratio: float | None = None
    max_increase: float | None = None
    general_base: float | None = None
    domain_tokens: float | None = None
    flops: float | None = None


def optimum_stage(law: LawFit, request: OptimumRequest, page: Path) -> tuple[Optimum, list[str]]:
    """Answer and sentences for people; writes the page.

    Raises:
        UserError: no use, several uses, or a missing quantity.
    """
    named = {
        "--max-general-increase": request.max_increase,
        "--domain-tokens": request.domain_tokens,
        "--flops": request.flops,
    }
    uses = [flag for flag, value in named.items() if value is not None]
    if len(uses) != 1:
        given = " and ".join(uses) if uses else "none"
        raise UserError(f"say which optimum is meant by exactly one of {', '.join(named)}; given: {given}")
    _refuse_unused(uses[0], request)
    check_quantities(request.size, request.tokens, request.ratio)
    base = request.general_base
    if base is not None and not 0 < base <= LARGEST_NLL:
        raise UserError(
            f"--general-base {base:g} must be a loss in nats per token, above 0 and at most {LARGEST_NLL:g}"
        )
    solve = {"--max-general-increase": _under_limit, "--domain-tokens": _for_domain_tokens, "--flops": _for_flops}
    answer, picture = solve[uses[0]](law, request)
    write_optimum_report(page, answer, picture)
    sentences = [*picture.sentences, answer.status.sentence]
    return answer, sentences + outside_range(law, answer.N.value, answer.D.value, answer.r.value)


_USED = {
    "--max-general-increase": ("--N", "--D", "--general-base"),
    "--domain-tokens": ("--N",),
    "--flops": ("--r",),
}


def _refuse_unused(use: str, request: OptimumRequest) -> None:
    given = {"--N": request.size, "--D": request.tokens, "--r": request.ratio, "--general-base": request.general_base}
    unused = [flag for flag, value in given.items() if value is not None and flag not in _USED[use]]
    if unused:
        raise UserError(f"{use} takes {', '.join(_USED[use])}, not {unused[0]}; leave {unused[0]} out")


def _need(value: float | None, flag: str, use: str) -> float:
    if value is None:
        raise UserError(f"{use} needs {flag}; give its value (N in parameters, D in tokens, r as a share)")
    return value


def _under_limit(law: LawFit, request: OptimumRequest) -> tuple[Optimum, OptimumPicture]:
    use = "--max-general-increase"
    size, tokens = _need(request.size, "--N", use), _need(request.tokens, "--D", use)
    increase = _need(request.max_increase, use, use)
    answer, reference = best_ratio_under_limit(law, size, tokens, increase, request.general_base)
    ratios = _ratio_axis(law)
    curves = optimum_curves(law, "r", ratios, np.full(len(ratios), size), np.full(len(ratios), tokens), ratios)
    run = f"{spell_count(size)} parameters and {spell_count(tokens)} tokens"
    question = f"Domain share for {run}, general loss at most {100 * increase:g} % up"
    sentence = f"The increase is measured against {reference.origin}."
    limit = float(reference.loss[0]) * (1 + increase)
    return answer, OptimumPicture(question, (sentence,), curves, answer.r, limit)


def _for_domain_tokens(law: LawFit, request: OptimumRequest) -> tuple[Optimum, OptimumPicture]:
    use = "--domain-tokens"
    size, domain_tokens = _need(request.size, "--N", use), _need(request.domain_tokens, use, use)
    if not 1e4 <= domain_tokens <= 1e17:
        raise UserError(f"--domain-tokens {domain_tokens:g} cannot be a number of tokens; 5 billion is 5e9")
    answer = best_ratio_for_domain_tokens(law, size, domain_tokens)
    ratios = _ratio_axis(law)
    ratios = ratios[ratios > 0.02]
    curves = optimum_curves(law, "r", ratios, np.full(len(ratios), size), domain_tokens / ratios, ratios)
    question = f"Domain share for {spell_count(size)} parameters and {spell_count(domain_tokens)} tokens of domain text"
    sentence = (
        "The run has D = domain tokens / r tokens, so a small share means a long run; no domain token is repeated."
    )
    return answer, OptimumPicture(question, (sentence,), curves, answer.r)


def _for_flops(law: LawFit, request: OptimumRequest) -> tuple[Optimum, OptimumPicture]:
    flops = _need(request.flops, "--flops", "--flops")
    if not 1e12 <= flops <= 1e30:
        raise UserError(f"--flops {flops:g} is outside 1e12 to 1e30; give floating-point operations, e.g. 1e21")
    mixed = any(find_form(fit.form).ratios for fit in law.fits.values())
    if not mixed and request.ratio is not None:
        raise UserError(f"law {law.kind} has no mixture ratio; leave --r out")
    ratio = _need(request.ratio, "--r", "--flops") if mixed else 1.0
    answer = best_size_for_flops(law, flops, ratio)
    budget = flops / FLOPS_PER_PARAMETER_TOKEN
    sizes = answer.N.value * np.geomspace(0.1, 10, 41)
    curves = optimum_curves(law, "N", sizes, sizes, budget / sizes, np.full(len(sizes), ratio))
    question = f"Model size for {flops:.3g} training FLOPs" + (f" at domain share {ratio:g}" if mixed else "")
    sentence = "Compute is counted as 6 N D; the domain's loss is minimised where the law has one."
    return answer, OptimumPicture(question, (sentence,), curves, answer.N)


def _ratio_axis(law: LawFit) -> np.ndarray:
    found = next(iter(law.fits.values())).ranges["r"]
    return np.linspace(found.low, found.high, 61)
