"""Second moments of layer inputs: the Hessian of the layer's squared output error, up to a factor of two."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cptquant.core.errors import CptquantError
from cptquant.models.arithmetic import coarse_products
from cptquant.models.stream import ModelStream

_PANELS = 4
"""x x' is symmetric: computed in this many column panels, only from the diagonal on, it costs 5/8 of the whole."""


class HessianAccumulator:
    """H = (1/P) sum x x' over P input vectors, streamed, in float32.

    Attributes:
        count: P so far.
    """

    def __init__(self, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.count = 0

    def add(
        self,
        inputs: Tensor,  # (..., in_features)
        mask: Tensor | None = None,  # one entry per input vector, 1 = counts; any shape
    ) -> None:
        """Take in a batch; vectors masked out (padding) do not count."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if mask is not None and not bool(mask.all()):
            rows = rows[mask.reshape(-1).bool()]
        width = rows.shape[1]
        step = -(-width // _PANELS)
        for start in range(0, width, step):
            panel = rows[:, start : start + step]
            self._sum[start : start + step, start:].addmm_(panel.t(), rows[:, start:])
        self.count += rows.shape[0]

    def hessian(self) -> Tensor:
        """The mean so far, (in_features, in_features) float32, exactly symmetric.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("no input vector was added: the Hessian is undefined")
        mean = self._sum / self.count
        width = mean.shape[0]
        step = -(-width // _PANELS)
        for start in range(0, width, step):  # mirror the panels without a second copy of the whole
            stop = min(start + step, width)
            corner = mean[start:stop, start:stop].triu()
            mean[start:stop, start:stop] = corner + corner.triu(1).t()
            mean[stop:, start:stop] = mean[start:stop, stop:].t()
        return mean


@dataclass(frozen=True)
class Sample:
    """How many inputs are kept beside their second moments: tokens evenly spread over the first sequences."""

    sequences: int = 16
    tokens: int = 64


class Complete(BaseException):
    """Ends a forward pass once all inputs asked for were seen."""


@dataclass
class InputHessians:
    """Collects the Hessians of several modules while the model runs; modules that read the same tensor share one.

    Sharing (q, k, v; gate, up) is seen, not declared: two modules that are handed the very same memory, unchanged, in
    one forward pass have the same Hessian.

    Attributes:
        modules: site -> module. stops_early: end a forward pass by raising `Complete` once every module was called.
        sample: also keep some of the inputs; None keeps none.
        leader: site -> the site whose Hessian it shares (itself, if it is the first to read that tensor).
    """

    modules: dict[str, nn.Module]
    stops_early: bool = False
    sample: Sample | None = None
    leader: dict[str, str] = field(default_factory=dict)
    _accumulators: dict[str, HessianAccumulator] = field(default_factory=dict)
    _inputs: list[tuple[Tensor, int, str]] = field(default_factory=list)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _mask: Tensor | None = None
    _missing: set[str] = field(default_factory=set)
    _kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def start_batch(
        self,
        mask: Tensor,  # (sequences, T), 1 = real token
    ) -> None:
        """Call before each forward pass."""
        self._inputs.clear()
        self._mask = mask
        self._missing = set(self.modules)

    def has(self, site: str) -> bool:
        """Whether any input reached the site."""
        accumulator = self._accumulators.get(self.leader.get(site, ""))
        return accumulator is not None and accumulator.count > 0

    def hessian(self, site: str) -> Tensor:
        """The Hessian of the site's inputs, (in_features, in_features) float32.

        Raises:
            KeyError, ValueError: no input reached the site (ask `has`).
        """
        return self._accumulators[self.leader[site]].hessian()

    def kept_inputs(self, site: str) -> list[Tensor]:
        """The inputs kept of a site, per sequence (tokens, in_features) float32; empty where none were."""
        return self._kept.get(self.leader.get(site, ""), [])

    def __enter__(self) -> "InputHessians":
        self._handles = [
            module.register_forward_pre_hook(partial(self._see, site)) for site, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()

    def _see(self, site: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._take(site, arguments[0])
        self._missing.discard(site)
        if self.stops_early and not self._missing:
            raise Complete

    def _take(self, site: str, inputs: Tensor) -> None:
        # Holding the tensors until the batch ends keeps their memory from being handed out again, so that an equal
        # address means the same tensor; the version counter rules out a change in place in between.
        for other, version, leader in self._inputs:
            if _same_memory(inputs, other) and inputs._version == version:
                if self.leader.setdefault(site, leader) == leader:
                    return
                break
        if self.leader.setdefault(site, site) != site:
            raise CptquantError(
                f"{site} shared its input with {self.leader[site]} on one batch of calibration text but not on "
                "another; such a model is not supported, please report it"
            )
        self._inputs.append((inputs, inputs._version, site))
        if site not in self._accumulators:
            self._accumulators[site] = HessianAccumulator(inputs.shape[-1], device=inputs.device)
        mask = self._mask
        vectors = inputs.numel() // inputs.shape[-1]
        # A pooler reads one vector a sequence, a router's expert some of the tokens: no mask fits those.
        fits = mask is not None and mask.numel() == vectors
        self._accumulators[site].add(inputs, mask.to(inputs.device) if mask is not None and fits else None)
        if self.sample is not None and mask is not None and fits:
            self._keep(site, inputs.reshape(*mask.shape, -1), mask, self.sample)

    def _keep(
        self,
        site: str,
        inputs: Tensor,  # (sequences, T, in_features)
        mask: Tensor,  # (sequences, T)
        sample: Sample,
    ) -> None:
        kept = self._kept.setdefault(site, [])
        for sequence, real in zip(inputs, mask, strict=True):
            if len(kept) == sample.sequences:
                return
            tokens = real.nonzero().flatten()
            count = min(sample.tokens, len(tokens))
            if count:
                spread = torch.linspace(0, len(tokens) - 1, count).round().long()
                kept.append(sequence[tokens[spread]].float())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def collect_block_hessians(
    stream: ModelStream,
    block: nn.Module,
    modules: dict[str, nn.Module],
    *,
    coarse: bool = False,
    sample: Sample | None = None,
) -> InputHessians:
    """Run a block once over all batches of the stream and return the Hessians of its modules' inputs.

    The stream is not advanced. Padding does not count. A pass ends where the last module's work would begin. `coarse`
    allows the arithmetic of `coarse_products`.
    """
    hessians = InputHessians(modules, stops_early=True, sample=sample)
    return _collect(stream, hessians, lambda index, hidden: stream.run_block(block, index, hidden), coarse)


def collect_outer_hessians(
    stream: ModelStream, modules: dict[str, nn.Module], *, coarse: bool = False, sample: Sample | None = None
) -> InputHessians:
    """The same for modules outside the blocks, given the stream's hidden states after the last block.

    As a pass ends where the last module's work would begin, the logits of a large vocabulary are not computed.
    """
    return _collect(stream, InputHessians(modules, stops_early=True, sample=sample), stream.finish, coarse)


def _collect(
    stream: ModelStream, hessians: InputHessians, run: Callable[[int, Tensor], Tensor], coarse: bool
) -> InputHessians:
    with torch.no_grad(), coarse_products(coarse), hessians:
        for index, (batch, hidden) in enumerate(zip(stream.batches, stream.hidden, strict=True)):
            hessians.start_batch(batch.attention_mask)
            try:
                run(index, hidden)
            except Complete:
                continue
    return hessians
