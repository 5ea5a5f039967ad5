"""Stage 2: which samples are chosen, and that training on them teaches the format."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from cptquant.adaptation.alignment_training import Aligned, AlignmentSettings, align_
from cptquant.adaptation.format_alignment import (
    DEFAULT_TEMPLATE,
    check_alignment_package,
    load_selection,
    save_selection,
    score_samples,
    select_samples,
    set_template_,
    write_selection,
)
from cptquant.adaptation.sources import Record
from cptquant.core.errors import DataError, ModelError, UserError
from cptquant.core.progress import Progress, ignore_progress
from cptquant.models.load import LoadedModel, load_model

NAMES = ("os", "sys", "json", "math", "random", "pathlib", "typing", "string", "time", "glob", "copy", "types")
INSTRUCTIONS = [Record(f"How is {name} imported?", f"import {name}", number=n) for n, name in enumerate(NAMES, 1)]
PREFERENCES = [Record(f"Return {name}", f"return {name}", f"raise {name}", number=n) for n, name in enumerate(NAMES, 1)]
SETTINGS = AlignmentSettings(learning_rate=2e-3, batch=4, epochs=2, longest=128)


@pytest.fixture
def mini() -> LoadedModel:
    model = load_model("embedded:opt-mini")
    model.module.float().requires_grad_(True)
    set_template_(model.require_tokenizer(), None)
    return model


def plain_loss(model: LoadedModel, context: str, answer: str) -> float:
    tokenizer = model.require_tokenizer()
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, answer))
    with torch.no_grad():
        log_p = torch.log_softmax(model.module.eval()(input_ids=torch.tensor([[*before, *after]])).logits[0], -1)
    return -sum(float(log_p[len(before) - 1 + k, token]) for k, token in enumerate(after)) / len(after)


def test_the_default_template(mini: LoadedModel) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tokenizer = mini.require_tokenizer()
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == f"### user\nWhy?\n### assistant\nSo.{tokenizer.eos_token}\n"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "### user\nWhy?\n### assistant\n"


def test_the_score_is_the_ratio_of_two_losses_of_the_same_answer(mini: LoadedModel) -> None:
    scored = score_samples(mini.module, mini.require_tokenizer(), INSTRUCTIONS, [3, 0, 7], 128)
    assert [each.index for each in scored] == [3, 0, 7]
    for each in scored:
        record = INSTRUCTIONS[each.index]
        plain = plain_loss(mini, f"{record.question}\n", record.answer)
        templated = plain_loss(mini, f"### user\n{record.question}\n### assistant\n", record.answer)
        assert each.plain_nats == pytest.approx(plain, rel=1e-4)
        assert each.templated_nats == pytest.approx(templated, rel=1e-4)
        assert each.score == pytest.approx(templated / plain, rel=1e-4)


def test_the_largest_scores_among_the_easy_are_chosen(mini: LoadedModel, tmp_path: Path) -> None:
    tokenizer = mini.require_tokenizer()
    every = score_samples(mini.module, tokenizer, INSTRUCTIONS, range(12), 128)
    found = select_samples(mini.module, tokenizer, INSTRUCTIONS, 3, longest=128, seed=0)
    hardest = sorted(every, key=lambda each: each.plain_nats)[math.floor(0.75 * 11) + 1 :]
    easy = [each for each in every if each.index not in {hard.index for hard in hardest}]
    wanted = sorted(easy, key=lambda each: -each.score)[:3]
    assert [each.index for each in found.chosen] == [each.index for each in wanted]
    assert (found.candidates, found.dropped) == (12, len(hardest)) and len(hardest) == 3
    assert len(found.held_out) == 3 and not {e.index for e in found.held_out} & {e.index for e in found.chosen}
    write_selection(tmp_path / "chosen.jsonl", found)
    lines = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["line"] for line in lines] == [each.index + 1 for each in found.chosen]
    assert lines[0]["format_score"] == found.chosen[0].score


def test_too_few_samples(mini: LoadedModel) -> None:
    with pytest.raises(DataError, match=r"--align-instructions 12 asks for more than the 9 samples of --instructions "
                       "that remain after leaving out the hardest quarter"):  # fmt: skip
        select_samples(mini.module, mini.require_tokenizer(), INSTRUCTIONS, 12, longest=128, seed=0)


def test_sft_teaches_the_format(mini: LoadedModel, tmp_path: Path) -> None:
    tokenizer = mini.require_tokenizer()
    chosen, others = INSTRUCTIONS[:8], INSTRUCTIONS[8:]
    before = score_samples(mini.module, tokenizer, others, range(4), 128)
    again = copy.deepcopy(mini.module)
    found = align_(mini.module, tokenizer, chosen, SETTINGS, tmp_path / "first")
    after = score_samples(mini.module, tokenizer, others, range(4), 128)
    assert found.steps == 4 and math.isfinite(found.loss) and found.seconds > 0
    assert sum(each.templated_nats for each in after) < sum(each.templated_nats for each in before)
    assert align_(again, tokenizer, chosen, SETTINGS, tmp_path / "again").loss == found.loss
    for first, second in zip(mini.module.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("records", [INSTRUCTIONS, PREFERENCES], ids=["sft", "dpo"])
def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path, records: list[Record]) -> None:
    """Killed in the second epoch, which is half an epoch; and started once more when nothing is left to do."""
    settings = AlignmentSettings(learning_rate=2e-3, batch=2, epochs=1.5, longest=128)

    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done == 8:
            raise Killed

    def train(folder: Path, progress: Progress = ignore_progress) -> tuple[Aligned, dict[str, torch.Tensor]]:
        model = load_model("embedded:opt-mini")
        model.module.float().requires_grad_(True)
        model.module.config.dropout = 0.1
        for module in model.module.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.1  # the generators' states matter
        set_template_(model.require_tokenizer(), None)
        found = align_(model.module, model.require_tokenizer(), records, settings, folder, progress)
        return found, model.module.state_dict()

    straight, first = train(tmp_path / "straight")
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        train(broken, kill)
    whole = sorted(path.parent.name for path in broken.glob("*/progress.json"))
    assert whole == ["checkpoint-4", "checkpoint-6"] and straight.steps == 9
    (broken / "checkpoint-8").mkdir()  # begun, not whole
    weights = broken / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")  # and one that was damaged
    torch.manual_seed(99)
    for _ in range(2):
        resumed, second = train(broken)
        assert (resumed.steps, resumed.loss) == (straight.steps, straight.loss)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_selections_are_kept(mini: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    found = select_samples(mini.module, mini.require_tokenizer(), INSTRUCTIONS, 3, longest=128, seed=0)
    assert load_selection(path, INSTRUCTIONS) is None
    save_selection(path, found)
    again = load_selection(path, INSTRUCTIONS)
    assert again is not None
    assert (again.chosen, again.held_out, again.candidates, again.dropped) == (
        found.chosen, found.held_out, found.candidates, found.dropped,
    )  # fmt: skip
    assert again.records == {each.index: INSTRUCTIONS[each.index] for each in (*found.chosen, *found.held_out)}
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert load_selection(path, INSTRUCTIONS) is None


def test_dpo_prefers_the_chosen_answer(mini: LoadedModel, tmp_path: Path) -> None:
    tokenizer = mini.require_tokenizer()

    def margin() -> float:
        flipped = [Record(record.question, record.rejected or "") for record in PREFERENCES]
        liked, disliked = (
            score_samples(mini.module, tokenizer, records, range(12), 128) for records in (PREFERENCES, flipped)
        )
        return sum(bad.templated_nats - good.templated_nats for good, bad in zip(liked, disliked, strict=True))

    before = margin()
    found = align_(mini.module, tokenizer, PREFERENCES, SETTINGS, tmp_path)
    assert found.steps == 6 and margin() > before


def test_templates_of_ones_own(mini: LoadedModel, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = mini.require_tokenizer()
    assert set_template_(tokenizer, None) == "the tokenizer's own"
    (tmp_path / "good.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    assert set_template_(tokenizer, str(tmp_path / "good.jinja")) == str(tmp_path / "good.jinja")
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no users here') }}", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"the chat template fails on a question \(no users here\); mend it, or give one"
    ):
        set_template_(tokenizer, str(tmp_path / "bad.jinja"))
    with pytest.raises(DataError, match=r"--chat-template .*gone.jinja cannot be read"):
        set_template_(tokenizer, str(tmp_path / "gone.jinja"))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="the tokenizer has no end-of-sequence token, and format alignment needs one"):
        set_template_(tokenizer, None)


def test_without_trl_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'need the package trl; install it with: pip install "cptquant\[adapt\]"'):
        check_alignment_package()
