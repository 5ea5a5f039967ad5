"""The six tests that logit swap self-distillation must pass, and the one-pass loss against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cptquant.adaptation.logit_swap import (
    FullTargets,
    LossShape,
    TopTargets,
    counted_loss,
    swap_gold_,
    swapped_log_probabilities,
)
from cptquant.models.losses import IGNORED

ONLY_KL = LossShape(weight=1.0)


def drawn(seed: int, *, rows: int = 3, length: int = 5, width: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and targets with some ignored."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, length, width, generator=generator) * 2 for _ in range(2))
    targets = torch.randint(width, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.3] = IGNORED
    targets[0, 0] = 3
    return student, teacher, targets


def plain_loss(student: Tensor, teacher: Tensor, targets: Tensor, shape: LossShape) -> Tensor:
    """The slow, readable reference in float64, mean over counted tokens."""
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for z, t, y in zip(student.flatten(0, 1).double(), teacher.flatten(0, 1).double(), targets.flatten(), strict=True):
        if y == IGNORED:
            continue
        swapped = t.clone()
        if shape.swap:
            top = int(t.argmax())
            swapped[top], swapped[y] = t[y], t[top]
        wanted = torch.softmax(swapped / shape.temperature, 0)
        predicted = torch.log_softmax(z / shape.temperature, 0)
        kl = (wanted * (wanted.log() - predicted)).sum()
        total = total + (1 - shape.weight) * functional.cross_entropy(z, y) + shape.weight * shape.temperature**2 * kl
        counted += 1
    return total / counted


def top_targets(teacher: Tensor, targets: Tensor, shape: LossShape, k: int) -> TopTargets:
    flat = teacher.flatten(0, 1)
    wanted = swapped_log_probabilities(flat, targets.flatten().clamp(min=0), shape).exp()
    top = wanted.topk(k, dim=-1)
    rest = wanted.scatter(1, top.indices, 0.0).sum(-1)
    lead = targets.shape
    return TopTargets(top.indices.view(*lead, k), top.values.view(*lead, k), rest.view(lead))


SHAPES = [
    LossShape(), LossShape(0.3), ONLY_KL, LossShape(0.5, 2.0), LossShape(0.3, 0.7, swap=False), LossShape(1.0, 3.0),
]  # fmt: skip


def test_1_where_the_teacher_is_right_the_target_is_its_distribution() -> None:
    _, teacher, _ = drawn(0)
    flat = teacher.flatten(0, 1)
    gold = flat.argmax(-1)
    assert torch.equal(swapped_log_probabilities(flat, gold, ONLY_KL), torch.log_softmax(flat, -1))


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_2_the_swap_keeps_sorted_probabilities_and_puts_gold_on_top(seed: int) -> None:
    _, teacher, targets = drawn(seed)
    flat, gold = teacher.flatten(0, 1), targets.flatten().clamp(min=0)
    swapped = swap_gold_(flat.clone(), gold)
    assert torch.equal(swapped.sort(-1).values, flat.sort(-1).values)
    assert torch.equal(swapped.argmax(-1), gold)
    assert (swapped != flat).sum(-1).max() <= 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["full", "top"])
def test_3_ignored_positions_contribute_neither_loss_nor_gradient(shape: LossShape, kind: str) -> None:
    student, teacher, targets = drawn(1)

    def made(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        leaf = student.clone().requires_grad_()
        given = FullTargets(teacher) if kind == "full" else top_targets(teacher, targets, shape, 4)
        found = counted_loss(leaf, targets, shape, given)
        found.total.backward()
        assert leaf.grad is not None
        return float(found.total.detach()), leaf.grad

    loss, gradient = made(student, teacher)
    ignored = targets == IGNORED
    assert ignored.any() and gradient[ignored].abs().max() == 0 and gradient[~ignored].abs().min() > 0
    other = torch.where(ignored.unsqueeze(-1), torch.randn(teacher.shape) * 50, teacher)
    moved = torch.where(ignored.unsqueeze(-1), torch.randn(student.shape) * 50, student)
    again, gradient_again = made(moved, other)
    assert again == loss and torch.equal(gradient_again, gradient)


@pytest.mark.parametrize("shape", SHAPES)
def test_4_invariant_to_batch_splitting(shape: LossShape) -> None:
    student, teacher, targets = drawn(2, rows=4)
    whole = student.clone().requires_grad_()
    counted_loss(whole, targets, shape, FullTargets(teacher)).total.backward()
    split = student.clone().requires_grad_()
    counted = int((targets != IGNORED).sum())
    for rows in (slice(0, 1), slice(1, 4)):
        counted_loss(split[rows], targets[rows], shape, FullTargets(teacher[rows]), scale=1 / counted).total.backward()
    turned = student.view(2, 10, -1).clone().requires_grad_()  # another layout of the same positions
    counted_loss(turned, targets.view(2, 10), shape, FullTargets(teacher.view(2, 10, -1))).total.backward()
    assert whole.grad is not None and split.grad is not None and turned.grad is not None
    torch.testing.assert_close(split.grad, whole.grad, rtol=0, atol=1e-8)
    torch.testing.assert_close(turned.grad.view_as(whole.grad), whole.grad, rtol=0, atol=1e-8)


def test_5_the_gradient_of_the_divergence_is_student_minus_target() -> None:
    student, teacher, targets = drawn(3)
    leaf = student.clone().requires_grad_()
    found = counted_loss(leaf, targets, ONLY_KL, FullTargets(teacher), scale=1.0)
    found.total.backward()
    wanted = swapped_log_probabilities(teacher.flatten(0, 1), targets.flatten().clamp(min=0), ONLY_KL).exp()
    difference = torch.softmax(student, -1) - wanted.view_as(student)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, difference * (targets != IGNORED).unsqueeze(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_6_all_of_the_vocabulary_is_exact_and_less_is_a_lower_bound(shape: LossShape) -> None:
    student, teacher, targets = drawn(4)
    exact = student.clone().requires_grad_()
    full = counted_loss(exact, targets, shape, FullTargets(teacher))
    full.total.backward()
    for k in (17, 16, 5, 1):
        leaf = student.clone().requires_grad_()
        found = counted_loss(leaf, targets, shape, top_targets(teacher, targets, shape, k))
        found.total.backward()
        assert leaf.grad is not None and exact.grad is not None
        assert found.cross_entropy_nats == pytest.approx(full.cross_entropy_nats, abs=1e-9)
        if k >= 16:  # one bucket of one token is that token
            assert found.divergence_nats == pytest.approx(full.divergence_nats, rel=1e-6)
            torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-5, atol=1e-7)
        else:
            assert 0 < found.divergence_nats < full.divergence_nats


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_the_readable_reference(shape: LossShape) -> None:
    student, teacher, targets = drawn(5)
    ours, reference = student.clone().requires_grad_(), student.double().requires_grad_()
    found = counted_loss(ours, targets, shape, FullTargets(teacher))
    (found.total * 3).backward()
    (wanted := plain_loss(reference, teacher, targets, shape)).backward()
    assert float(found.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(ours.grad.double(), reference.grad * 3, rtol=1e-4, atol=1e-7)
    assert found.counted == int((targets != IGNORED).sum())


@pytest.mark.parametrize("k", [1, 3, 9])
def test_gradient_of_the_top_k_loss_by_finite_differences(k: int) -> None:
    student, teacher, targets = drawn(6, rows=1, length=3, width=9)
    for shape in (LossShape(0.4), LossShape(0.7, 1.5)):
        given = top_targets(teacher, targets, shape, k)
        leaf = student.clone().requires_grad_()
        counted_loss(leaf, targets, shape, given).total.backward()
        assert leaf.grad is not None
        for place in ((0, 0, 2), (0, 0, 5), (0, 1, 1)):
            ends = []
            for step in (0.01, -0.01):
                moved = student.clone()
                moved[place] += step
                ends.append(float(counted_loss(moved, targets, shape, given).total))
            assert float(leaf.grad[place]) == pytest.approx((ends[0] - ends[1]) / 0.02, abs=1e-4)


def test_several_slices_and_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 40, 30_000, generator=generator).bfloat16()
    targets = torch.randint(30_000, (2, 40), generator=generator)
    leaf = student.clone().requires_grad_()
    found = counted_loss(leaf, targets)
    found.total.backward()
    reference = student.float().requires_grad_()
    wanted = functional.cross_entropy(reference.flatten(0, 1), targets.flatten())
    wanted.backward()
    assert float(found.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert leaf.grad is not None and leaf.grad.dtype is torch.bfloat16 and reference.grad is not None
    torch.testing.assert_close(leaf.grad, reference.grad.bfloat16(), rtol=0.01, atol=1e-9)


def test_nothing_counted_is_no_loss() -> None:
    leaf = torch.randn(1, 3, 5, requires_grad=True)
    found = counted_loss(leaf, torch.full((1, 3), IGNORED))
    found.total.backward()
    assert found.counted == 0 and float(found.total.detach()) == 0
    assert leaf.grad is not None and leaf.grad.abs().max() == 0


def test_a_weight_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="a distillation weight above 0 needs a teacher"):
        counted_loss(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), LossShape(0.1))
