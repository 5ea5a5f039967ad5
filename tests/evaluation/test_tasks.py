"""Questions judged by likelihood."""

import json
from pathlib import Path

import pytest
import torch

from cptquant.core.errors import DataError
from cptquant.evaluation.tasks import Question, QuestionSet, read_questions, score_questions, task_measurements
from cptquant.models.load import LoadedModel, load_model

ROWS = [
    {"query": "import", "choices": ["os", "sys as a longer name", "re"], "gold": 1},
    {"context_options": ["def run(self", "def run"], "continuation": "):", "gold": 0},
    {"context": "for index in range(10", "continuation": "):"},
]


@pytest.fixture(scope="module")
def mini() -> LoadedModel:
    model = load_model("embedded:opt-mini")
    model.module.float()
    return model


def written(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def nats(model: LoadedModel, context: str, continuation: str) -> tuple[float, int, bool]:
    """One answer at a time, token by token."""
    tokenizer = model.require_tokenizer()
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    total, greedy = 0.0, True
    for place, token in enumerate(after):
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([[*before, *after[:place]]])).logits[0, -1]
        total -= float(torch.log_softmax(logits, -1)[token])
        greedy = greedy and int(logits.argmax()) == token
    return total, len(after), greedy


def test_scores_equal_one_answer_at_a_time(mini: LoadedModel, tmp_path: Path) -> None:
    task = read_questions(written(tmp_path / "quiz.jsonl", *ROWS), 10)
    assert task.name == "quiz" and task.questions[1] == Question((("def run(self", "):"), ("def run", "):")), 0)
    found = score_questions(mini.module, mini.require_tokenizer(), task)
    choices = [nats(mini, "import", f" {choice}") for choice in ROWS[0]["choices"]]  # type: ignore[attr-defined]
    per_byte = [
        loss / len(choice) for (loss, _, _), choice in zip(choices, ["os", "sys as a longer name", "re"], strict=True)
    ]
    options = [nats(mini, context, " ):") for context in ("def run(self", "def run")]
    single = nats(mini, "for index in range(10", " ):")
    assert found.gold_nats.tolist() == pytest.approx([choices[1][0], options[0][0], single[0]], rel=1e-4)
    assert found.gold_tokens.tolist() == [choices[1][1], options[0][1], single[1]]
    assert found.correct.tolist() == [per_byte[1] == min(per_byte), options[0][0] < options[1][0], single[2]]


def test_batches_do_not_matter(mini: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["import os", "return self", "raise ValueError('no')", "x = 1"]
    answers = tuple((word * (1 + index), " and more" * index + " end") for index, word in enumerate(words))
    task = QuestionSet("quiz", tuple(Question((answer,), 0) for answer in answers))
    together = score_questions(mini.module, mini.require_tokenizer(), task)
    monkeypatch.setattr("cptquant.evaluation.tasks._BATCH_TOKENS", 1)
    alone = score_questions(mini.module, mini.require_tokenizer(), task)
    torch.testing.assert_close(together.gold_nats, alone.gold_nats, rtol=1e-5, atol=1e-5)


def test_what_is_too_long_is_cut_at_the_left(mini: LoadedModel) -> None:
    task = QuestionSet("quiz", (Question((("word " * 2000, "end"),), 0),))
    found = score_questions(mini.module, mini.require_tokenizer(), task)
    assert torch.isfinite(found.gold_nats).all()


def test_measurements(mini: LoadedModel, tmp_path: Path) -> None:
    task = read_questions(written(tmp_path / "quiz.jsonl", *ROWS), 2)
    assert len(task.questions) == 2
    scores = score_questions(mini.module, mini.require_tokenizer(), task)
    measured = {
        (each.name, each.subject): each for each in task_measurements("quiz", {"original": scores, "new": scores})
    }
    accuracy = measured["quiz_accuracy", "new"]
    assert accuracy.value == float(scores.correct.double().mean()) and accuracy.n == 2 and accuracy.unit == "share"
    loss = measured["quiz_answer_nats_per_token", "original"]
    assert loss.value == pytest.approx(float(scores.gold_nats.sum() / scores.gold_tokens.sum()))
    change = measured["quiz_answer_increase_nats_per_token", "new"]
    assert change.value == 0 and change.stderr == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"line 2: the keys \['text'\] are of no known form; give \"query\""),
        ({"query": "a", "choices": ["b"], "gold": 1}, "line 2: gold is 1, expected a number from 0 to 0"),
        ({"query": "a", "choices": [], "gold": 0}, r"line 2: choices is \[\], expected text"),
        ({"choices": ["b"], "gold": 0}, r"line 2: query is \[None\], expected text"),
        ({"context_options": "ab", "continuation": "c", "gold": 0}, "line 2: context_options is ab, expected text"),
    ],
)
def test_unusable_rows(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(written(tmp_path / "quiz.jsonl", ROWS[0], row), 10)


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--tasks .*quiz.jsonl holds no questions; give rows with"):
        read_questions(written(tmp_path / "quiz.jsonl"), 10)
