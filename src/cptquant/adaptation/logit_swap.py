"""Logit swap self-distillation (Mix-CPT, arXiv 2407.10804) in one pass over the logits, its gradient included.

At every counted position, with teacher logits z, gold token y and j = argmax z: exchange z_j and z_y, so that gold
has the old maximum; p~ = softmax of that over the temperature T. The loss added up over counted positions is

    (1 - lam) CE(y, student) + lam T^2 KL(p~ ‖ softmax(student logits / T))

The body of the paper could not be read: the swap is known second-hand, direction, temperature and the sum are our
reading (docs/adaptation.md). Positions that are not counted are masked before anything is gathered. The gradient in
the logits, (1 - lam) (p_s - onehot(y)) + lam T (p_s^T - p~), is made in the same pass and held until it is asked for,
so that beside logits and gradient no third tensor of their size exists.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cptquant.models.losses import IGNORED

_SLICE_ENTRIES = 2**19
"""Logits worked on at once: 2 MB in float32, so that the passes over a slice stay in the cache."""
_TINY = 1e-30
"""Below what a float32 probability can be, so that nothing is divided by 0."""


@dataclass(frozen=True)
class FullTargets:
    """A teacher's whole prediction. Attributes: logits: (B, T, V), before any swap."""

    logits: Tensor


@dataclass(frozen=True)
class TopTargets:
    """The k most likely tokens of p~, from a cache.

    What p~ gives to all others is one bucket more, and so is what the student gives to them: the divergence of k + 1
    buckets. It is a lower bound of the KL of the whole distributions (what differs within the bucket is left out), and
    equal to it for k = vocabulary.

    Attributes:
        indices: (B, T, k) integers. probabilities: (B, T, k) float32, swapped, at the temperature of the loss.
        rest: (B, T) float32, what the others have together; exactly 0 for k = vocabulary.
    """

    indices: Tensor
    probabilities: Tensor
    rest: Tensor


@dataclass(frozen=True)
class LossShape:
    """How the loss is put together.

    Attributes:
        weight: lam, share of the divergence. temperature: T. swap: exchange the logits of gold and maximum;
            without it this is plain distillation.
    """

    weight: float = 0.0
    temperature: float = 1.0
    swap: bool = True


PLAIN = LossShape()


@dataclass(frozen=True)
class CountedLoss:
    """Sums over counted positions.

    Attributes:
        total: of the loss times `scale`; carries the gradient. cross_entropy_nats, divergence_nats: sums without
            weights or scale, 0 where a part has no weight. counted: positions.
    """

    total: Tensor
    cross_entropy_nats: float
    divergence_nats: float
    counted: int


def swap_gold_(
    logits: Tensor,  # (m, V)
    gold: Tensor,  # (m,) int64, every one a token
) -> Tensor:
    """Exchange the logit of gold with the largest, in place; where gold is the largest nothing changes."""
    rows = torch.arange(len(gold), device=logits.device)
    top = logits.argmax(dim=-1)
    largest, golden = logits[rows, top], logits[rows, gold]
    logits[rows, top] = golden
    logits[rows, gold] = largest
    return logits


def swapped_log_probabilities(
    logits: Tensor,  # (m, V), any float dtype; not changed
    gold: Tensor,  # (m,) int64
    shape: LossShape,
) -> Tensor:
    """ln p~, (m, V) float32."""
    changed = logits.to(torch.float32, copy=True)
    if shape.swap:
        swap_gold_(changed, gold)
    if shape.temperature != 1:
        changed /= shape.temperature
    return torch.log_softmax(changed, dim=-1)


