"""Size, bits, share and tokens chosen together: the D-CPT Law of adapting plus a law of what bits cost.

    L_d(N, D, r) + rise_d(N, D, r, b)  is minimised,  under the bytes of the written file, training time, epochs of the
    texts and, where asked, (L_g(N, D, r) + rise_g(N, D, r, b)) / L_g0(N) - 1 <= the limit; L_g0: the base model's loss

over the sizes of a ladder and a few widths, by a grid of shares and tokens for the fit and for every bootstrap draw of
both laws, then by a finer grid around the fit's best point. Losses need not be monotone in anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cptquant.core.errors import BudgetError, UserError
from cptquant.core.joint import JointPoint, JointStatus
from cptquant.core.laws import Interval, LawFit
from cptquant.laws.bootstrap import interval
from cptquant.laws.methods import find_form
from cptquant.laws.optimum import FLOPS_PER_PARAMETER_TOKEN, FitStack

Array = NDArray[np.float64]
Rise = Callable[[int, "Size", Array, Array], Array]
"""(bits, size, tokens (m,), ratio (m,)) -> rise of the NLL, (1 + draws, m); row 0 is the best guess."""

_RATIOS, _TOKENS, _FINE = 51, 13, 21
_SAMPLES = 2000
_SEED = 5


@dataclass(frozen=True)
class Size:
    """A rung of the ladder.

    Attributes:
        base_loss: general loss of its base model. seconds_per_token: of training. formats: bits -> (name, bytes of
            the written file); 16 is not quantized.
    """

    name: str
    parameters: float
    base_loss: float
    seconds_per_token: float
    formats: dict[int, tuple[str, int]]


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep.

    Attributes:
        size_bytes: of the file. seconds, flops: of the training; at least one of the two is given.
        general_increase: relative, None for none. domain_tokens, general_tokens: distinct ones there are.
    """

    size_bytes: float
    seconds: float | None
    flops: float | None
    general_increase: float | None
    domain_tokens: float
    general_tokens: float
    max_epochs: float


@dataclass(frozen=True)
class Damages:
    """What bits cost on both texts, with the relative scatter of a new run."""

    domain: Rise
    general: Rise
    domain_scatter: float
    general_scatter: float


@dataclass(frozen=True)
class JointAnswer:
    """The recommended point, its neighbours, the best point of every size and width, and how sure the choice is."""

    best: JointPoint
    neighbours: tuple[JointPoint, ...]
    candidates: tuple[JointPoint, ...]
    statuses: tuple[JointStatus, ...]
    share_range: Interval
    tokens_range: Interval
    agreement: float


@dataclass(frozen=True)
class _Best:
    """Of one size and width: places on the grid (1 + B,), losses there, how much the general limit is exceeded."""

    size: Size
    bits: int
    ratio: Array
    tokens: Array
    loss: Array
    excess: Array


