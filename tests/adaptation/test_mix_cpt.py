"""Stage 1: what is learned, how, and what a kill or a bad number does to it."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from adaptation_toys import fresh, held_out, mixture, toy, weights
from torch.nn import functional
from transformers import PreTrainedModel

from cptquant.adaptation.held_out import held_out_loss, reads_documents_apart
from cptquant.adaptation.logit_swap import LossShape
from cptquant.adaptation.mix_cpt import (
    CausalTraining,
    Distillation,
    Looks,
    TrainingSettings,
    train_causal,
)
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.teacher import LiveTeacher, build_cache
from cptquant.models.losses import IGNORED

SETTINGS = TrainingSettings(batch_windows=4, learning_rate=3e-3, looks=3, saves=3)


def trained(
    folder: Path, settings: TrainingSettings = SETTINGS, *, distillation: Distillation | None = None,
    kind: str = "llama", mixed: Mixture | None = None, looks: Looks | None = None,
) -> tuple[CausalTraining, PreTrainedModel]:  # fmt: skip
    model = toy(kind)
    found = train_causal(
        model, mixed or mixture(), folder, settings, distillation=distillation,
        looks=looks or Looks({"domain": held_out()}),
    )  # fmt: skip
    return found, model


def self_teacher(shape: LossShape, kind: str = "llama") -> Distillation:
    return Distillation(LiveTeacher(toy(kind).eval()), shape)


def assert_equal(first: PreTrainedModel, second: PreTrainedModel, atol: float = 0.0) -> None:
    for name, value in weights(first).items():
        torch.testing.assert_close(value, weights(second)[name], rtol=0, atol=atol)


def test_it_learns_and_looks(tmp_path: Path) -> None:
    found, _ = trained(tmp_path)
    assert [look.step for look in found.looks] == [0, 2, 4, 6] and found.done == found.steps == 6
    assert [look.tokens for look in found.looks] == [0, 96, 192, 288]
    losses = [look.held_out["domain"].nll_nats_per_token for look in found.looks]
    assert losses[-1] < losses[0] - 0.1
    assert found.looks[0].training_nats_per_token is None and found.looks[-1].divergence_nats_per_token is None
    assert found.seconds > 0 and found.teacher_seconds == 0 and not found.stopped
    assert found.looks[0].held_out["domain"].n == 66 and found.looks[0].held_out["domain"].stderr is not None


def test_held_out_loss_equals_cross_entropy() -> None:
    model, tokens = toy().eval(), held_out()
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids).logits[:, :-1]
        wanted = functional.cross_entropy(logits.flatten(0, 1), tokens.input_ids[:, 1:].flatten())
    assert held_out_loss(model, tokens).nll_nats_per_token == pytest.approx(float(wanted), rel=1e-5)


def test_plain_training_equals_a_readable_loop(tmp_path: Path) -> None:
    """AdamW on the mean cross entropy of each batch, warm-up and cosine, clipped; weight decay on matrices alone."""
    _, ours = trained(tmp_path, looks=Looks())
    model, mixed = toy().train(), mixture()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
    )
    for step in range(6):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1.0 if step == 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / 5)))
        windows = [mixed[4 * step + k] for k in range(4)]
        ids = torch.stack([torch.from_numpy(window.input_ids) for window in windows])
        logits = model(input_ids=ids).logits[:, :-1]
        optimiser.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert_equal(ours, model, atol=2e-5)


@pytest.mark.parametrize("shape", [None, LossShape(0.5)])
def test_accumulation_does_not_change_the_result(tmp_path: Path, shape: LossShape | None) -> None:
    """Windows with unequal numbers of counted tokens, in one piece or in two."""
    results = []
    for micro in (4, 2, 1):
        settings = TrainingSettings(batch_windows=4, learning_rate=3e-3, micro_batch=micro)
        distillation = None if shape is None else self_teacher(shape)
        mixed = mixture(apart=True)
        counted = {int((mixed[k].labels[1:] != IGNORED).sum()) for k in range(24)}
        assert len(counted) > 1
        results.append(trained(fresh(tmp_path, str(micro)), settings, distillation=distillation, mixed=mixed))
    for found, model in results[1:]:
        assert_equal(model, results[0][1], atol=1e-5)
        for look, first in zip(found.looks[1:], results[0][0].looks[1:], strict=True):
            assert look.training_nats_per_token == pytest.approx(first.training_nats_per_token, rel=1e-5)


def test_no_weight_on_the_teacher_is_plain_training(tmp_path: Path) -> None:
    _, plain = trained(fresh(tmp_path, "plain"))
    _, none = trained(fresh(tmp_path, "none"), distillation=self_teacher(LossShape(0.0)))
    assert_equal(plain, none)


def test_without_the_swap_a_teacher_like_the_student_holds_it_still(tmp_path: Path) -> None:
    settings = TrainingSettings(batch_windows=4, learning_rate=1e-4, weight_decay=0.0)
    held, _ = trained(fresh(tmp_path, "held"), settings, distillation=self_teacher(LossShape(1.0, swap=False)))
    swapped, _ = trained(fresh(tmp_path, "swapped"), settings, distillation=self_teacher(LossShape(1.0)))
    ends = [found.looks[-1].divergence_nats_per_token or 0.0 for found in (held, swapped)]
    assert ends[0] < 1e-5 and ends[1] > 1e-3


def test_a_cache_of_the_whole_vocabulary_trains_like_the_live_teacher(tmp_path: Path) -> None:
    shape = LossShape(0.6)
    live, first = trained(fresh(tmp_path, "live"), distillation=self_teacher(shape))
    cache = build_cache(toy().eval(), mixture(), shape, 61, tmp_path / "cache", teacher_digest="toy")
    cached, second = trained(fresh(tmp_path, "cached"), distillation=Distillation(cache, shape))
    assert_equal(first, second, atol=2e-5)
    assert live.looks[-1].divergence_nats_per_token == pytest.approx(
        cached.looks[-1].divergence_nats_per_token, rel=1e-4
    )
    assert live.teacher_seconds > 0


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    """OPT has dropout: the generators' states matter."""
    shape = LossShape(0.5)
    straight, first = trained(fresh(tmp_path, "straight"), distillation=self_teacher(shape, kind), kind=kind)

    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    broken = fresh(tmp_path, "broken")
    with pytest.raises(Killed):
        train_causal(
            toy(kind), mixture(), broken, SETTINGS, distillation=self_teacher(shape, kind),
            looks=Looks({"domain": held_out()}), progress=kill,
        )  # fmt: skip
    assert (broken / "checkpoint-4").is_dir()
    (broken / "checkpoint-5").mkdir()  # begun, not whole
    (broken / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    torch.manual_seed(99)
    resumed, second = trained(broken, distillation=self_teacher(shape, kind), kind=kind)
    assert_equal(first, second)
    assert resumed.looks == straight.looks and not (broken / "checkpoint-5").exists()


@pytest.mark.parametrize("saves", [3, 1])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, saves: int) -> None:
    def spoil(stage: str, done: int, total: int) -> None:
        if done == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    model = toy()
    settings = TrainingSettings(batch_windows=4, learning_rate=3e-3, saves=saves)
    found = train_causal(model, mixture(), tmp_path, settings, progress=spoil)
    assert found.stopped == "training stopped at step 4 of 6: the loss is nan"
    assert found.done == (2 if saves == 3 else 0)
    if saves == 3:
        assert all(bool(torch.isfinite(value).all()) for value in weights(model).values())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    _, plain = trained(fresh(tmp_path, "plain"))
    settings = TrainingSettings(batch_windows=4, learning_rate=3e-3, looks=3, saves=3, gradient_checkpointing=True)
    _, again = trained(fresh(tmp_path, "again"), settings)
    assert_equal(plain, again, atol=1e-6)


