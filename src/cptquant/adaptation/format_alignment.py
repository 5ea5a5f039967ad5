"""Stage 2 of Mix-CPT: teach the format of a chat with few samples, chosen because the format is what they teach.

    FAS = loss(answer | templated question) / loss(answer | plain question)

After arXiv 2407.10804; the exact ratio of its equations 8 (SFT) and 9 (DPO) could not be read, this is our reading.
Samples whose plain loss is high would teach knowledge instead: those above a quantile are left out first. Of the
others, the N with the largest score are trained on (`alignment_training.py`). Both losses are means over the same
tokens of the answer.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cptquant.adaptation.sources import Record, Records, take_records
from cptquant.core.artifact import write_whole
from cptquant.core.errors import DataError, ModelError, UserError

DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}{{- '### ' + message['role'] + '\\n' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token | default('') -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### assistant\\n' -}}{%- endif -%}"
)
"""Where a tokenizer has no chat template and none is given: a heading for each role, no new tokens."""
PLAIN_LOSS_QUANTILE = 0.75
"""Samples above this quantile of the plain loss are left out."""
CANDIDATES_PER_SAMPLE = 8
"""As many samples are scored for each that is wanted, at random."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Scored:
    """A sample with its losses, mean nats over the tokens of its answer. Attributes: index: into the records."""

    index: int
    templated_nats: float
    plain_nats: float

    @property
    def score(self) -> float:
        """FAS; 1 means that the template makes no difference."""
        return self.templated_nats / self.plain_nats


@dataclass(frozen=True)
class Selection:
    """Attributes: chosen: by falling score. held_out: others, not trained on. candidates, dropped: how many.
    records: the candidates by index."""

    chosen: tuple[Scored, ...]
    held_out: tuple[Scored, ...]
    candidates: int
    dropped: int
    records: Mapping[int, Record]


def check_alignment_package() -> None:
    """Refuse stage 2 where TRL is not installed.

    Raises:
        UserError: with the line that installs it.
    """
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise UserError(
            "--align-instructions and --align-preferences need the package trl; install it with: pip install "
            '"cptquant[adapt]", or leave them out: stage 1 does not need it'
        )