def plan_jointly(law: LawFit, sizes: Sequence[Size], damages: Damages, limits: Limits) -> JointAnswer:
    """Choose.

    Raises:
        UserError: the law lacks a loss. BudgetError: nothing fits into the file or into the training.
    """
    for name in ("domain_nll", "general_nll"):
        if name not in law.fits:
            raise UserError(f"the law holds {', '.join(law.fits)}, not {name}; fit it to the runs of a sweep")
        lacking = [letter for letter in ("N", "D", "r") if letter not in find_form(law.fits[name].form).needs]
        if lacking:
            raise UserError(
                f"law {law.fits[name].form} does not depend on {lacking[0]}, which is to be chosen; fit one that does, "
                "e.g. --form dcpt"
            )
    search = _Search(FitStack.of(law.fits["domain_nll"]), FitStack.of(law.fits["general_nll"]), damages, limits)
    fitting = [(size, bits) for size in sizes for bits in size.formats if _fits(size, bits, limits)]
    if not fitting:
        least = min((size.formats[bits][1], size.name, bits) for size in sizes for bits in size.formats)
        raise BudgetError(
            f"--max-size allows {limits.size_bytes:,.0f} bytes, and the smallest file, size {least[1]} at {least[2]} "
            f"bits, has {least[0]:,}; allow more, or add a smaller size or fewer bits"
        )
    found = [search.best_of(size, bits) for size, bits in fitting]
    first = search.pick([each.loss[0] for each in found], [each.excess[0] for each in found])
    best = search.refine(found[first])
    choices = [
        search.pick([each.loss[draw] for each in found], [each.excess[draw] for each in found])
        for draw in range(1, len(best.loss))
    ]
    shares = np.array([found[choice].ratio[draw] for draw, choice in enumerate(choices, 1)])
    tokens = np.array([found[choice].tokens[draw] for draw, choice in enumerate(choices, 1)])
    point = search.point("recommended", best.size, best.bits, best.ratio[0], best.tokens[0])
    return JointAnswer(
        best=point,
        neighbours=tuple(_neighbours(search, sizes, found, best, point)),
        candidates=tuple(
            search.point("best of its size and bits", each.size, each.bits, each.ratio[0], each.tokens[0])
            for each in found
        ),
        statuses=tuple(_statuses(search, sizes, best, point)),
        share_range=_spread(best.ratio[0], shares),
        tokens_range=_spread(best.tokens[0], tokens),
        agreement=float(np.mean([choice == first for choice in choices])) if choices else 1.0,
    )


def _fits(size: Size, bits: int, limits: Limits) -> bool:
    return size.formats[bits][1] <= limits.size_bytes


def _spread(value: float, samples: Array) -> Interval:
    low, high = (float(x) for x in np.quantile(samples, (0.05, 0.95)))
    return Interval(value=float(value), low=min(low, float(value)), high=max(high, float(value)))


