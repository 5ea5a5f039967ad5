"""End-to-end training: the student is the quantized model, training helps, is resumed with the same bits, and stops."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantizers.test_quantize import make_model, make_plan, make_tokens
from torch import Tensor

from cptquant.core.errors import DataError, UserError
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import QuantizedWeight, StoredWeight
from cptquant.quantizers.blocks.trained_layer import Trains
from cptquant.quantizers.first_pass import FinishedInMemory
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.quantize import quantize_sites
from cptquant.recovery.code_steps import CodeSteps
from cptquant.recovery.end_to_end import EndToEnd, Material, Recovered, fit_steps, run_end_to_end, split_text
from cptquant.recovery.grid_optimizer import GridAdam
from cptquant.recovery.lesson import Lesson, Weights
from cptquant.recovery.student import StudentOptions, build_student, frozen_sites
from cptquant.recovery.training import Diverged, Schedule, SequenceData

POOR = Gptq(coarse_products=False, clip_search=False, diagonal_importance=False, descent_rounds=0)
SCHEDULE = Schedule(steps=12, batch_sequences=4, latent_rate=0.01, step_rate=2e-3, other_rate=2e-3, checks=4, saves=3)
QAT = EndToEnd("qat", StudentOptions(Trains()), Weights(states=1.0), SCHEDULE)
SCALES = replace(QAT, options=StudentOptions(Trains(latent=False), others=False))
METHODS = {
    "qat": QAT,
    "scales": SCALES,
    "multipliers": replace(SCALES, options=StudentOptions(Trains(latent=False, multipliers=True), others=False)),
    "pv": replace(SCALES, codes=CodeSteps(0.002)),
}


class Trained:
    """What a recovery found, as a source of weights for the stream."""

    def __init__(self, found: Recovered, start: FinishedInMemory) -> None:
        self._found, self._start = found, start

    def quantized(self, site_name: str) -> StoredWeight | None:
        return self._found.weights.get(site_name, self._start.quantized(site_name))

    def weight(self, site_name: str) -> Tensor | None:
        found = self.quantized(site_name)
        return None if found is None else found.dequantize()

    def kept(self) -> Mapping[str, Tensor]:
        return self._found.kept


def start_of(model: LoadedModel, tokens: TokenSet, linear: str = "int2-g16") -> FinishedInMemory:
    start = FinishedInMemory()
    quantize_sites(model, make_plan(model, linear), POOR, tokens, start.keep)
    return start


def material_of(name: str, folder: Path, linear: str = "int2-g16") -> Material:
    model = make_model(name, folder)
    tokens = make_tokens(24)
    if model.layout.task == "sequence_classification":
        labels = torch.randint(5, (24,), generator=torch.Generator().manual_seed(3))
        tokens = TokenSet.build(tokens.input_ids, tokens.attention_mask, labels, tokens.documents, "random tokens")
    learned, held_out = split_text(tokens)
    return Material(model, model, start_of(model, tokens, linear), {}, learned, held_out)


def train(material: Material, method: EndToEnd, folder: Path) -> Recovered:
    return run_end_to_end(material, method, folder, lambda done, total: None)


def logits(material: Material, source: object) -> Tensor:
    stream = ModelStream(material.model, material.learned, weights=source)
    for _ in range(material.model.layout.block_count):
        stream.advance(stream.load_block())
    return torch.cat([stream.finish(index, hidden) for index, hidden in enumerate(stream.hidden)]).detach()


def assert_same(one: Recovered, other: Recovered) -> None:
    assert one.training.looks[1:] == other.training.looks[1:] and one.training.best_step == other.training.best_step
    for site, weight in one.weights.items():
        assert torch.equal(weight.dequantize(), other.weights[site].dequantize()), site
    assert one.kept.keys() == other.kept.keys()
    assert all(torch.equal(tensor, other.kept[name]) for name, tensor in one.kept.items())


@pytest.mark.parametrize("name", ["llama", "opt-projected", "bert-classifier"])
def test_the_student_is_the_quantized_model(name: str, tmp_path: Path) -> None:
    material = material_of(name, tmp_path)
    student = build_student(material.model, material.start, {}, QAT.options)
    expected = logits(material, material.start)
    with torch.no_grad():
        found = student.module(
            input_ids=material.learned.input_ids, attention_mask=material.learned.attention_mask
        ).logits
    real = material.learned.attention_mask.bool() if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)
    moved = {name for name, _ in student.trainable()}
    assert {f"{site}.latent" for site in student.layers} <= moved
    assert all(parameter.requires_grad for _, parameter in student.trainable())
    assert sum(p.requires_grad for p in student.module.parameters()) == len(moved)


@pytest.mark.parametrize("method", METHODS)
def test_training_helps_and_what_is_written_is_what_was_judged(method: str, tmp_path: Path) -> None:
    material = material_of("llama", tmp_path / "model")
    found = train(material, METHODS[method], tmp_path / "work")
    training = found.training
    assert training.best_loss < training.looks[0].held_out_loss and training.best_step > 0
    assert [look.step for look in training.looks] == [0, 3, 6, 9, 12] and training.done == 12 and not training.stopped
    # the written weights give the best look's loss: judged anew by stored weights alone, through a new student
    lesson = Lesson(
        build_student(
            material.model, Trained(found, material.start), found.kept, METHODS[method].options
        ).module, material.model.module.float(), "causal_lm", METHODS[method].weights, coarse=True,
    )  # fmt: skip
    tokens = material.held_out
    from cptquant.recovery.end_to_end import as_data
    from cptquant.recovery.training import mean_loss

    again = mean_loss(lesson, as_data(tokens, material.model, 0), 4)
    assert again == pytest.approx(training.best_loss, rel=1e-5)
    start = material.start
    codes = [
        (stored.codes != before.codes).any()
        for site, stored in found.weights.items()
        if isinstance(before := start.quantized(site), QuantizedWeight)
    ]
    assert any(codes) == (method not in ("scales", "multipliers"))
    assert bool(found.kept) == METHODS[method].options.others


@pytest.mark.parametrize("method", ["qat", "pv"])
def test_a_training_that_was_cut_gives_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = material_of("opt-projected", tmp_path / "model")
    whole = train(material, METHODS[method], tmp_path / "whole")

    def cut(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_end_to_end(material, METHODS[method], tmp_path / "cut", cut)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint-4"]
    # the next checkpoint was being written when the power failed
    (tmp_path / "cut" / "checkpoint-8").mkdir()
    (tmp_path / "cut" / "checkpoint-8" / "moved.safetensors").write_bytes(b"half")
    # and a byte of the one before was turned over: not what was written, so training starts again
    for flipped in (False, True):
        copy = tmp_path / f"copy-{flipped}"
        shutil.copytree(tmp_path / "cut", copy)
        if flipped:
            content = bytearray((copy / "checkpoint-4" / "moved.safetensors").read_bytes())
            content[-1] ^= 1
            (copy / "checkpoint-4" / "moved.safetensors").write_bytes(bytes(content))
        done_steps: list[int] = []
        again = run_end_to_end(material, METHODS[method], copy, lambda done, total, seen=done_steps: seen.append(done))
        assert done_steps == list(range(1 if flipped else 5, 13))
        assert_same(whole, again)
    steps: list[int] = []
    resumed = run_end_to_end(material, METHODS[method], tmp_path / "cut", lambda done, total: steps.append(done))
    assert steps == list(range(5, 13))
    assert_same(whole, resumed)


def test_running_blocks_again_changes_nothing(tmp_path: Path) -> None:
    material = material_of("llama", tmp_path / "model")
    one = train(material, QAT, tmp_path / "one")
    again = replace(QAT, schedule=replace(SCHEDULE, gradient_checkpointing=True))
    other = train(material, again, tmp_path / "other")
    assert [look.held_out_loss for look in one.training.looks] == pytest.approx(
        [look.held_out_loss for look in other.training.looks], rel=1e-3
    )


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_best(tmp_path: Path) -> None:
    material = material_of("llama", tmp_path / "model")
    wild = replace(QAT, schedule=replace(SCHEDULE, other_rate=1e30, steps=12))
    found = train(material, wild, tmp_path / "work")
    assert found.training.stopped.startswith("training stopped at step ")
    assert " of 12: the " in found.training.stopped and (
        "nan" in found.training.stopped or "not finite" in found.training.stopped
    )
    assert found.training.best_step == 0
    for site, weight in found.weights.items():
        assert torch.equal(weight.dequantize(), material.start.weight(site))


def test_frozen_sites_keep_every_bit(tmp_path: Path) -> None:
    material = material_of("llama", tmp_path / "model")
    method = replace(QAT, options=replace(QAT.options, frozen=("v_proj", "*.1.self_attn.o_proj")))
    found = train(material, method, tmp_path / "work")
    assert found.training.best_step > 0
    frozen = frozen_sites(material.model.layout, method.options.frozen)
    assert len(frozen) == 4
    for site, weight in found.weights.items():
        same = torch.equal(weight.dequantize(), material.start.weight(site))
        assert same == (site in frozen), site


def test_a_pattern_that_freezes_nothing_is_refused(tmp_path: Path) -> None:
    layout = make_model("llama", tmp_path).layout
    with pytest.raises(
        UserError, match=r"--freeze 'qkv' names no linear layer; this model's are: down_proj, gate_proj"
    ):
        frozen_sites(layout, ("qkv",))


def test_text_is_split_and_too_little_of_it_is_refused() -> None:
    learned, held_out = split_text(make_tokens(34))
    assert (learned.sequence_count, held_out.sequence_count) == (32, 2)
    rows = torch.cat([learned.documents, held_out.documents])
    assert sorted(rows.tolist()) == list(range(34))
    assert split_text(make_tokens(2000))[1].sequence_count == 32
    with pytest.raises(DataError, match=r"--data gives 3 sequences|--data gives 2 sequences"):
        split_text(make_tokens(3).subset([0, 1]))


def test_as_many_steps_as_fit_into_the_time(tmp_path: Path) -> None:
    material = material_of("llama", tmp_path)
    fitted, step_seconds = fit_steps(material, QAT, 20.0)
    assert step_seconds > 0
    assert fitted.schedule.steps == pytest.approx(20.0 / step_seconds, rel=0.2)
    assert replace(fitted, schedule=SCHEDULE) == QAT


@pytest.mark.parametrize("weights", [Weights(), Weights(kl=0.0, ce=1.0), Weights(states=2.0)])
def test_the_loss_is_the_one_of_the_formula(weights: Weights, tmp_path: Path) -> None:
    """Against a slow reference in float64, one token after the other."""
    material = material_of("llama", tmp_path)
    student = build_student(material.model, material.start, {}, QAT.options)
    teacher = make_model("llama", tmp_path / "again").module.float()
    lesson = Lesson(student.module, teacher, "causal_lm", weights, coarse=False)
    tokens = material.learned.subset(slice(0, 3))
    targets = torch.full_like(tokens.input_ids, -100)
    mask = tokens.attention_mask.bool()
    targets[:, :-1] = torch.where(mask[:, :-1] & mask[:, 1:], tokens.input_ids[:, 1:], -100)
    with torch.no_grad():
        found = lesson(tokens.input_ids, tokens.attention_mask, targets)["loss"]
        runs = [
            module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
            for module in (student.module, teacher)
        ]
    kl, ce, count = 0.0, 0.0, 0
    for row in range(3):
        for place in range(tokens.input_ids.shape[1]):
            if targets[row, place] == -100:
                continue
            q, p = (run.logits[row, place].double().log_softmax(-1) for run in runs)
            kl += float((p.exp() * (p - q)).sum())
            ce -= float(q[targets[row, place]])
            count += 1
    states = 0.0
    for ours, theirs in zip(runs[0].hidden_states[1:], runs[1].hidden_states[1:], strict=True):
        wanted = theirs[mask].double()
        spread = float((wanted - wanted.mean(dim=0)).square().sum(dim=1).mean())
        states += float((ours[mask].double() - wanted).square().sum(dim=1).mean()) / spread
    expected = (
        weights.kl * kl / count + weights.ce * ce / count + weights.states * states / (len(runs[0].hidden_states) - 1)
    )
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_step_is_adams_in_units_of_the_grid() -> None:
    """Ten steps against torch's Adam, latent weights divided by their steps."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(3, 4, generator=generator) + 0.1
    latent = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    norm = torch.nn.Parameter(torch.ones(4))
    ours = GridAdam([{"params": [latent], "lr": 0.1}, {"params": [norm], "lr": 0.01}], {latent: lambda: steps})
    scaled = torch.nn.Parameter(latent.detach() / steps)
    other = torch.nn.Parameter(torch.ones(4))
    reference = torch.optim.Adam(
        [{"params": [scaled], "lr": 0.1}, {"params": [other], "lr": 0.01}], betas=(0.9, 0.95), eps=1e-20
    )
    for _ in range(10):
        latent.grad, norm.grad = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
        scaled.grad, other.grad = latent.grad * steps, norm.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(latent.detach(), scaled.detach() * steps)
    torch.testing.assert_close(norm.detach(), other.detach())