def set_template_(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """Give the tokenizer the template that will be taught, and say which.

    Raises:
        DataError: an unreadable file. ModelError: a tokenizer that cannot end an answer. UserError: a template that
            fails.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, and format alignment needs one to end an answer; add "
            '"eos_token" to tokenizer_config.json'
        )
    said = "the tokenizer's own"
    if file is not None:
        try:
            tokenizer.chat_template, said = Path(file).expanduser().read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {file} cannot be read ({error}); give a Jinja file") from None
    elif tokenizer.chat_template is None:
        tokenizer.chat_template, said = DEFAULT_TEMPLATE, "the default: a heading for each role (docs/adaptation.md)"
    _templated(tokenizer, "a question")
    return said


def _templated(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    try:
        messages = [{"role": "user", "content": question}]
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # noqa: BLE001 - a template is a program, and fails in its own ways
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the chat template fails on a question ({first}); mend it, or give one with --chat-template"
        ) from None


def score_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record] | Mapping[int, Record],
    indices: Sequence[int], longest: int,
) -> list[Scored]:  # fmt: skip
    """Both losses of each sample that fits into `longest` tokens with its template and has an answer of some."""
    rows: list[tuple[int, list[list[int]], int]] = []
    for index in indices:
        record = records[index]
        contexts = [_templated(tokenizer, record.question), f"{record.question}\n"]
        ids = tokenizer([*contexts, record.answer], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[2] and max(len(ids[0]), len(ids[1])) + len(ids[2]) <= longest and ids[0] and ids[1]:
            rows.append((index, [[*ids[0], *ids[2]], [*ids[1], *ids[2]]], len(ids[2])))
    sequences = [(sequence, answer) for _, pair, answer in rows for sequence in pair]
    losses = _answer_losses(model, sequences)
    return [Scored(row[0], losses[2 * n], losses[2 * n + 1]) for n, row in enumerate(rows)]


@torch.no_grad()
def _answer_losses(model: PreTrainedModel, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
    """Mean loss of the last tokens of each sequence."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    while order:
        part = [order.pop()]
        length = len(sequences[part[0]][0])
        while order and (len(part) + 1) * length <= _BATCH_TOKENS:
            part.append(order.pop())
        padded = torch.tensor([sequences[i][0] + [0] * (length - len(sequences[i][0])) for i in part])
        logits = model(input_ids=padded.to(device), use_cache=False).logits
        for row, index in zip(logits, part, strict=True):
            losses[index] = _mean_loss(row, *sequences[index])
    model.train(training)
    return losses


def _mean_loss(logits: Tensor, ids: list[int], answer: int) -> float:
    predicted = logits[len(ids) - answer - 1 : len(ids) - 1].float().cpu()
    return float(functional.cross_entropy(predicted, torch.tensor(ids[len(ids) - answer :])))


def select_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record] | Records, wanted: int, *,
    longest: int, seed: int, quantile: float = PLAIN_LOSS_QUANTILE,
) -> Selection:  # fmt: skip
    """Score candidates, leave out the hard ones, keep those with the largest score.

    Args:
        records: of which no more than the candidates are held.

    Raises:
        DataError: fewer candidates than wanted after leaving out.
    """
    drawn = random.Random(seed)
    indices = drawn.sample(range(len(records)), min(len(records), wanted * CANDIDATES_PER_SAMPLE))
    candidates = take_records(records, indices)
    scored = score_samples(model, tokenizer, candidates, indices, longest)
    limit = sorted(each.plain_nats for each in scored)[int(quantile * (len(scored) - 1))] if scored else 0.0
    easy = [each for each in scored if each.plain_nats <= limit]
    if len(easy) < wanted:
        first = next(iter(candidates.values()), None)
        kind = "preferences" if first is not None and first.rejected is not None else "instructions"
        raise DataError(
            f"--align-{kind} {wanted} asks for more than the {len(easy)} samples of --{kind} that remain after leaving "
            f"out the hardest quarter and what is longer than {longest} tokens; ask for fewer, or give more"
        )
    ranked = sorted(easy, key=lambda each: (-each.score, each.index))
    rest = ranked[wanted:]
    held_out = tuple(drawn.sample(rest, min(wanted, len(rest))))
    return Selection(tuple(ranked[:wanted]), held_out, len(indices), len(indices) - len(easy), candidates)


def save_selection(path: Path, selection: Selection) -> None:
    """Keep a selection for a training that goes on after a kill."""
    kept = {key: value for key, value in asdict(selection).items() if key != "records"}
    write_whole(path, json.dumps(kept).encode())


def load_selection(path: Path, records: Sequence[Record] | Records) -> Selection | None:
    """What `save_selection` kept, with its records; None if it is not there.

    Args:
        records: all of them, as they were when the selection was made.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        chosen, held_out = (tuple(Scored(**each) for each in kept[name]) for name in ("chosen", "held_out"))
        candidates, dropped = int(kept["candidates"]), int(kept["dropped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = take_records(records, [each.index for each in (*chosen, *held_out)])
    return Selection(chosen, held_out, candidates, dropped, wanted)


def write_selection(path: Path, selection: Selection) -> None:
    """A JSON line for each chosen sample: its line in its file, score and losses."""
    records = selection.records
    lines = [
        json.dumps(
            {
                "line": records[each.index].number,
                "question": records[each.index].question[:80],
                "format_score": each.score,
                "templated_nats_per_token": each.templated_nats,
                "plain_nats_per_token": each.plain_nats,
            },
            ensure_ascii=False,
        )
        for each in selection.chosen
    ]
    write_whole(path, ("\n".join(lines) + "\n").encode())