@dataclass(frozen=True)
class _Search:
    domain: FitStack
    general: FitStack
    damages: Damages
    limits: Limits

    @property
    def shares(self) -> tuple[float, float]:
        found = self.domain.fit.ranges["r"]
        return found.low, found.high

    def most_tokens(self, size: Size, ratio: Array) -> Array:
        """Tokens that time, FLOPs and epochs allow, (m,)."""
        most = np.full(ratio.shape, np.inf)
        if self.limits.seconds is not None:
            most = np.minimum(most, self.limits.seconds / size.seconds_per_token)
        if self.limits.flops is not None:
            most = np.minimum(most, self.limits.flops / (FLOPS_PER_PARAMETER_TOKEN * size.parameters))
        with np.errstate(divide="ignore"):
            most = np.minimum(most, self.limits.max_epochs * self.limits.domain_tokens / ratio)
            return np.minimum(most, self.limits.max_epochs * self.limits.general_tokens / (1 - ratio))

    @property
    def least_tokens(self) -> float:
        return self.domain.fit.ranges["D"].low

    def best_of(self, size: Size, bits: int) -> _Best:
        """On the coarse grid, for the fit and every draw."""
        low, high = self.shares
        ratios = np.linspace(low, high, _RATIOS)
        most = self.most_tokens(size, ratios)
        steps = np.linspace(0, 1, _TOKENS)
        least = np.minimum(self.least_tokens, most)
        grid = least[:, None] * (most / least)[:, None] ** steps[None]  # (ratios, tokens)
        return self.choose(size, bits, np.repeat(ratios, _TOKENS), grid.reshape(-1))

    def refine(self, best: _Best) -> _Best:
        """A finer grid around the fit's best point; draws keep theirs."""
        low, high = self.shares
        width = (high - low) / (_RATIOS - 1)
        ratios = np.clip(best.ratio[0] + width * np.linspace(-1, 1, _FINE), low, high)
        most = self.most_tokens(best.size, ratios)
        step = 0.15
        grid = np.minimum(best.tokens[0] * np.exp(step * np.linspace(-1, 1, _FINE))[None], most[:, None])
        around = self.choose(best.size, best.bits, np.repeat(ratios, _FINE), grid.reshape(-1))
        if self.pick([best.loss[0], around.loss[0]], [best.excess[0], around.excess[0]]) == 0:
            return best
        joined = {
            name: np.concatenate([getattr(around, name)[:1], getattr(best, name)[1:]])
            for name in ("ratio", "tokens", "loss", "excess")
        }
        return replace(best, **joined)

    def choose(self, size: Size, bits: int, ratio: Array, tokens: Array) -> _Best:
        domain, general = self.losses(size, bits, ratio, tokens)
        limit = self.limits.general_increase
        excess = np.full(general.shape, -1.0) if limit is None else general / size.base_loss - 1 - limit
        allowed = np.where(excess <= 1e-9, domain, np.inf)
        place: NDArray[np.intp] = np.argmin(allowed, axis=1)
        nearest: NDArray[np.intp] = np.argmin(excess, axis=1)
        chosen: NDArray[np.intp] = np.where(np.isfinite(allowed.min(axis=1)), place, nearest)
        rows = np.arange(len(chosen))
        return _Best(size, bits, ratio[chosen], tokens[chosen], domain[rows, chosen], excess[rows, chosen])

    def losses(self, size: Size, bits: int, ratio: Array, tokens: Array) -> tuple[Array, Array]:
        """Of the quantized model: domain and general, (1 + B, m)."""
        draws = min(len(self.domain.theta), len(self.general.theta))
        domain = self.domain.loss(size.parameters, tokens, ratio)[:draws]
        general = self.general.loss(size.parameters, tokens, ratio)[:draws]
        return (
            domain + _rows(self.damages.domain(bits, size, tokens, ratio), draws),
            general + _rows(self.damages.general(bits, size, tokens, ratio), draws),
        )

    @staticmethod
    def pick(losses: Sequence[float], excess: Sequence[float]) -> int:
        """The allowed one with the lowest loss, or the one that exceeds the limit least."""
        allowed = [index for index, value in enumerate(excess) if value <= 1e-9]
        if allowed:
            return min(allowed, key=lambda index: losses[index])
        return min(range(len(excess)), key=lambda index: excess[index])

    def point(self, label: str, size: Size, bits: int, ratio: float, tokens: float) -> JointPoint:
        """A point with its predictions."""
        at_ratio, at_tokens = np.array([ratio]), np.array([tokens])
        domain, domain_rise = self._predict(self.domain, self.damages.domain, self.damages.domain_scatter,
                                            bits, size, at_tokens, at_ratio)  # fmt: skip
        general, general_rise = self._predict(self.general, self.damages.general, self.damages.general_scatter,
                                              bits, size, at_tokens, at_ratio)  # fmt: skip
        name, size_bytes = size.formats[bits]
        increase = general.value / size.base_loss - 1
        limit = self.limits.general_increase
        return JointPoint(
            label=label, size=size.name, parameters=round(size.parameters), bits=bits, format=name, ratio=float(ratio),
            tokens=float(tokens), size_bytes=size_bytes, seconds=float(tokens) * size.seconds_per_token,
            flops=FLOPS_PER_PARAMETER_TOKEN * size.parameters * float(tokens), domain_nll=domain, general_nll=general,
            domain_rise=domain_rise, general_rise=general_rise, general_increase=increase,
            allowed=size_bytes <= self.limits.size_bytes
            and float(tokens) <= float(self.most_tokens(size, at_ratio)[0]) * (1 + 1e-9)
            and (limit is None or increase <= limit + 1e-9),
        )  # fmt: skip

    def _predict(
        self, stack: FitStack, rise: Rise, scatter: float, bits: int, size: Size, tokens: Array, ratio: Array
    ) -> tuple[Interval, Interval]:  # fmt: skip
        """Loss of the quantized model and the rise in it, with 90 % intervals of a new run."""
        rng = np.random.default_rng(_SEED)
        log_loss = np.log(stack.loss(size.parameters, tokens, ratio)[:, 0])
        fit = stack.fit
        draws = np.resize(log_loss[1:], _SAMPLES)
        widened = log_loss[0] + fit.widening * (draws - log_loss[0])
        noise = rng.standard_normal((2, _SAMPLES))
        widened = widened + fit.run_std * noise[0] + fit.row_std * noise[1]
        rises = rise(bits, size, tokens, ratio)[:, 0]
        drawn = np.resize(rises[1:], _SAMPLES) * (1 + scatter * rng.standard_normal(_SAMPLES))
        return (
            _interval(float(np.exp(log_loss[0]) + rises[0]), np.exp(widened) + drawn),
            _interval(float(rises[0]), drawn),
        )