def test_codes_move_few_at_a_time_to_where_the_loss_falls(tmp_path: Path) -> None:
    material = material_of("llama", tmp_path)
    student = build_student(material.model, material.start, {}, SCALES.options)
    move = CodeSteps(share=0.01, momentum=0.0).start(student)
    lesson = Lesson(student.module, material.model.module.float(), "causal_lm", Weights(), coarse=False)
    from cptquant.recovery.end_to_end import as_data

    batch = as_data(material.learned, material.model, 0)[:8]
    before = lesson(**batch)["loss"]
    codes = {site: layer.codes.clone() for site, layer in student.layers.items()}
    before.backward()
    gradients = {site: layer.take_value_gradient() for site, layer in student.layers.items()}
    for site, layer in student.layers.items():
        layer._value_gradient = gradients[site]
    move(1.0)
    total = sum(found.numel() for found in codes.values())
    moved = {site: layer.codes.int() - codes[site].int() for site, layer in student.layers.items()}
    count = sum(int((change != 0).sum()) for change in moved.values())
    assert 0.9 * 0.01 * total <= count <= 0.01 * total + 5
    assert all(int(change.abs().max()) <= 1 for change in moved.values())
    for site, change in moved.items():
        steps = student.layers[site].spread(student.layers[site].present_steps()).detach()
        assert bool((gradients[site] * change * steps <= 0).all()), site  # each lowers the loss to first order
    low, high = next(iter(student.layers.values())).limits()
    assert all(
        int(layer.codes.min()) >= int(low) and int(layer.codes.max()) <= int(high) for layer in student.layers.values()
    )


def test_sequences_are_read_by_row() -> None:
    data = SequenceData(torch.arange(6).view(3, 2), torch.ones(3, 2), torch.arange(3))
    assert len(data) == 3 and data[1]["input_ids"].tolist() == [2, 3] and data[1:]["targets"].tolist() == [1, 2]
    assert issubclass(Diverged, Exception)
