"""The three uses of a mixture law (arXiv 2406.01375, section 4) as optimisation problems.

    1  min_r L_d(N, D, r)      subject to L_g(N, D, 1-r) <= (1 + T) L_g0         `best_ratio_under_limit`
    2  min_r L_d(N, D_d/r, r)  with D_d tokens of domain text, none repeated       `best_ratio_for_domain_tokens`
    3  min_N L(N, C/(6N), r)   with C training FLOPs                              `best_size_for_flops`

Use 3 has a closed form for laws with A/N^alpha + B'/D^beta at fixed r: N* = G (C/6)^(beta/(alpha+beta)), G = (alpha A/
(beta B'))^(1/(alpha+beta)), B' = B r^eta. The others are searched on a grid that is refined around its best point, for
the fit and all bootstrap draws at once; losses need not be monotone in r, so no bracketing is assumed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import UserError
from cptquant.core.laws import Interval, LawFit, LossFit, Optimum, OptimumStatus
from cptquant.laws.bootstrap import interval
from cptquant.laws.forms import BILLION, Array, Form
from cptquant.laws.methods import find_form
from cptquant.laws.predict import (
    LARGEST,
    LEAST,
    fitted_theta,
    make_points,
    refuse_features,
    share_of,
    spell_power,
)

FLOPS_PER_PARAMETER_TOKEN = 6.0
_COARSE, _FINE, _ROUNDS = 401, 41, 4
_CLOSED_FORMS = ("dcpt", "chinchilla", "l1")


@dataclass(frozen=True)
class Reference:
    """The general loss against which an increase is measured.

    Attributes:
        loss: nats per token, one per parameter vector (1 + draws,). origin: sentence that says where it comes from.
    """

    loss: Array
    origin: str


@dataclass(frozen=True)
class FitStack:
    """Fit and draws of one loss: row 0 is the fit.

    Attributes:
        theta: (1 + B, P), internal.
    """

    fit: LossFit
    form: Form
    theta: Array

    @classmethod
    def of(cls, fit: LossFit) -> "FitStack":
        """The stack of a stored fit."""
        form, theta, draws = fitted_theta(fit)
        return cls(fit, form, np.concatenate([theta[None], draws]))

    def loss(
        self,
        size: Array | float,
        tokens: Array | float,
        ratio: Array | float,  # scalars or (S, m): one row per parameter vector
    ) -> Array:
        """(S, m)."""
        size, tokens, ratio = np.broadcast_arrays(np.asarray(size), np.asarray(tokens), np.asarray(ratio))
        if size.ndim < 2:
            return self.form.loss(self.theta, make_points(self.fit, size, tokens, ratio))
        rows = [
            self.form.loss(self.theta[[row]], make_points(self.fit, size[row], tokens[row], ratio[row]))[0]
            for row in range(len(self.theta))
        ]
        return np.stack(rows)


def best_ratio_under_limit(
    law: LawFit,
    size: float,  # parameters
    tokens: float,  # tokens
    max_increase: float,  # relative, e.g. 0.03
    base_loss: float | None = None,  # nats per token
) -> tuple[Optimum, Reference]:
    """Use 1: the domain share with the lowest domain loss whose general loss stays within the limit.

    Returns:
        The optimum and the loss the limit refers to.

    Raises:
        UserError: the law lacks one of the two losses, or the ratio.
    """
    _require(law, ("r",), "--max-general-increase")
    domain, general = _both(law)
    reference = reference_loss(general, size, tokens, base_loss)
    limit = reference.loss * (1 + max_increase)
    low, high = _ratio_range(domain.fit)

    def excess_and_loss(ratio: Array) -> tuple[Array, Array]:
        return general.loss(size, tokens, ratio) - limit[:, None], domain.loss(size, tokens, ratio)

    best = _search(excess_and_loss, low, high, len(domain.theta))
    at = best[:, None]
    general_loss, domain_loss = general.loss(size, tokens, at)[:, 0], domain.loss(size, tokens, at)[:, 0]
    feasible = general_loss[0] <= limit[0] * (1 + 1e-6)
    step = 1e-4 * (high - low)
    beyond = general.loss(size, tokens, np.minimum(at + step, high))[0, 0] > limit[0]
    if not feasible:
        status = OptimumStatus.INFEASIBLE
    elif _outside(law, size, tokens):
        status = OptimumStatus.OUTSIDE_DATA
    elif min(best[0] - low, high - best[0]) < step:
        status = OptimumStatus.EDGE_OF_DATA
    else:
        status = OptimumStatus.LIMIT_BINDS if beyond else OptimumStatus.INTERIOR
    answer = Optimum(
        N=_exactly(size), D=_exactly(tokens), r=_spread_within(best, domain.fit, low, high),
        general_nll=_spread_positive(general_loss, general.fit),
        domain_nll=_spread_positive(domain_loss, domain.fit), status=status,
    )  # fmt: skip
    return answer, reference


def best_ratio_for_domain_tokens(
    law: LawFit,
    size: float,  # parameters
    domain_tokens: float,  # distinct tokens of domain text
) -> Optimum:
    """Use 2: the domain share with the lowest domain loss when the run ends with the domain text.

    The total is D = domain_tokens / r: a small share means a long run.

    Raises:
        UserError: the law has no domain loss, no ratio or no tokens.
    """
    _require(law, ("r", "D"), "--domain-tokens")
    domain = FitStack.of(_fit(law, "domain_nll"))
    low, high = _ratio_range(domain.fit)
    low = max(low, 1e-3)

    def excess_and_loss(ratio: Array) -> tuple[Array, Array]:
        loss = domain.loss(size, domain_tokens / ratio, ratio)
        return np.full(loss.shape, -1.0), loss

    best = _search(excess_and_loss, low, high, len(domain.theta))
    at = best[:, None]
    tokens = domain_tokens / best
    general = law.fits.get("general_nll")
    general_loss = None if general is None else FitStack.of(general).loss(size, tokens[:, None], at)[:, 0]
    step = 1e-4 * (high - low)
    if _outside(law, size, float(tokens[0])):
        status = OptimumStatus.OUTSIDE_DATA
    else:
        status = OptimumStatus.EDGE_OF_DATA if min(best[0] - low, high - best[0]) < step else OptimumStatus.INTERIOR
    return Optimum(
        N=_exactly(size), D=_spread_positive(tokens, domain.fit), r=_spread_within(best, domain.fit, low, high),
        general_nll=None if general is None or general_loss is None else _spread_positive(general_loss, general),
        domain_nll=_spread_positive(domain.loss(size, tokens[:, None], at)[:, 0], domain.fit), status=status,
    )  # fmt: skip


def best_size_for_flops(
    law: LawFit,
    flops: float,
    ratio: float,  # domain share
    minimise: str = "domain_nll",
) -> Optimum:
    """Use 3: the model size with the lowest loss at fixed training compute, 6 N D = flops.

    Raises:
        UserError: the law has no size or no tokens, or its optimum is no size or number of tokens a run can have.
    """
    _require(law, ("N", "D"), "--flops")
    target = FitStack.of(_fit(law, minimise if minimise in law.fits else next(iter(law.fits))))
    budget = flops / FLOPS_PER_PARAMETER_TOKEN
    share = share_of(target.fit, np.array([ratio]))[0]
    at_edge = False
    if target.form.name in _CLOSED_FORMS:
        sizes = closed_form_size(target.form, target.theta, share, budget)
    else:
        sizes, at_edge = _search_size(target, budget, ratio)
    size = float(sizes[0])
    _check_run(target, flops, ratio, size, budget / size if size > 0 else float("inf"))
    sizes = np.clip(sizes, 1.0, budget)  # of a wild draw: at least one parameter and one token
    tokens = budget / sizes
    losses: dict[str, Interval] = {}
    for name, fit in law.fits.items():
        values = FitStack.of(fit).loss(sizes[:, None], tokens[:, None], np.full((len(sizes), 1), ratio))[:, 0]
        losses[name] = _spread_positive(values, fit)
    outside = _outside(law, float(sizes[0]), float(tokens[0]))
    status = OptimumStatus.OUTSIDE_DATA if outside else OptimumStatus.INTERIOR
    return Optimum(
        N=_spread_positive(sizes, target.fit),
        D=_spread_positive(tokens, target.fit),
        r=_exactly(ratio),
        general_nll=losses.get("general_nll"),
        domain_nll=losses.get("domain_nll", losses.get("nll")),
        status=OptimumStatus.EDGE_OF_SEARCH if at_edge else status,
    )


def closed_form_size(
    form: Form,
    theta: Array,  # (S, P), internal
    share: float,
    budget: float,  # parameters x tokens
) -> Array:
    """N* in parameters, (S,), for laws with A/N^alpha + B'/D^beta at fixed share; B' = B share^eta."""
    values = {name: form.natural(theta)[:, place] for name, place in form.index.items()}
    amplitude = values["B"] * (max(share, 1e-100) ** values["eta"] if form.name == "dcpt" else 1.0)
    alpha, beta = values["alpha"], values["beta"]
    with np.errstate(divide="ignore", over="ignore"):  # B = 0: the larger the better, refused by the caller
        factor = (alpha * values["A"] / (beta * amplitude)) ** (1 / (alpha + beta))
    return BILLION * factor * (budget / BILLION**2) ** (beta / (alpha + beta))


def reference_loss(general: FitStack, size: float, tokens: float, base_loss: float | None) -> Reference:
    """The loss an increase is measured against: given, or observed before training, or of a run on general text."""
    count = len(general.theta)
    if base_loss is not None:
        return Reference(np.full(count, base_loss), f"the given base loss {base_loss:g}")
    for base_size, loss in general.fit.base:
        if abs(np.log(base_size / size)) < 0.01:
            return Reference(np.full(count, loss), f"the loss before training in the data, {loss:.4f}")
    loss = general.loss(size, tokens, 0.0)[:, 0]
    return Reference(loss, f"the law's general loss after the same run on general text alone, {loss[0]:.4f}")


def _both(law: LawFit) -> tuple[FitStack, FitStack]:
    return FitStack.of(_fit(law, "domain_nll")), FitStack.of(_fit(law, "general_nll"))


def _fit(law: LawFit, name: str) -> LossFit:
    if name not in law.fits:
        raise UserError(
            f"this law holds {', '.join(law.fits)}, not {name}; fit it on data with a column {name}: "
            "cptquant law fit dcpt RUNS.csv"
        )
    return law.fits[name]


def _require(law: LawFit, letters: tuple[str, ...], use: str) -> None:
    """Refuse to optimise along what the law does not depend on."""
    refuse_features(law, "law optimum")
    named = {"N": "size N", "D": "tokens D", "r": "mixture ratio r"}
    for letter in letters:
        for fit in law.fits.values():
            if letter not in find_form(fit.form).needs:
                raise UserError(
                    f"{use} needs a law with the {named[letter]}; law {fit.form} ({fit.equation}) has none: fit one "
                    "that does, e.g. cptquant law fit dcpt RUNS.csv"
                )


def _check_run(target: FitStack, flops: float, ratio: float, size: float, tokens: float) -> None:
    if LEAST["N"] <= size <= LARGEST["N"] and LEAST["D"] <= tokens <= LARGEST["D"]:
        return
    share = f" at domain share {ratio:g}" if target.form.ratios else ""
    spans = ", ".join(f"{x} {spell_power(LEAST[x])} to {spell_power(LARGEST[x])}" for x in ("N", "D"))
    raise UserError(
        f"--flops {flops:g}: the lowest loss of law {target.form.name}{share} lies at N = {size:.3g} parameters and "
        f"D = {tokens:.3g} tokens, which no run can have ({spans}); give --flops{' and --r' if share else ''} nearer "
        "to the runs of the fit"
    )


def _ratio_range(fit: LossFit) -> tuple[float, float]:
    return fit.ranges["r"].low, fit.ranges["r"].high


def _search(excess_and_loss: Callable[[Array], tuple[Array, Array]], low: float, high: float, count: int) -> Array:
    """Feasible ratio with the lowest loss for each of `count` parameter vectors, (count,).

    Where nothing is feasible: the ratio with the smallest excess.
    """
    ratio = np.linspace(low, high, _COARSE)
    excess, loss = excess_and_loss(ratio)
    best = ratio[_choose(excess, loss)]
    width = (high - low) / (_COARSE - 1)
    for _ in range(_ROUNDS):
        around = np.clip(best[:, None] + width * np.linspace(-1, 1, _FINE), low, high)
        excess, loss = excess_and_loss(around)
        best = around[np.arange(count), _choose(excess, loss)]
        width *= 2 / (_FINE - 1)
    return best


def _choose(excess: Array, loss: Array) -> NDArray[np.intp]:
    feasible = excess <= 0
    best: NDArray[np.intp] = np.argmin(np.where(feasible, loss, np.inf), axis=1)
    nearest: NDArray[np.intp] = np.argmin(excess, axis=1)
    return np.where(np.any(feasible, axis=1), best, nearest)


def _search_size(target: FitStack, budget: float, ratio: float) -> tuple[Array, bool]:
    """Minimum over ln N by the same refined grid, within a factor of 1,000 of where N = D / 20.

    Returns:
        Sizes (S,), and whether the fit's lies on the edge of what was searched.
    """
    middle = np.log(np.sqrt(budget / 20))
    low, high = middle - np.log(1e3), middle + np.log(1e3)

    def excess_and_loss(ln_size: Array) -> tuple[Array, Array]:
        size = np.exp(ln_size)
        loss = target.loss(size, budget / size, np.full(size.shape, ratio))
        return np.full(loss.shape, -1.0), loss

    best = _search(excess_and_loss, low, high, len(target.theta))
    return np.exp(best), bool(min(best[0] - low, high - best[0]) < 1e-4 * (high - low))


def _outside(law: LawFit, size: float, tokens: float) -> bool:
    ranges = next(iter(law.fits.values())).ranges
    for letter, value in (("N", size), ("D", tokens)):
        found = ranges.get(letter)
        if found is not None and not found.low * (1 - 1e-6) <= value <= found.high * (1 + 1e-6):
            return True
    return False


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _spread_within(values: Array, fit: LossFit, low: float, high: float) -> Interval:
    """Row 0 is the answer, the other rows its bootstrap draws; cut at the ends of what was searched."""
    ends = interval(values[0], values[1:], fit.widening)
    return Interval(value=float(values[0]), low=max(float(ends[0]), low), high=min(float(ends[1]), high))


def _spread_positive(values: Array, fit: LossFit) -> Interval:
    """The same on a logarithmic scale, for sizes, tokens and losses: widened, none falls below zero."""
    low, high = np.exp(interval(np.log(values[0]), np.log(values[1:]), fit.widening))
    value = float(values[0])
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))