def _interval(value: float, samples: Array) -> Interval:
    low, high = interval(np.array(value), samples, 1.0)
    return Interval(value=value, low=float(low), high=float(high))


def _rows(rises: Array, draws: int) -> Array:
    """As many draws as the law has, row 0 kept."""
    if len(rises) >= draws:
        return rises[:draws]
    more = rises[1 + np.arange(draws - 1) % (len(rises) - 1)]
    return np.concatenate([rises[:1], more])


def _neighbours(
    search: _Search, sizes: Sequence[Size], found: Sequence[_Best], best: _Best, point: JointPoint
) -> list[JointPoint]:
    """One change each: a width, a size, the share, the tokens."""
    made: list[JointPoint] = []
    widths = sorted(best.size.formats)
    at = widths.index(best.bits)
    for step, word in ((-1, "fewer"), (1, "more")):
        if 0 <= at + step < len(widths):
            made.append(search.point(f"{word} bits", best.size, widths[at + step], best.ratio[0], best.tokens[0]))
    order = sorted(sizes, key=lambda size: size.parameters)
    place = next(index for index, size in enumerate(order) if size.name == best.size.name)
    for step, word in ((-1, "smaller"), (1, "larger")):
        if 0 <= place + step < len(order) and best.bits in order[place + step].formats:
            other = order[place + step]
            tokens = min(float(best.tokens[0]), float(search.most_tokens(other, best.ratio[:1])[0]))
            made.append(search.point(f"{word} size", other, best.bits, best.ratio[0], tokens))
    low, high = search.shares
    for step in (-0.15, 0.15):
        ratio = float(np.clip(best.ratio[0] + step, low, high))
        if abs(ratio - best.ratio[0]) > 0.02:
            tokens = min(float(best.tokens[0]), float(search.most_tokens(best.size, np.array([ratio]))[0]))
            made.append(search.point(f"share {ratio:.2f}", best.size, best.bits, ratio, tokens))
    half = max(search.least_tokens, float(best.tokens[0]) / 2)
    if half < 0.9 * best.tokens[0]:
        made.append(search.point("half the tokens", best.size, best.bits, best.ratio[0], half))
    return made


def _statuses(search: _Search, sizes: Sequence[Size], best: _Best, point: JointPoint) -> list[JointStatus]:
    """What binds: limits that, lifted alone, would give a lower domain loss."""
    limits, found = search.limits, list[JointStatus]()
    if not point.allowed:
        found.append(JointStatus.INFEASIBLE)
    larger = [
        search.best_of(size, bits).loss[0] for size in sizes for bits in size.formats if not _fits(size, bits, limits)
    ]
    if larger and min(larger) < best.loss[0]:
        found.append(JointStatus.SIZE_LIMIT)
    ratio, tokens = best.ratio[:1], float(best.tokens[0])
    if tokens >= 0.97 * float(search.most_tokens(best.size, ratio)[0]):
        without = replace(search, limits=replace(limits, max_epochs=1e9))
        by_text = float(without.most_tokens(best.size, ratio)[0]) > 1.03 * tokens
        found.append(JointStatus.TEXT_LIMIT if by_text else JointStatus.COMPUTE_LIMIT)
    low, high = search.shares
    if limits.general_increase is not None and point.allowed:
        lifted = replace(search, limits=replace(limits, general_increase=None)).best_of(best.size, best.bits)
        if lifted.loss[0] < best.loss[0] - 1e-9 and lifted.ratio[0] > best.ratio[0]:
            found.append(JointStatus.GENERAL_LIMIT)
    if min(best.ratio[0] - low, high - best.ratio[0]) < 1e-3 * (high - low):
        found.append(JointStatus.EDGE_OF_SHARES)
    if tokens > search.domain.fit.ranges["D"].high * 1.001:
        found.append(JointStatus.BEYOND_TOKENS)
    return found