def counted_loss(
    logits: Tensor,  # (B, T, V), any float dtype
    targets: Tensor,  # (B, T) int64 aligned with the logits, IGNORED where not counted
    shape: LossShape = PLAIN,
    teacher: FullTargets | TopTargets | None = None,
    *,
    scale: float | Tensor | None = None,
) -> CountedLoss:
    """The loss over the counted positions of a batch.

    Args:
        scale: 1 / counted positions of the whole step, where the batch is a part of it; None for this batch's own:
            the mean over counted tokens.

    Raises:
        ValueError: a weight above 0 without a teacher.
    """
    if shape.weight > 0 and teacher is None:
        raise ValueError("a distillation weight above 0 needs a teacher")
    counted = int((targets != IGNORED).sum())
    if scale is None:
        scale = 1 / max(1, counted)
    used = teacher if shape.weight > 0 else None
    scale = torch.as_tensor(scale, dtype=torch.float32, device=logits.device)
    total, parts = cast(tuple[Tensor, Tensor], _OnePass.apply(logits, targets, shape, used, scale))
    cross_entropy, divergence = parts.tolist()
    return CountedLoss(total, cross_entropy, divergence, counted)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shape: LossShape, teacher: FullTargets | TopTargets | None,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        width = logits.shape[-1]
        flat, wanted = logits.detach().reshape(-1, width), targets.reshape(-1)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        step = max(1, _SLICE_ENTRIES // width)
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            part = None if teacher is None else _rows(teacher, rows)
            losses, slope = _slice_loss(flat[rows].float(), wanted[rows], shape, part)
            sums += losses
            if gradient is not None:
                gradient[rows] = slope.mul_(torch.where(wanted[rows] != IGNORED, scale, 0.0).unsqueeze(-1))
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(logits))
        ctx.mark_non_differentiable(sums)
        total = (1 - shape.weight) * sums[0] + shape.weight * shape.temperature**2 * sums[1]
        return (total * scale).float(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        upstream = gradients[0]
        if upstream.device.type != "cpu" or float(upstream) != 1:  # on a CPU looking is cheaper than a pass
            gradient = gradient * upstream.to(gradient.dtype)
        return gradient, None, None, None, None


def _rows(teacher: FullTargets | TopTargets, rows: slice) -> FullTargets | TopTargets:
    if isinstance(teacher, FullTargets):
        return FullTargets(teacher.logits.reshape(-1, teacher.logits.shape[-1])[rows])
    k = teacher.indices.shape[-1]
    indices, probabilities = teacher.indices.reshape(-1, k)[rows], teacher.probabilities.reshape(-1, k)[rows]
    return TopTargets(indices, probabilities, teacher.rest.reshape(-1)[rows])


def _slice_loss(
    logits: Tensor,  # (m, V) float32
    targets: Tensor,  # (m,) with IGNORED
    shape: LossShape,
    teacher: FullTargets | TopTargets | None,  # of m positions
) -> tuple[Tensor, Tensor]:
    """(2,) float64, cross entropy and divergence over counted positions; and the slope (m, V) of every position."""
    lam, heat = shape.weight, shape.temperature
    counted, gold = targets != IGNORED, targets.clamp(min=0).unsqueeze(-1)
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    cross_entropy = (normaliser - logits.gather(1, gold)).squeeze(-1)
    slope = torch.sub(logits, normaliser).exp_()
    divergence = torch.zeros_like(cross_entropy)
    if teacher is not None and heat == 1:
        divergence = _pull_(slope, logits, normaliser, gold, shape, teacher, kept=1 - lam, pulled=lam)
    elif teacher is not None:
        soft = logits / heat
        soft_normaliser = torch.logsumexp(soft, dim=-1, keepdim=True)
        pull = torch.sub(soft, soft_normaliser).exp_()
        divergence = _pull_(pull, soft, soft_normaliser, gold, shape, teacher, kept=0.0, pulled=lam * heat)
        slope.mul_(1 - lam).add_(pull)
    slope.scatter_add_(1, gold, torch.full_like(normaliser, lam - 1))
    losses = torch.stack([cross_entropy, divergence])
    return torch.where(counted, losses, 0.0).sum(dim=-1, dtype=torch.float64), slope


def _pull_(  # noqa: PLR0913 - one step of one formula
    student: Tensor,  # (m, V) probabilities at the loss's temperature; overwritten
    logits: Tensor,  # (m, V) over the temperature
    normaliser: Tensor,  # (m, 1)
    gold: Tensor,  # (m, 1)
    shape: LossShape,
    teacher: FullTargets | TopTargets,
    *,
    kept: float,
    pulled: float,
) -> Tensor:
    """Replace q by kept * q + pulled * (q - p~) and return KL(p~ ‖ q), (m,)."""
    if isinstance(teacher, FullTargets):
        wanted = swapped_log_probabilities(teacher.logits, gold.squeeze(-1), shape)
        probabilities = wanted.exp()
        divergence = torch.linalg.vecdot(probabilities, wanted.sub_(logits)) + normaliser.squeeze(-1)
        if kept + pulled != 1:
            student.mul_(kept + pulled)
        student.sub_(probabilities, alpha=pulled)
        return divergence
    top, indices = teacher.probabilities, teacher.indices.long()
    found = student.gather(1, indices)
    student.scatter_(1, indices, 0.0)
    others = student.sum(dim=-1)
    ratio = torch.where(teacher.rest > 0, teacher.rest / others.clamp(min=_TINY), 0.0)
    divergence = torch.xlogy(top, top).sum(dim=-1) - (top * (logits.gather(1, indices) - normaliser)).sum(dim=-1)
    divergence += torch.xlogy(teacher.rest, ratio)
    student.mul_((kept + pulled - pulled * ratio).unsqueeze(-1))
    student.scatter_(1, indices, found.mul_(kept + pulled).sub_(top, alpha=pulled))
    return divergence
