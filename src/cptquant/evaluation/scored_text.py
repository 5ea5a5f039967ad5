"""What the models read and what of it is scored: which tokens, labels or sentences, and how many."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cptquant.core.errors import DataError, ModelError
from cptquant.core.layout import ModelLayout, Task
from cptquant.evaluation.perplexity import token_bytes
from cptquant.models.estimates import Clusters, cluster_by_document
from cptquant.models.load import LoadedModel
from cptquant.models.losses import IGNORED, mask_tokens, scored_targets
from cptquant.models.text import TokenSet

_MASK_FRACTION, _MASK_SEED = 0.15, 0


@dataclass(frozen=True)
class ScoredText:
    """A text, prepared for a task.

    Attributes:
        tokens: what the models read (of a masked model: with tokens hidden).
        targets: int64 with IGNORED, (n, T) for language models, (n,) for classifiers; None for bare encoders and
            unlabelled text.
        scored: positions that are compared, bool, (n, T) for language models, (n,) otherwise.
        note: how they were chosen, for people.
        scored_bytes: (n,) int64, bytes of text behind the scored tokens; None where not known.
    """

    tokens: TokenSet
    targets: Tensor | None
    scored: Tensor
    note: str
    scored_bytes: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Compared positions of each sequence, (n,) int64."""
        return self.scored.reshape(len(self.scored), -1).sum(dim=1)

    @property
    def clusters(self) -> Clusters:
        """What standard errors are taken over."""
        return cluster_by_document(self.tokens.documents)


def prepare_text(model: LoadedModel, tokens: TokenSet) -> ScoredText:
    """Decide what is scored, by the task of `model`.

    Raises:
        DataError: nothing to predict, or labels that are no class of the model.
        ModelError: a masked language model without a mask token; a classifier with a single output.
    """
    task, count, length = model.layout.task, tokens.sequence_count, tokens.input_ids.shape[1]
    if task == "causal_lm":
        targets = scored_targets(tokens, task)
        if not (targets != IGNORED).any():
            raise DataError(
                f"--eval-text gives {count} windows of {length} tokens with nothing to predict; a window needs at "
                "least 2 real tokens"
            )
        note = f"{count} disjoint windows of {length} tokens, the first token of each unscored"
        return ScoredText(tokens, targets, targets != IGNORED, note, _count_bytes(model, targets))
    if task == "masked_lm":
        masked, targets = _hide_tokens(model, tokens)
        note = f"at hidden tokens, {_MASK_FRACTION:.0%} of {count} windows of {length} tokens"
        return ScoredText(masked, targets, targets != IGNORED, note)
    every = torch.ones(count, dtype=torch.bool)
    if task == "encoder":
        return ScoredText(tokens, None, every, f"{count} sentences")
    if tokens.labels is None:
        return ScoredText(tokens, None, every, f"{count} examples without labels: accuracy is not measured")
    _check_labels(model.layout, tokens.labels, int(cast(int, model.module.config.num_labels)))
    return ScoredText(tokens, tokens.labels, every, f"{count} labelled examples")


def _hide_tokens(model: LoadedModel, tokens: TokenSet) -> tuple[TokenSet, Tensor]:
    # transformers types every special token as anything its __getattr__ may return
    mask_token_id = cast(int | None, getattr(model.tokenizer, "mask_token_id", None))
    if model.tokenizer is None or mask_token_id is None:
        raise ModelError(
            f"{model.layout.source} is a masked language model, but its tokenizer is missing or has no mask token; add "
            "tokenizer.json and tokenizer_config.json to its folder"
        )
    return mask_tokens(
        tokens,
        mask_token_id=mask_token_id,
        special_ids=torch.tensor(model.tokenizer.all_special_ids, dtype=torch.int64),
        fraction=_MASK_FRACTION,
        seed=_MASK_SEED,
    )


def _count_bytes(model: LoadedModel, targets: Tensor) -> Tensor | None:
    lengths = None if model.tokenizer is None else token_bytes(model.tokenizer)
    if lengths is None or int(targets.max()) >= lengths.numel():
        return None
    return torch.where(targets == IGNORED, 0, lengths[targets.clamp(min=0)]).sum(dim=1)


def check_tokens(layout: ModelLayout, tokens: TokenSet) -> None:
    """Refuse text that a model cannot run on.

    Raises:
        DataError: no sequence, or windows longer than the model's positions.
        ModelError: token numbers beyond its vocabulary.
    """
    if tokens.sequence_count == 0:
        raise DataError("--eval-text gives no sequence; give more text")
    length = tokens.input_ids.shape[1]
    if layout.max_positions is not None and length > layout.max_positions:
        raise DataError(
            f"windows of {length} tokens are longer than the {layout.max_positions} positions of {layout.source}; "
            f"use --sequence-length {layout.max_positions} or less"
        )
    highest = int(tokens.input_ids.max())
    if highest >= layout.vocabulary_size:
        raise ModelError(
            f"the text holds token {highest}, {layout.source} has {layout.vocabulary_size} tokens; the text was made "
            "with another model's tokenizer"
        )


def _check_labels(layout: ModelLayout, labels: Tensor, class_count: int) -> None:
    if class_count < 2:
        raise ModelError(
            f"{layout.source} has one output (regression); only classifiers with 2 or more classes are measured"
        )
    wrong = labels[(labels < 0) | (labels >= class_count)]
    if wrong.numel():
        raise DataError(
            f"--eval-text has the label {int(wrong[0])}, {layout.source} has classes 0 to {class_count - 1}; "
            "correct the labels"
        )


def evaluation_settings(task: Task, tokens: TokenSet) -> dict[str, str | int | float | bool | None]:
    """What must agree for two evaluations to be comparable: goes into `EvaluationReport.settings`."""
    settings: dict[str, str | int | float | bool | None] = {
        "text": tokens.description,
        "text_digest": tokens.digest,
        "sequences": tokens.sequence_count,
        "tokens_per_sequence": tokens.input_ids.shape[1],
        "documents": cluster_by_document(tokens.documents).count,
        "arithmetic": "float32, sums in float64",
    }
    if task == "masked_lm":
        settings |= {"masked_fraction": _MASK_FRACTION, "mask_seed": _MASK_SEED}
    return settings
