"""Losses per sequence against direct torch and SciPy-style formulas."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cptquant.core.errors import DataError
from cptquant.models import losses


def tokens_of(ids, mask=None, labels=None):
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return SimpleNamespace(input_ids=ids, attention_mask=mask, labels=labels)


def test_next_token_targets_skip_padding_on_either_side():
    tokens = tokens_of([[5, 6, 7, 0], [0, 8, 9, 4]], [[1, 1, 1, 0], [0, 1, 1, 1]])
    targets = losses.scored_targets(tokens, "causal_lm")
    ignored = losses.IGNORED
    assert targets.tolist() == [[6, 7, ignored, ignored], [ignored, 9, 4, ignored]]


def test_a_classifier_needs_labels():
    with pytest.raises(DataError, match='--calibration and --eval-text as jsonl lines with "text" and "label"'):
        losses.scored_targets(tokens_of([[1, 2]]), "sequence_classification")


@pytest.mark.parametrize("slice_entries", [losses._SLICE_ENTRIES, 7])
def test_nll_is_cross_entropy_whatever_the_slice(monkeypatch, slice_entries):
    monkeypatch.setattr(losses, "_SLICE_ENTRIES", slice_entries)
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 3:] = losses.IGNORED
    result = losses.sequence_nll(logits, targets)
    expected = [
        torch.nn.functional.cross_entropy(logits[i], targets[i], ignore_index=losses.IGNORED, reduction="sum")
        for i in range(3)
    ]
    torch.testing.assert_close(result.sums.float(), torch.stack(expected))
    assert result.counts.tolist() == [3, 5, 5]
    torch.testing.assert_close(result.means, result.sums / torch.tensor([3, 5, 5]))
    right = (logits.argmax(-1) == targets) & (targets != losses.IGNORED)
    assert result.correct.tolist() == right.sum(1).tolist()


def test_nll_of_classes_and_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1])
    result = losses.sequence_nll(logits, labels)
    (gradient,) = torch.autograd.grad(result.sums.sum(), logits)
    expected = torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(gradient, expected)
    assert result.counts.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("scale", [1e-4, 0.1, 3.0, 30.0])
def test_kl_equals_torch_distributions_from_tiny_to_large(monkeypatch, scale):
    monkeypatch.setattr(losses, "_SLICE_ENTRIES", 40)
    torch.manual_seed(0)
    reference = torch.randn(2, 6, 17, dtype=torch.float64)
    logits = reference + scale * torch.randn(2, 6, 17, dtype=torch.float64)
    scored = torch.ones(2, 6, dtype=torch.bool)
    scored[1, 2:] = False
    result = losses.sequence_kl(reference, logits, scored)
    each = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=reference), torch.distributions.Categorical(logits=logits)
    )
    # float32 knows a logit difference of size `scale` to within eps / scale of itself, and KL is quadratic in it.
    relative = 1e-5 + 2 * torch.finfo(torch.float32).eps / scale
    torch.testing.assert_close(result.sums, each.where(scored, 0).sum(1), rtol=relative, atol=1e-14)
    assert result.counts.tolist() == [6, 2]
    same = (reference.argmax(-1) == logits.argmax(-1)) & scored
    assert result.agreements.tolist() == same.sum(1).tolist()


def test_kl_of_a_model_with_itself_is_exactly_zero():
    logits = torch.randn(2, 3, 5)
    result = losses.sequence_kl(logits, logits.clone(), torch.ones(2, 3, dtype=torch.bool))
    assert result.sums.tolist() == [0, 0]
    assert result.agreements.tolist() == [3, 3]
    shifted = losses.sequence_kl(logits, logits + 1, torch.ones(2, 3, dtype=torch.bool))
    assert shifted.sums.max() < 1e-12  # a constant added to all logits changes no probability


def test_pooling_ignores_padding():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert losses.pooled_embedding(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_cosine_distance():
    first, second = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    torch.testing.assert_close(losses.cosine_distance(first, second), torch.tensor([1.0, 0.0], dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Text:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    digest: str = "d"
    description: str = "text"


def test_masking_hides_ordinary_tokens_only_and_at_least_one_a_sequence():
    ids = torch.randint(10, 50, (40, 12))
    ids[:, 0], ids[:, 8] = 1, 2
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    tokens = Text(ids, mask)
    settings = {"mask_token_id": 3, "special_ids": torch.tensor([1, 2, 3])}
    masked, targets = losses.mask_tokens(tokens, fraction=0.05, seed=1, **settings)
    hidden = targets != losses.IGNORED
    assert hidden.any(dim=1).all()
    assert not hidden[:, [0, 8, 9, 10, 11]].any()
    assert (masked.input_ids[hidden] == 3).all()
    assert torch.equal(targets[hidden], ids[hidden])
    assert torch.equal(masked.input_ids[~hidden], ids[~hidden])
    again, _ = losses.mask_tokens(tokens, fraction=0.05, seed=1, **settings)
    other, _ = losses.mask_tokens(tokens, fraction=0.05, seed=2, **settings)
    assert torch.equal(again.input_ids, masked.input_ids)
    assert not torch.equal(other.input_ids, masked.input_ids)
    assert masked.digest != other.digest