def test_bf16_trains_nearly_the_same(tmp_path: Path) -> None:
    plain, _ = trained(fresh(tmp_path, "plain"))
    settings = TrainingSettings(batch_windows=4, learning_rate=3e-3, looks=3, saves=3, bf16=True)
    mixed, model = trained(fresh(tmp_path, "mixed"), settings)
    assert next(model.parameters()).dtype is torch.float32
    first, second = (found.looks[-1].held_out["domain"].nll_nats_per_token for found in (plain, mixed))
    assert first != second and second == pytest.approx(first, abs=0.02)


def test_schedules() -> None:
    cosine = [TrainingSettings(warm_up=0.1).factor(step, 100) for step in range(100)]
    assert cosine[0] == 0.1 and cosine[9] == cosine[10] == 1.0 and cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert cosine[55] == pytest.approx(0.55) and all(a >= b for a, b in itertools.pairwise(cosine[10:]))
    flat = [TrainingSettings(schedule="constant", warm_up=0.1, anneal=0.2).factor(step, 100) for step in range(100)]
    assert (
        flat[10:80] == [1.0] * 70
        and flat[79] == 1.0
        and 0.1 < flat[99] < 0.2
        and flat[90] == pytest.approx(0.53, abs=0.02)
    )
    never = [TrainingSettings(schedule="constant", warm_up=0.1, anneal=0).factor(step, 100) for step in range(100)]
    assert never[10:] == [1.0] * 90


def test_documents_kept_apart_are_read_apart() -> None:
    """Positions that start anew keep a llama from attending across: the second document reads as if alone."""
    model = toy().eval()
    assert reads_documents_apart(model)
    ids = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(6), *range(6)]])
    with torch.no_grad():
        apart = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        together = model(input_ids=ids, use_cache=False).logits
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits
    torch.testing.assert_close(apart[:, 6:], alone, rtol=0, atol=1e-5)
    assert float((together[:, 6:] - alone).abs().max()) > 1e-3
    assert not reads_documents_apart(toy("opt").eval())  # takes positions, and attends by the mask alone
