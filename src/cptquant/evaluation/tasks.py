"""Questions with given answers, judged by likelihood: no text is generated.

Three forms of a row, as common evaluation suites store them: `query`, `choices`, `gold` (which choice follows the
query), `context_options`, `continuation`, `gold` (after which context the continuation is likeliest), and `context`,
`continuation` (a single answer). Of several answers the one with the highest log-likelihood per byte of the scored
text is chosen, so that a short answer has no advantage; beside the accuracy stands the loss of the right answer in
nats per token, which moves long before the accuracy of a small model does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cptquant.core.errors import DataError
from cptquant.core.evaluation import Measurement
from cptquant.models.estimates import Clusters, estimate_mean, estimate_ratio
from cptquant.models.rows import Row, json_rows

_FORMS = '"query", "choices", "gold", or "context_options", "continuation", "gold", or "context", "continuation"'
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Question:
    """Attributes: answers: (context, continuation) of each. gold: the right one."""

    answers: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class QuestionSet:
    """Attributes: name: stem of the file. questions: in its order."""

    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class TaskScores:
    """One model's, by question.

    Attributes:
        gold_nats, gold_tokens: (n,) float64 and int64, loss of the right answer and its tokens.
        correct: (n,) bool, whether the right answer is the likeliest per byte; of a single answer, whether every token
            is the likeliest.
    """

    gold_nats: Tensor
    gold_tokens: Tensor
    correct: Tensor


def read_questions(path: str, limit: int) -> QuestionSet:
    """The first `limit` questions of a .jsonl file.

    Raises:
        DataError: unreadable, or a row of no known form, with its line.
    """
    found: list[Question] = []
    for row in json_rows(Path(path).expanduser(), "--tasks", "give .jsonl files of questions"):
        if len(found) == limit:
            break
        found.append(_question(row))
    if not found:
        raise DataError(f"--tasks {path} holds no questions; give rows with {_FORMS}")
    return QuestionSet(Path(path).name.split(".")[0], tuple(found))


def _question(row: Row) -> Question:
    fields = row.mapping(_FORMS)
    if "choices" in fields:
        query = _texts(row, "query", [fields.get("query")])[0]
        answers = tuple((query, choice) for choice in _texts(row, "choices", fields["choices"]))
    elif "context_options" in fields:
        continuation = _texts(row, "continuation", [fields.get("continuation")])[0]
        answers = tuple(
            (context, continuation) for context in _texts(row, "context_options", fields["context_options"])
        )
    elif "continuation" in fields:
        context, continuation = _texts(row, "context and continuation", [fields.get("context"), fields["continuation"]])
        return Question(((context, continuation),), 0)
    else:
        raise DataError(f"{row.place}: the keys {sorted(map(str, fields))} are of no known form; give {_FORMS}")
    gold = fields.get("gold")
    if not isinstance(gold, int) or not 0 <= gold < len(answers):
        raise DataError(f"{row.place}: gold is {gold!r}, expected a number from 0 to {len(answers) - 1}")
    return Question(answers, gold)


def _texts(row: Row, key: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"{row.place}: {key} is {str(values)[:60]}, expected text")
    return cast(list[str], values)


@torch.no_grad()
def score_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: QuestionSet) -> TaskScores:
    """Likelihood of every answer under a causal language model, in its own dtype.

    Context and continuation are joined by a space unless one of them has white space there, and tokenised apart. What
    is longer than the model's positions is cut at the left.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    rows = [_encode(tokenizer, answer, positions) for question in task.questions for answer in question.answers]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    nats, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)
    while order:
        part = [order.pop()]
        while order and (len(part) + 1) * len(rows[part[0]][0]) <= _BATCH_TOKENS:
            part.append(order.pop())
        for index, (loss, exact) in zip(part, _score(model, [rows[index] for index in part]), strict=True):
            nats[index], greedy[index] = loss, exact
    sizes = [max(1, len(text.encode())) for question in task.questions for _, text in question.answers]
    return _judge(task, nats, greedy, torch.tensor(sizes), torch.tensor([row[1] for row in rows]))


def _encode(tokenizer: PreTrainedTokenizerBase, answer: tuple[str, str], positions: int) -> tuple[list[int], int]:
    """Token ids, and how many of them at the end are scored."""
    context, continuation = answer
    if not context[-1].isspace() and not continuation[0].isspace():
        continuation = " " + continuation
    before, after = tokenizer([context, continuation], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*before, *after][-positions:]
    return ids, min(len(after), len(ids) - 1)


def _score(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    length = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])  # to the right: nothing sees it
    logits = model(input_ids=padded.to(next(model.parameters()).device), use_cache=False).logits
    found: list[tuple[float, bool]] = []
    for (ids, scored), row in zip(rows, logits, strict=True):
        predicted = row[len(ids) - scored - 1 : len(ids) - 1].float().cpu()
        wanted = torch.tensor(ids[len(ids) - scored :])
        loss = float(functional.cross_entropy(predicted, wanted, reduction="sum"))
        found.append((loss, bool((predicted.argmax(dim=-1) == wanted).all())))
    return found


def _judge(task: QuestionSet, nats: Tensor, greedy: Tensor, sizes: Tensor, tokens: Tensor) -> TaskScores:
    gold: list[int] = []
    correct: list[bool] = []
    start = 0
    for question in task.questions:
        stop = start + len(question.answers)
        right = start + question.gold
        gold.append(right)
        if len(question.answers) == 1:
            correct.append(bool(greedy[right]))
        else:
            correct.append(int((nats[start:stop] / sizes[start:stop]).argmin()) == question.gold)
        start = stop
    index = torch.tensor(gold)
    return TaskScores(nats[index], tokens[index], torch.tensor(correct))


def task_measurements(name: str, scores: Mapping[str, TaskScores]) -> list[Measurement]:
    """Accuracy and loss of the right answer of each subject, and the paired change of that loss.

    Args:
        scores: subject -> scores of the same questions; "original" is what the others are compared with.
    """
    measured: list[Measurement] = []
    original = scores.get("original")
    for subject, found in scores.items():
        clusters = Clusters(torch.arange(len(found.correct)), "questions")
        note = f"{len(found.correct)} questions; highest likelihood per byte"
        accuracy = estimate_mean(found.correct, clusters)
        measured.append(accuracy.measurement(f"{name}_accuracy", subject, "share", note))
        loss = estimate_ratio(found.gold_nats, found.gold_tokens, clusters)
        measured.append(loss.measurement(f"{name}_answer_nats_per_token", subject, "nats/token", "of the right answer"))
        if original is not None and subject != "original":
            change = estimate_ratio(found.gold_nats - original.gold_nats, found.gold_tokens, clusters)
            measured.append(
                change.measurement(
                    f"{name}_answer_increase_nats_per_token", subject, "nats/token", "minus the original"
                )
            )
    return measured
